"""Builds README.md and, where Quarto is not installed, the site. Run as `python docs/build.py readme|site|refresh`.

nbdev does its own part (documentation of the exported definitions, links between them, hidden cells) by its Python
functions. Its commands `nbdev_docs` and `nbdev_readme` would install Quarto system-wide, so they are not called.
"""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini")
HOME = SETTINGS["DEFAULT"]["doc_host"] + SETTINGS["DEFAULT"]["doc_baseurl"]
FILES = f"{SETTINGS['DEFAULT']['git_url']}/blob/{SETTINGS['DEFAULT']['branch']}"
SITE = re.compile(rf"\({re.escape(HOME)}/(?P<page>[\w/]+)\.html(?P<anchor>#[\w.-]+)?\)")  # links made by nbdev
LINK = re.compile(r"\((?P<folder>[\w/.-]*?)(?P<name>[\w-]+)\.ipynb(?P<anchor>#[\w.-]+)?\)")
CALLOUT = re.compile(r"^:::\s*\{\.callout-(?P<kind>\w+)[^}]*\}", re.MULTILINE)


def page_name(path: Path) -> str:
    "What a notebook is called on the site: without the number that sorts it"
    return re.sub(r"^\d+[a-z]?_", "", path.stem)


def pages() -> dict[str, Path]:
    "Every page of the site and the notebook it comes from, relative to nbs/, in reading order"
    notebooks = sorted(p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb"))
    shown = [p for p in notebooks if not any(part.startswith(("_", ".")) for part in p.parts)]
    return {(p.parent / page_name(p)).as_posix(): p for p in shown}


def process(source: Path, destination: Path) -> None:
    "Let nbdev prepare one notebook for reading"
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main

    destination.parent.mkdir(parents=True, exist_ok=True)
    main((source, destination, FilterDefaults))


def front_matter(text: str) -> str:
    "Title and subtitle as Markdown, from the front matter that nbdev made of them"
    import yaml

    fields = yaml.safe_load(text.strip().strip("-")) or {}
    parts = [f"# {fields.get('title', '')}", f"*{fields['description'].strip()}*" if fields.get("description") else ""]
    return "\n\n".join(filter(None, parts))


def markdown_output(cell: dict) -> str:
    "What a cell printed or returned as Markdown"
    texts = [o.get("data", {}).get("text/markdown") or o.get("text", "") for o in cell["outputs"]]
    return "\n\n".join("".join(text) for text in texts).strip()


def convert_cell(cell: dict) -> dict | None:
    "A cell without Quarto's directives: they become plain Markdown, or tags; None for a cell that is not shown"
    if cell["cell_type"] == "raw": return markdown_cell(front_matter(cell["source"]))
    if cell["cell_type"] == "markdown":
        if cell["source"].startswith("<!-- WARNING"): return None
        cell["source"] = CALLOUT.sub(r":::{\g<kind>}", cell["source"])
        return cell
    options = dict(re.findall(r"^#\|\s*([\w-]+):\s*(\S+)", cell["source"], re.MULTILINE))
    cell["source"] = re.sub(r"^#\|.*\n?", "", cell["source"], flags=re.MULTILINE).strip("\n")
    if options.get("include") == "false": return None
    if options.get("output") == "asis": return markdown_cell(plain_documentation(markdown_output(cell)))
    tags = [tag for option, tag in (("echo", "remove-input"), ("code-fold", "hide-input"), ("output", "remove-output"))
            if options.get(option) == ("true" if option == "code-fold" else "false")]
    if tags: cell["metadata"]["tags"] = tags
    return cell


def plain_documentation(text: str) -> str:
    "The documentation of a definition without the parts that only Quarto understands"
    text = re.sub(r"^---\n", "", text)
    return re.sub(r"\{target=[^}]*\}", "", text)


def markdown_cell(source: str) -> dict:
    from nbformat.v4 import new_markdown_cell

    return new_markdown_cell(source)


def convert_notebook(source: Path, page: str) -> dict:
    "One notebook, ready for Sphinx or nbconvert; `source` was processed by nbdev"
    import nbformat

    notebook = nbformat.read(source, 4)
    notebook.cells = [cell for cell in map(convert_cell, notebook.cells) if cell is not None]
    notebook.metadata.pop("widgets", None)
    if page == "index": return notebook
    return link_pages(notebook, "../" * page.count("/"))


def link_pages(notebook: dict, up: str) -> dict:
    "Point the links in texts and in Markdown outputs to pages of this site"
    for cell in notebook.cells:
        if cell["cell_type"] == "markdown": cell["source"] = site_links(cell["source"], up)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = site_links("".join(data["text/markdown"]), up)
    return notebook


def site_links(text: str, up: str) -> str:
    "Links to pages of the site, and to files of the repository; `up` leads from the page to the top"
    known = pages()
    text = re.sub(rf"\]\({re.escape(up)}\.\./([^)]+)\)", rf"]({FILES}/\1)", text)
    text = SITE.sub(lambda m: f"({up}{m['page']}.ipynb{m['anchor'] or ''})" if m["page"] in known else m[0], text)
    return LINK.sub(lambda m: f"({m['folder']}{page_name(Path(m['name']))}.ipynb{m['anchor'] or ''})", text)


def readme_links(text: str) -> str:
    "Links of the index as seen from the top folder"
    known = pages()
    text = SITE.sub(lambda m: f"(nbs/{known[m['page']].as_posix()})" if m["page"] in known else m[0], text)
    local = re.compile(r"\]\((?![a-z]+:|#|nbs/)(?P<path>[^)]+)\)")
    return local.sub(lambda m: "](" + re.sub(r"^nbs/\.\./", "", f"nbs/{m['path']}") + ")", text)


def readme_text() -> str:
    "README.md: the index, processed by nbdev, as Markdown"
    from nbconvert import MarkdownExporter

    with TemporaryDirectory() as folder:
        processed = Path(folder) / "index.ipynb"
        process(ROOT / "nbs/index.ipynb", processed)
        notebook = convert_notebook(processed, "index")
    notebook.cells = [cell for cell in notebook.cells if cell["source"].strip() or cell.get("outputs")]
    notebook.metadata["language_info"] = {"name": "python"}
    exporter = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True)
    text, resources = exporter.from_notebook_node(notebook)
    if resources["outputs"]: raise ValueError("README: the index must show pictures by a link to a file, not as output")
    return re.sub(r"\n{3,}", "\n\n", readme_links(text)).strip() + "\n"


