"""Which pages there are, what they are called and in which order they are read: for the front page, the sidebar of the
site (built by Sphinx or by Quarto) and the README."""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"

TOP = {"0": "The ground", "1": "Shared vocabulary", "2": "One call", "9": "Utilities"}  # first digit of a notebook
FOLDERS = {"cnnsplitter": "CNNSplitter", "mwt": "MwT", "moda": "MODA", "gradsplitter": "GradSplitter",
           "seam": "SeaM", "lab": "The lab", "experiments": "Experiments",
           "findings": "Findings", "explanations": "Explanations"}  # in reading order
ORDER = ["Start here", TOP["2"], TOP["0"], TOP["1"], *FOLDERS.values(), TOP["9"], "More"]
EXPERIMENTS = ["train", "modularize", "thresholds", "mwt_reuse", "cnnsplitter_search", "moda_subtasks",
               "moda_residual", "gradsplitter", "seam", "cnnsplitter_patch", "moda_replacement", "speed",
               "speed_cohesion", "demo_report",
               "mwt_report", "report", "coverage"]


def notebooks() -> list[Path]:
    "Every notebook that becomes a page, relative to nbs/"
    found = sorted(p.relative_to(NBS) for p in NBS.rglob("*.ipynb"))
    return [p for p in found if not any(part.startswith(("_", ".")) or part == "runs" for part in p.parts)]


def page_name(notebook: Path) -> str:
    "What the page of a notebook is called: without the number that sorts it, as nbdev names it"
    return (notebook.parent / re.sub(r"^\d+[a-z0-9]*_", "", notebook.stem.lower())).as_posix()


def group_of(notebook: Path) -> str:
    "The heading under which a notebook stands in the sidebar"
    match notebook.parts:
        case [_] if notebook.stem in ("index", "explore"): return "Start here"
        case ["tutorials", _]: return "Start here"
        case [folder, _, *_] if folder in FOLDERS: return FOLDERS[folder]
        case [name] if name[0] in TOP: return TOP[name[0]]
    return "More"


def place(notebook: Path) -> tuple:
    "Sorts notebooks of one group: the front page first, experiments in their own order, the others by name"
    stem = notebook.stem
    first = ["index", "explore"].index(stem) if stem in ("index", "explore") else 2
    listed = EXPERIMENTS.index(stem) if notebook.parts[0] == "experiments" and stem in EXPERIMENTS else len(EXPERIMENTS)
    return first, listed, notebook.as_posix()


def groups() -> dict[str, list[Path]]:
    "Headings in reading order, each with its notebooks"
    found = {heading: sorted((n for n in notebooks() if group_of(n) == heading), key=place) for heading in ORDER}
    return {heading: members for heading, members in found.items() if members}


def pages() -> dict[str, Path]:
    "Every page of the site and the notebook it comes from, in reading order"
    found: dict[str, Path] = {}
    for notebook in [n for members in groups().values() for n in members]:
        other = found.setdefault(page_name(notebook), notebook)
        if other != notebook: raise ValueError(f"{other} and {notebook} both make the page {page_name(notebook)}.html")
    return found


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

    contents = [{"section": name, "contents": [p.as_posix() for p in members]} for name, members in groups().items()]
    return yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False, allow_unicode=True)
