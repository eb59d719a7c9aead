"""Which pages there are, what they are called and in which order they are read: for the front page, the sidebar of the
site (built by Sphinx or by Quarto) and the README."""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"

START = ["index", "explanations/five_minutes", "explore", "tutorials/take_apart", "tutorials/one_call"]
FOLDERS = {"tutorials": "Use", "explanations": "Understand", "experiments": "Experiments", "findings": "Results",
           "lab": "Reference: The lab"}  # any other folder is a method
TOP = {"0": "Reference: The ground", "1": "Reference: Shared vocabulary", "2": "Reference: One call",
       "9": "Reference: Utilities"}  # first digit of a notebook
ORDER = [*TOP.values(), FOLDERS["lab"]]  # of the parts of the reference
READERS = ["Start", "Use", "Understand", "Methods", "Experiments", "Results", "Reference"]  # behind a colon: a part
EXPERIMENTS = ["train", "modularize", "thresholds", "mwt_reuse", "cnnsplitter_search", "moda_subtasks", "moda_residual",
               "gradsplitter", "seam", "cnnsplitter_patch", "moda_replacement", "speed", "speed_cohesion",
               "speed_search", "speed_agreement", "demo_report", "mwt_report", "report", "coverage"]


def notebooks() -> list[Path]:
    "Every notebook that becomes a page, relative to nbs/"
    found = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb"))
    return [p for p in found if not any(part.startswith(("_", ".")) or part == "runs" for part in p.parts)]


def page_name(notebook: Path) -> str:
    "What the page of a notebook is called: without the number that sorts it, as nbdev names it"
    return (notebook.parent / re.sub(r"^\d+[a-z0-9]*_", "", notebook.stem.lower())).as_posix()


@cache
def method_name(folder: str) -> str:
    "How the notebooks of a method most often write the name of their folder: MwT, not mwt"
    texts = "".join((NBS / n).read_text(encoding="utf-8") for n in notebooks() if n.parts[0] == folder)
    names = [name for name in re.findall(rf"\b{re.escape(folder)}\b", texts, re.IGNORECASE) if name != folder]
    return max(names, key=names.count, default=folder)


def group_of(notebook: Path) -> str:
    "The heading under which a notebook stands in the sidebar"
    if page_name(notebook) in START: return "Start"
    match notebook.parts:
        case [folder, _, *_] if folder in FOLDERS: return FOLDERS[folder]
        case [folder, _, *_]: return f"Methods: {method_name(folder)}"
        case [name] if name[0] in TOP: return TOP[name[0]]
    raise ValueError(f"docs/pages.py knows no place for {notebook}")


def place(notebook: Path) -> tuple:
    "Sorts the notebooks: by reader, then as listed above, then by name"
    group, page = group_of(notebook), page_name(notebook)
    names, name = (START, page) if group == "Start" else (EXPERIMENTS, notebook.stem)
    listed = names.index(name) if name in names else len(names)
    return READERS.index(group.split(":")[0]), ORDER.index(group) if group in ORDER else 0, listed, notebook.as_posix()


@cache
def groups() -> dict[str, list[Path]]:
    "Headings in reading order, each with its notebooks"
    found: dict[str, list[Path]] = {}
    for notebook in sorted(notebooks(), key=place): found.setdefault(group_of(notebook), []).append(notebook)
    return found


def pages() -> dict[str, Path]:
    "Every page of the site and the notebook it comes from, in reading order"
    found: dict[str, Path] = {}
    for notebook in [n for members in groups().values() for n in members]:
        other = found.setdefault(page_name(notebook), notebook)
        if other != notebook: raise ValueError(f"{other} and {notebook} both make the page {page_name(notebook)}.html")
    return found


def anchor(title: str) -> str:
    "As Quarto and nbdev make it: `Masks.union` is #masks.union, `2 classes, in short` is #classes-in-short"
    kept = re.sub(r"[^\w\s.-]", "", title.lower())
    return re.sub(r"\s+", "-", re.sub(r"^[\W\d_]+", "", kept).strip())


@cache
def heading(notebook: Path) -> tuple[str, str]:
    "Title and subtitle of a notebook: its first line and the quotation below"
    cells = json.loads((NBS / notebook).read_text(encoding="utf-8"))["cells"]
    text = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), "")
    found = re.match(r"# (?P<title>.+)(?:\n+(?P<subtitle>(?:> ?.*\n?)+))?", text)
    if not found: raise ValueError(f"{notebook}: the first text is not a title: # Title, and below it > a subtitle")
    return found["title"].strip(), " ".join(re.sub(r"^> ?", "", found["subtitle"] or "", flags=re.MULTILINE).split())


def quarto_sidebar() -> str:
    "sidebar.yml as nbdev would write it, but with our headings and order"
    import yaml

    contents: list[dict] = []
    for name, members in groups().items():
        reader, _, part = name.partition(": ")
        if not contents or contents[-1]["section"] != reader: contents.append({"section": reader, "contents": []})
        files = [p.as_posix() for p in members]
        contents[-1]["contents"] += [{"section": part, "contents": files}] if part else files
    return yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False, allow_unicode=True)
