"""The numbers of the house are found, and have not left what a reader can take in."""

import subprocess
import sys
from pathlib import Path

from house import house, longest_silence

ROOT = Path(__file__).parents[1]


def cell(source, kind="code"): return {"cell_type": kind, "source": [source]}


def test_a_silence_ends_where_something_runs():
    one, two = cell("#| export\ndef f(): pass\ndef g(): pass"), cell("#| export\nclass C: pass")
    shown, prose, imports = cell("f()"), cell("why", "markdown"), cell("import math")
    assert longest_silence([one, prose, imports, two, shown, two]) == (3, 2)
    assert longest_silence([one, shown, two]) == (2, 1)


def test_the_house_prints_its_numbers():
    said = subprocess.run([sys.executable, ROOT / "tests/house.py"], capture_output=True, text=True, check=True).stdout
    assert [line[:40].strip() for line in said.splitlines()] == list(house())
