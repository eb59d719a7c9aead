"""Builds README.md, the site where Quarto is not installed, and the sidebar for Quarto where it is.

    python docs/build.py readme|experiments|site|sidebar|refresh

nbdev does a part of it (links to definitions, hidden cells) by its Python functions. Its commands `nbdev_docs` and
`nbdev_readme` would install Quarto system-wide, so they are not called from here.
"""

import hashlib
import json
import posixpath
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))

from pages import NBS, ROOT, groups, heading, page_name, pages, quarto_sidebar  # noqa: E402

from modnb.lab.definitions import run_file  # noqa: E402

SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
HOME = SETTINGS["DEFAULT"]["doc_host"] + SETTINGS["DEFAULT"]["doc_baseurl"]
FILES = f"{SETTINGS['DEFAULT']['git_url']}/blob/{SETTINGS['DEFAULT']['branch']}"
LINK = re.compile(r"\]\((?P<path>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")
CALLOUT = re.compile(r"^:::+ *\{ *\.callout-(?P<kind>\w+)(?P<options>[^}]*)\} *\n+(?:#+ +(?P<title>.+)\n+)?", re.M)
SIGNATURE = re.compile(r"^``` \{\.python \.signature\}\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
DIV = re.compile(r"^:::+ *\{ *[.#].*\} *$", re.MULTILINE)
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif")


def run_experiment(notebook: Path) -> None:
    "Run one with its own values, unless that run is kept; where it fails, its page shows code alone"
    from modnb.lab.running import NotebookFailed, run_notebook

    kept = run_file(notebook)
    if kept.exists(): return
    for older in kept.parent.glob(f"{notebook.stem}-??????????.ipynb"): older.unlink()
    (ROOT / "_proc/experiments" / notebook.name).unlink(missing_ok=True)  # what nbdev kept of the page
    with TemporaryDirectory() as folder:
        try: shutil.copy(run_notebook(notebook, Path(folder) / notebook.name, cwd=folder), kept)
        except NotebookFailed as error: print(f"no run for the page of {error}")


def run_experiments() -> None:
    "What the pages of experiments show, two at a time"
    (ROOT / "build/runs").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2) as pool: list(pool.map(run_experiment, sorted((NBS / "experiments").glob("*.ipynb"))))


# One notebook, prepared by nbdev


def process(source: Path) -> dict:
    "One notebook after the hooks that settings.ini gives to nbdev: hidden cells gone, exports documented, names linked"
    import nbformat
    from execnb.nbio import read_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults

    steps = [step for step in FilterDefaults().procs() if step.__name__ not in ("FrontmatterProc", "ForQuarto")]
    processor = NBProcessor(nb=read_nb(source), procs=steps, process=True)
    cells = [{k: v for k, v in cell.items() if not k.endswith("_")} for cell in processor.nb.cells]
    notebook = {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.reads(json.dumps(notebook), 4)  # joins the lines of texts that nbdev left as lists


def without_directives(source: str) -> str:
    "Code without the lines that speak to nbdev and Quarto"
    return re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n")


# From Quarto's Markdown and cell options to those of Sphinx


def cell_options(source: str) -> dict:
    "What the directives of a cell ask for: `#| fig-alt: Two bars` is {'fig-alt': 'Two bars'}"
    import yaml

    found = {}
    for name, value in re.findall(r"^#\|[ \t]*([\w-]+):[ \t]+(.+?)[ \t]*$", source, re.MULTILINE):
        given = yaml.safe_load(value)  # as Quarto reads it
        found[name] = given if isinstance(given, bool) else str(given)
    return found


def convert_text(text: str) -> str:
    "Callouts, signatures, tables of parameters and references in the words of MyST"
    def callout(found: re.Match) -> str:
        named = re.search(r'title="([^"]+)"', found["options"])
        title = found["title"] or (named and named[1])
        return f":::{{admonition}} {title}\n:class: {found['kind']}\n\n" if title else f":::{{{found['kind']}}}\n"

    text = CALLOUT.sub(callout, text)
    text = SIGNATURE.sub(r":::{code-block} python\n:class: signature\n\n\1\n:::", text)
    text = re.sub(r"^::: \{\.parameters\}$", ":::{container} parameters", text, flags=re.MULTILINE)
    text = re.sub(r"(?<![\w`])@(fig-[\w-]+)", r"[](#\1)", text)
    if unknown := DIV.search(text): raise ValueError(f"only callouts are known here: {unknown[0]}")
    return text


def front_matter(text: str, notebook: Path) -> str:
    "The title, and the subtitle as a paragraph in italics"
    title, subtitle = heading(notebook)
    rest = re.sub(r"\A# .+\n+(?:>.*\n?)*", "", text).strip()
    return "\n\n".join(filter(None, [f"# {title}", f"*{subtitle}*" if subtitle else "", rest]))


def markdown_output(cell: dict) -> str:
    "What a cell printed or returned as Markdown"
    texts = [o.get("data", {}).get("text/markdown") or o.get("text", "") for o in cell["outputs"]]
    return "\n\n".join("".join(text) for text in texts).strip()


def has_picture(cell: dict) -> bool:
    "Whether a cell shows a picture"
    return any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))


