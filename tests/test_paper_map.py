"""Definitions name their sources, and the papers' places have code."""

import ast
import json
import re
from pathlib import Path

import pytest

from modnb.lab.published import TABLES
from modnb.lab.sources import PLACES, at_place, definitions, link_names, read_module, read_tag

ROOT = Path(__file__).parents[1]
EXPLANATIONS = sorted((ROOT / "nbs/explanations").glob("*.ipynb"))
EQUATIONS = {"CNNSplitter": 5, "MwT": 6, "MODA": 9, "NeMo": 0}  # numbered equations of the papers
NOT_OURS = {("MODA", "Eq. 1")}  # a layer of PyTorch
SECTIONS = {  # how a method works; results are experiments
    "CNNSplitter": ["3.1", "3.2", "3.2.1", "3.2.2", "3.3", "3.3.1", "3.3.2", "3.3.3", "4", "5.2", "5.3"],
    "MwT": ["3.2", "3.2.1", "3.2.2", "3.2.3", "3.3", "3.4", "4.1", "4.2"],
    "MODA": ["3.1", "3.2", "3.3", "4", "5.2"],
    "NeMo": [],
}


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_every_definition_has_a_readable_source():
    for found in definitions():
        if found.kind not in ("function", "class"): continue
        assert found.summary, f"{found.path} ({found.page}) has no docstring"
        read_tag(found.tag)  # of a paper, or nothing: ours


def test_remarks_in_parentheses_are_no_sources(tmp_path):
    "What looks like a source has to be one; any other remark belongs to the docstring"
    head = "# File to edit: ../nbs/10_units.ipynb.\n__all__ = ['f']\n\ndef f():\n    "
    for text, tag, summary in [("Compute relu(x * mask).", None, "Compute relu(x * mask)"),
                               ("Count (MwT Eq. 4).", "MwT Eq. 4", "Count"), ("Count.", None, "Count"),
                               ("Count (Eq. 4).", "Eq. 4", "Count"), ("Count (MTW Sec. 3).", "MTW Sec. 3", "Count")]:
        (tmp_path / "m.py").write_text(f"{head}{text!r}\n")
        found = read_module(tmp_path / "m.py", "m")[1]
        assert (found.tag, found.summary) == (tag, summary)
        if tag == "MwT Eq. 4": assert read_tag(tag) == [("MwT", "Eq. 4")]
        elif tag:
            with pytest.raises(ValueError, match="no source"): read_tag(tag)


@pytest.mark.parametrize("paper", PLACES)
def test_equations_and_sections_of_the_papers_have_code(paper):
    found = at_place(paper)
    wanted = [f"Eq. {n}" for n in range(1, EQUATIONS[paper] + 1)] + [f"Sec. {n}" for n in SECTIONS[paper]]
    missing = [place for place in wanted if (paper, place) not in NOT_OURS and not found[place]]
    assert not missing, f"no definition is tagged ({paper} {missing[0]})"
    definition = {place: [d for d in found[place] if d.kind in ("function", "class", "method")] for place in wanted}
    for place in wanted:
        if place.startswith("Eq.") and (paper, place) not in NOT_OURS: assert definition[place], f"{place}: only a page"


def test_printed_tables_are_all_there():
    listed = {f"{paper.lower()}_table{place.split()[1]}" for paper, places in PLACES.items()
              for place in places if place.startswith("Table")}
    assert listed == set(TABLES)


def test_every_exported_name_is_found():
    "What the package exports, read another way: by nbdev's own list"
    from modnb._modidx import d

    ours = {found.path for found in definitions()}
    for symbols in d["syms"].values():
        for symbol in symbols:
            name = symbol.removeprefix("modnb.")
            if any(part.startswith("_") for part in name.split(".")): continue
            assert name in ours, f"{symbol} is exported, but definitions() does not list it"


def test_names_in_braces_are_checked():
    assert "11_masks" in link_names("{masks.threshold_masks empty}", "../")
    for wrong in ("{masks.threshold_mask}", "{masks.threshold_masks tau}", "{nothing.at_all}"):
        with pytest.raises(ValueError): link_names(wrong)


@pytest.mark.parametrize("notebook", EXPLANATIONS, ids=lambda path: path.name)
def test_explanations_name_what_exists(notebook):
    "Names in braces, within the strings of an explanation's code"
    texts = [node.value for node in ast.walk(ast.parse(code_of(notebook)))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for text in texts:
        if re.search(r"\{\w+(\.\w+)+[ }]", text): link_names(text)