def build_site() -> None:
    "Convert all notebooks and let Sphinx make _docs/ of them"
    import nbformat

    with TemporaryDirectory() as folder:
        source, processed = Path(folder) / "site", Path(folder) / "processed.ipynb"
        for page, notebook in pages().items():
            process(ROOT / "nbs" / notebook, processed)
            converted = convert_notebook(processed, page)
            if page == "index": complete_index(converted)
            target = source / f"{page}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(converted, target)
        for picture in (ROOT / "nbs").rglob("*.png"):
            (source / picture.relative_to(ROOT / "nbs")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, source / picture.relative_to(ROOT / "nbs"))
        sphinx = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-c", str(ROOT / "docs")]
        subprocess.run([*sphinx, "-d", f"{folder}/cache", str(source), f"{folder}/html"], check=True)
        shutil.rmtree(ROOT / "_docs", ignore_errors=True)
        shutil.move(f"{folder}/html", ROOT / "_docs")
    print(f"open {ROOT / '_docs/index.html'}")


def complete_index(notebook: dict) -> None:
    "Give the front page its links and the list of all other pages, one group for each folder"
    link_pages(notebook, "")
    groups: dict[str, list[str]] = {}
    for page in pages():
        if page != "index": groups.setdefault(page.rpartition("/")[0] or "library", []).append(page)
    for caption, names in groups.items():
        entries = "\n".join(names)
        notebook.cells.append(markdown_cell(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```"))


def refresh() -> None:
    "Run the index again, in place, after the results it shows have changed"
    index = ROOT / "nbs/index.ipynb"
    run = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(index)]
    subprocess.run([*run, "--log-level", "WARN"], check=True)
    subprocess.run([str(Path(sys.executable).parent / "nbdev_clean"), "--fname", str(index)], check=True, cwd=ROOT)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["readme"]: (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")
        case ["site"]: build_site()
        case ["refresh"]: refresh()
        case _: sys.exit("usage: python docs/build.py readme|site|refresh")
