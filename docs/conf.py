"The site without Quarto: Sphinx, with notebooks as they are stored and formulas as MathML, so that nothing is fetched."

import re
import sys
import unicodedata
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parents[1] / "settings.ini")
settings = config["DEFAULT"]

project, copyright, release = settings["title"], settings["copyright"], settings["version"]
extensions = ["myst_nb"]
html_theme = "furo"
html_title = settings["title"]
html_static_path = ["static", "../nbs/site.css"]
html_css_files, html_js_files = ["site.css", "furo.css"], ["site.js"]
html_favicon = html_logo = "../nbs/images/logo.svg"
html_copy_source = False
html_show_sphinx = False
html_use_index = False
colours = {"color-brand-primary": "#0072b2", "color-brand-content": "#0a62a3", "color-brand-visited": "#0a62a3"}
dark = {"color-brand-primary": "#56b4e9", "color-brand-content": "#7cc4ef", "color-brand-visited": "#7cc4ef"}
html_theme_options = {
    "light_css_variables": colours,
    "dark_css_variables": dark,
    "top_of_page_buttons": [],
}
pygments_style, pygments_dark_style = "a11y-light", "a11y-dark"
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "gfm"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "deflist"]
myst_heading_anchors = 4
myst_heading_slug_func = "pages.anchor"
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
html_math_renderer = "mathml"


def letter(kind: str, one: str) -> str:
    "A script, bold or double-struck letter as a character of its own: browsers draw no `mathvariant` but `normal`"
    size = "DIGIT" if one.isdigit() else "CAPITAL" if one.isupper() else "SMALL"
    for start in ("MATHEMATICAL ", ""): # Unicode has some of them elsewhere
        try: return unicodedata.lookup(f"{start}{kind.upper()} {size} {unicodedata.name(one).split()[-1]}")
        except KeyError: continue
    return one


def with_letters(formula: str) -> str:
    "Every letter that asks for a variant, replaced"
    def change(found: re.Match) -> str:
        return f"<{found[1]}>{''.join(letter(found[2], one) for one in found[3])}</{found[1]}>"

    return re.sub(r'<(m[in]) mathvariant="(script|bold|double-struck)">(\w+)</m[in]>', change, formula)


def mathml(source: str, display: str = "inline") -> str:
    "A formula as MathML; the converter leaves the backslash of a big brace"
    return with_letters(convert(source.strip(), display=display).replace("\\{", "{").replace("\\}", "}"))


def visit_math(self, node):
    "An inline formula"
    self.body.append(mathml(node.astext()))
    raise SkipNode


def visit_math_block(self, node):
    "A formula on a line of its own"
    self.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
