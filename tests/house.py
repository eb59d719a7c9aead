"""What the house looks like: short cells, nothing defined for long without being shown, prose between the code.

    python tests/house.py            # this checkout
    python tests/house.py FOLDER     # another one
"""

import ast
import json
import sys
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parents[1]


def source(cell: dict) -> str: return "".join(cell["source"])


def exported(cell: dict) -> bool: return cell["cell_type"] == "code" and "#| export" in source(cell)


def hidden(cell: dict) -> bool: return "#| hide" in source(cell) or "#| default_exp" in source(cell)


def length(text: str) -> int:
    "Lines that are neither empty nor a comment alone."
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())


def defined(cell: dict) -> int:
    "Functions and classes that a cell defines."
    try: body = ast.parse(source(cell)).body
    except SyntaxError: return 0
    return sum(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)


def imports(cell: dict) -> bool:
    "Whether a cell does nothing but import."
    try: body = ast.parse(source(cell)).body
    except SyntaxError: return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def longest_silence(cells: list[dict]) -> tuple[int, int]:
    "Exported definitions, and exported cells, one after the other with no cell between them that runs anything."
    most, now = (0, 0), (0, 0)
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        if exported(cell):
            if not imports(cell): now = now[0] + defined(cell), now[1] + 1
        elif not hidden(cell) and not imports(cell): now = 0, 0
        most = max(most, now)
    return most


def house(root: Path = ROOT) -> dict[str, str]:
    "The numbers of a checkout, as text."
    paths = sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    books = {str(p.relative_to(root / "nbs")): json.loads(p.read_text(encoding="utf-8"))["cells"] for p in paths}
    cells = [cell for book in books.values() for cell in book]
    lines = [length(source(cell)) for cell in cells if exported(cell) and not imports(cell)]
    silence = {name: longest_silence(book) for name, book in books.items()}
    worst = sorted(silence, key=silence.get)[-3:][::-1]
    sources = [book for book in books.values() if any(map(exported, book))]
    prose, code = (sum(cell["cell_type"] == kind for book in sources for cell in book) for kind in ("markdown", "code"))
    package = [path.read_text(encoding="utf-8") for path in (root / "modnb").rglob("*.py") if path.stem != "_modidx"]
    tests = [path.read_text(encoding="utf-8") for path in (root / "tests").glob("*.py")]
    raised = sum(isinstance(node, ast.Raise) for text in package for node in ast.walk(ast.parse(text)))
    written, cut = sum(map(length, package)), quantiles(lines, n=20)[-1]
    shown = ", ".join(f"{silence[name][0]} in {silence[name][1]} cells ({name})" for name in worst)
    return {
        "exported cells": f"{len(lines)}",
        "their lines, median / 95 % / most": f"{median(lines):.0f} / {cut:.0f} / {max(lines)}",
        "exports with nothing shown between": shown,
        "prose : code cells of sources": f"{prose / code:.2f}",
        "raise per 1,000 lines of the package": f"{1000 * raised / written:.0f}",
        "lines of the package": f"{written:,}",
        "lines of the tests": f"{sum(map(length, tests)):,}",
        "words of the README": f"{len((root / 'README.md').read_text(encoding='utf-8').split()):,}",
    }


if __name__ == "__main__":
    found = house(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for name, number in found.items(): print(f"{name:40} {number}")