def convert_cell(cell: dict) -> dict | None:
    "A cell without directives: they became plain Markdown, tags or options of a figure; None for one that is not shown"
    from nbformat.v4 import new_markdown_cell

    if cell["cell_type"] == "raw": return None
    if cell["cell_type"] == "markdown":
        cell["source"] = convert_text(cell["source"])
        return cell
    options = cell_options(cell["source"])
    cell["source"] = without_directives(cell["source"])
    if options.get("include") is False: return None
    texts = [o for o in cell["outputs"] if "text/markdown" in o.get("data", {})]
    only_text = options.get("echo") is False and texts and len(texts) == len(cell["outputs"])
    if options.get("output") == "asis" or only_text: return new_markdown_cell(markdown_output(cell))
    tags = [tag for option, value, tag in (("echo", False, "remove-input"), ("code-fold", True, "hide-input"),
                                           ("output", False, "remove-output")) if options.get(option) is value]
    if tags: cell["metadata"]["tags"] = tags
    figure = {new: options[old] for old, new in (("fig-cap", "caption"), ("label", "name")) if options.get(old)}
    shown = {"image": {"alt": text}} if (text := options.get("fig-alt") or options.get("fig-cap")) else {}
    if figure and has_picture(cell): shown["figure"] = figure
    if shown: cell["metadata"]["mystnb"] = shown
    return cell


def convert_notebook(notebook: Path) -> dict:
    "One notebook, ready for Sphinx or nbconvert; its links are still those of the notebook"
    converted = process(NBS / notebook)
    converted.cells = [cell for cell in map(convert_cell, converted.cells) if cell is not None]
    first = next((cell for cell in converted.cells if cell["cell_type"] == "markdown"), None)
    if first: first["source"] = front_matter(first["source"], notebook)
    return converted


# Links


def site_link(path: str, anchor: str, notebook: Path, suffix: str = ".ipynb") -> str:
    "Where a link of a notebook leads on the site: to a page, to a picture, or to a file in the repository"
    known, up = pages(), "../" * (len(notebook.parts) - 1)
    if path.startswith(HOME + "/") and (page := path.removeprefix(HOME + "/").removesuffix(".html")) in known:
        return f"{up}{page}{suffix}{anchor}"
    if not path or re.match(r"[a-z]+:", path): return path + anchor
    target = Path(posixpath.normpath((notebook.parent / path).as_posix()))
    if target in known.values(): return f"{up}{page_name(target)}{suffix}{anchor}"
    if target.suffix in PICTURES and target.parts[0] != "..": return path
    inside = posixpath.normpath(f"nbs/{target.as_posix()}")
    return f"{FILES}/{inside}{anchor}" if (ROOT / inside).exists() else path + anchor


def site_links(text: str, notebook: Path, suffix: str = ".ipynb") -> str:
    "A text of a notebook with the links that it has on the site"
    return LINK.sub(lambda m: f"]({site_link(m['path'], m['anchor'] or '', notebook, suffix)})", text)


def link_pages(converted: dict, notebook: Path) -> None:
    "Point the links in texts and in Markdown outputs to pages of the site; Sphinx resolves those of texts only"
    for cell in converted.cells:
        if cell["cell_type"] == "markdown": cell["source"] = site_links(cell["source"], notebook)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = site_links("".join(data["text/markdown"]), notebook, ".html")


def readme_link(path: str) -> str:
    "Where a link of the index leads when seen from the top folder"
    if path.startswith(HOME + "/") and (page := path.removeprefix(HOME + "/").removesuffix(".html")) in pages():
        return f"nbs/{pages()[page].as_posix()}"
    if not path or re.match(r"[a-z]+:", path): return path
    return posixpath.normpath(f"nbs/{path}")


