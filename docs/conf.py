"The site without Quarto: Sphinx, with notebooks as they are stored and formulas as MathML, so that nothing is fetched."

from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parents[1] / "settings.ini")
settings = config["DEFAULT"]

project, copyright, release = settings["title"], settings["copyright"], settings["version"]
extensions = ["myst_nb"]
html_theme = "furo"
html_title = settings["title"]
html_static_path = []
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "deflist"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
html_math_renderer = "mathml"


def mathml(source: str, display: str = "inline") -> str:
    "A formula as MathML; the converter leaves the backslash of a big brace"
    return convert(source.strip(), display=display).replace("\\{", "{").replace("\\}", "}")


def visit_math(self, node):
    "An inline formula"
    self.body.append(mathml(node.astext()))
    raise SkipNode


def visit_math_block(self, node):
    "A formula on a line of its own"
    formula = mathml(node.astext(), "block")
    self.body.append(f'<div style="overflow: auto hidden; padding: 0.3em 0">{formula}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