def readme_links(text: str) -> str:
    "Links of the index as seen from the top folder; GitHub knows no anchors inside notebooks"
    def local(found: re.Match) -> str:
        anchor = "" if found["path"].startswith(HOME) else found["anchor"] or ""
        return f"]({readme_link(found['path'])}{anchor})"

    return LINK.sub(local, text)


# Products


def readme_text() -> str:
    "README.md: the index, processed by nbdev, as Markdown"
    from nbconvert import MarkdownExporter

    notebook = convert_notebook(Path("index.ipynb"))
    notebook.cells = [cell for cell in notebook.cells if cell["source"].strip() or cell.get("outputs")]
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(notebook)
    if resources["outputs"]: raise ValueError("README: the index must show pictures by a link to a file, not as output")
    return re.sub(r"\n{3,}", "\n\n", readme_links(text)).strip().replace("\u00a0", " ") + "\n"


def write_page(page: str, notebook: Path, source: Path) -> None:
    "Write one page for Sphinx"
    import nbformat

    converted = convert_notebook(notebook)
    link_pages(converted, notebook)
    if page == "index": converted.cells.append(nbformat.v4.new_markdown_cell(toctrees()))
    target = source / f"{page}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(converted, target)


def toctrees() -> str:
    "The sidebar: a heading and its pages, in reading order"
    parts = []
    for caption, members in groups().items():
        entries = "\n".join("Front page <self>" if page_name(n) == "index" else page_name(n) for n in members)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```")
    return "\n\n".join(parts)


def build_site() -> None:
    "Convert all notebooks and let Sphinx make _docs/ of them; a warning stops it"
    with TemporaryDirectory() as folder:
        source = Path(folder) / "site"
        for page, notebook in pages().items(): write_page(page, notebook, source)
        for picture in (p for p in NBS.rglob("*") if p.suffix in PICTURES and "runs" not in p.parts):
            (source / picture.relative_to(NBS)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, source / picture.relative_to(NBS))
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs")]
        ran = subprocess.run([*sphinx, "-d", f"{folder}/cache", str(source), f"{folder}/html"])
        if ran.returncode: sys.exit("the site was not built: Sphinx warned, see above")
        shutil.rmtree(ROOT / "_docs", ignore_errors=True)
        shutil.move(f"{folder}/html", ROOT / "_docs")
    print(f"{len(pages())} pages: open {ROOT / '_docs/index.html'}")


def headline_rows():
    "What the picture of the front page shows: rows about whole networks, and the published numbers beside them"
    from modnb.lab.figures import HEADLINE
    from modnb.lab.reports import of_seeds, published_beside, table_rows
    from modnb.lab.results import kept_rows

    rows = of_seeds(table_rows(kept_rows(ROOT / "results", "cifar10_small")))
    return rows[rows["metric"].isin(HEADLINE) & (rows["classes"] == "all")], published_beside(rows)


def headline_digest() -> str:
    "Tells whether the picture is of these numbers; it stands in the picture's description"
    rows, published = headline_rows()
    shown = ["system", "model", "seed", "split", "metric", "value"]
    text = rows[shown].to_csv(index=False) + published.drop(columns="differs").to_csv(index=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_headline() -> None:
    "nbs/images/headline.png: all systems at a glance, from the rows that are kept"
    from modnb.lab.figures import headline_figure

    figure = headline_figure(*headline_rows())
    about = {"Software": None, "Description": headline_digest()}
    figure.savefig(NBS / "images/headline.png", dpi=100, metadata=about)


def refresh() -> None:
    "Draw the front page's picture and run the pages again, in place, that show results that have changed"
    draw_headline()
    for page in (NBS / "index.ipynb", NBS / "findings/03_demo.ipynb"):
        run = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(page)]
        subprocess.run([*run, "--log-level", "WARN"], check=True)
        subprocess.run([str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(page)], check=True, cwd=ROOT)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["readme"]: (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
        case ["experiments"]: run_experiments()
        case ["site"]: build_site()
        case ["sidebar"]: (NBS / "sidebar.yml").write_text(quarto_sidebar(), encoding="utf-8")
        case ["refresh"]: refresh()
        case _: sys.exit("usage: python docs/build.py readme|experiments|site|sidebar|refresh")
