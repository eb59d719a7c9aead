"""Rules of the repository: package and README follow the notebooks, imports point down, nothing private is tracked."""

import ast
import filecmp
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
EXPERIMENTS = [p for p in NOTEBOOKS if "experiments" in p.parts]
SOURCES = [p for p in NOTEBOOKS if re.match(r"\d\d_", p.name)]
BIN = Path(sys.executable).parent
name = lambda path: path.relative_to(ROOT).as_posix()
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)


def cells(notebook: Path, kind: str | None = None) -> list[dict]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in found if kind in (None, cell["cell_type"])]


def python_source(cell: dict) -> ast.Module | None:
    try: return ast.parse(re.sub(r"^[ \t]*[%!](?!=).*$", "", cell["source"], flags=re.MULTILINE))
    except SyntaxError: return None


def tracked_files() -> list[Path]:
    "What is in git, or would be with the next `git add .`"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    return [ROOT / f for f in listed.stdout.split("\0") if f and (ROOT / f).is_file()]


@pytest.fixture(scope="module")
def build():
    "Imports a program of docs/ by its name"
    def load(stem: str):
        spec = importlib.util.spec_from_file_location(stem, ROOT / f"docs/{stem}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


# Package and notebooks


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    "The package, exported again somewhere else"
    copy = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copytree(NBS, copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, env=environment)
    return copy / "modnb"


def test_exports_are_in_step(exported):
    modules = {p.relative_to(exported) for p in exported.rglob("*.py")}
    here = {p.relative_to(ROOT / "modnb") for p in (ROOT / "modnb").rglob("*.py")}
    assert here - modules == set(), "no notebook writes these"
    assert modules - here == set(), "exported by no one yet: run nbdev_export"
    for module in sorted(modules):
        if filecmp.cmp(exported / module, ROOT / "modnb" / module, shallow=False): continue
        origin = re.search(r"File to edit: \S*(nbs/\S+\.ipynb)", (exported / module).read_text())
        pytest.fail(f"modnb/{module} is not what {origin[1] if origin else 'the notebooks'} exports: run nbdev_export")


def test_package_imports_little():
    "Starting is quick, and the library runs where development tools and heavy parts are not installed"
    heavy = ["fastcore", "fvcore", "papermill", "nbdev", "torchvision", "matplotlib", "pandas", "sklearn", "seaborn"]
    modules = sorted({".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                      for p in (ROOT / "modnb").rglob("*.py") if p.stem != "_modidx"})
    code = f"import sys\nsys.modules.update(dict.fromkeys({heavy!r}))\nimport {', '.join(modules)}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_what_starts_notebooks_is_light():
    "Seconds and hundreds of megabytes at every start otherwise; the notebook's own kernel has torch"
    code = "import sys; sys.modules['torch'] = None; import modnb.lab.running, modnb.lab.commands"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def written_in() -> dict[str, Path]:
    "Module without `modnb.` -> the notebook that exports it, relative to nbs/"
    found = {}
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "code"):
            exports = re.search(r"^#\|\s*default_exp\s+(\S+)", cell["source"], re.MULTILINE)
            if exports: found[exports[1]] = notebook.relative_to(NBS)
    return found


WRITTEN_IN = written_in()
FOLDERS = sorted({path.parts[0] for path in WRITTEN_IN.values() if len(path.parts) == 2})


def floor(module: str) -> int:
    "0 the ground and utilities, 1 the shared vocabulary, 2 the methods, 3 the lab and what else stands on all of them"
    if module in FOLDERS: return 3 if module == "lab" else 2
    notebook = WRITTEN_IN[module]
    if len(notebook.parts) == 2: return floor(notebook.parts[0])
    known = {"0": 0, "1": 1, "2": 3, "9": 0} # the ground, the vocabulary, what uses all of it, utilities
    assert notebook.name[0] in known, f"{notebook}: {known}, all else in a folder"
    return known[notebook.name[0]]


def imported_modules(path: Path) -> set[str]:
    "Modules of ours that a module imports, without `modnb.`"
    package, found = path.relative_to(ROOT / "modnb").parts[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            full = ".".join(filter(None, [*(["modnb", *base] if node.level else []), node.module]))
            inside = full == "modnb" or full.removeprefix("modnb.") in FOLDERS
            names = [f"{full}.{alias.name}" for alias in node.names] if inside else [full]
        found |= {n.removeprefix("modnb.") for n in names if n.startswith("modnb.")}
    return {n for n in found if n in WRITTEN_IN or n in FOLDERS}


def test_folders_of_notebooks_are_packages():
    for module, notebook in WRITTEN_IN.items():
        wanted = ".".join([*notebook.parts[:-1], re.sub(r"^\d+_", "", notebook.stem)])
        assert module == wanted, f"{notebook} exports {module}; its folder and name say {wanted}"
    assert {"cnnsplitter", "lab", "moda", "mwt", "nemo"} <= set(FOLDERS)


def test_imports_point_downwards():
    for path in sorted((ROOT / "modnb").rglob("*.py")):
        if path.stem in ("_modidx", "__init__"): continue
        module = ".".join(path.relative_to(ROOT / "modnb").with_suffix("").parts)
        for other in imported_modules(path):
            assert floor(other) <= floor(module), f"{module} imports {other}, which lies above it"
            methods = {m.split(".")[0] for m in (module, other) if floor(m) == 2}
            if module.startswith("nemo.") and methods == {"nemo", "mwt"}: continue # the one that builds on another
            assert len(methods) <= 1, f"{module} imports {other}: a method never imports another"


def test_the_ground_is_read_in_the_order_of_its_imports():
    place = {module: path.name for module, path in WRITTEN_IN.items() if path.name[0] == "0" and len(path.parts) == 1}
    for module, name in place.items():
        for other in imported_modules(ROOT / f"modnb/{module}.py") & place.keys():
            assert place[other] < name, f"{name} imports {other}, which comes after it"


def defined_names(module: Path) -> set[str]:
    values = [node.value for node in ast.parse(module.read_text()).body
              if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    return {name for value in values for name in ast.literal_eval(value)}


def test_imports_name_the_module_that_defines():
    "`modnb.training` hands names of other modules on, to users; the library asks the modules themselves"
    defined = {module: defined_names(ROOT / "modnb" / f"{module.replace('.', '/')}.py") for module in WRITTEN_IN}
    for path in sorted((ROOT / "modnb").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom): continue
            base = path.relative_to(ROOT).parts[:-1]
            full = ".".join([*base[:len(base) - node.level + 1], node.module or ""]) if node.level else str(node.module)
            names = defined.get(full.removeprefix("modnb."))
            for alias in node.names if names else []:
                assert alias.name in names or alias.name.startswith("_"), f"{path.name}: {alias.name} is not {full}'s"


def test_relative_imports_are_understood():
    "The test above would miss what it cannot read"
    assert imported_modules(ROOT / "modnb/lab/figures.py") >= {"masks"}
    assert imported_modules(ROOT / "modnb/lab/trained.py") >= {"data", "lab.results", "mwt.generators"}
    floors = {"data": 0, "files": 0, "masks": 1, "moda.losses": 2, "mwt": 2, "specialize": 3, "lab": 3}
    assert {module: floor(module) for module in floors} == floors


def test_annotations_can_be_evaluated():
    "A name in quotes that the module does not have breaks the documentation"
    for path in sorted((ROOT / "modnb").rglob("*.py")):
        if path.stem.startswith("_"): continue
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for symbol in getattr(module, "__all__", []):
            value = getattr(module, symbol)
            if inspect.isfunction(value): inspect.signature(value, eval_str=True)


# Notebooks


def test_parameters_tag_survives_cleaning(tmp_path):
    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "settings.ini", tmp_path)
    source = EXPERIMENTS[0]
    shutil.copy(source, tmp_path / "nbs")
    subprocess.run([BIN / "nbdev_clean"], cwd=tmp_path, check=True)
    cleaned = cells(tmp_path / "nbs" / source.name)
    tags = [cell["metadata"].get("tags") for cell in cleaned]
    assert tags == [cell["metadata"].get("tags") for cell in cells(source)] and ["parameters"] in tags


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=name)
def test_experiments_have_checked_parameters_and_no_outputs(notebook):
    code = cells(notebook, "code")
    places = [i for i, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", [])]
    assert len(places) == 1, "exactly one cell is tagged parameters"
    assert "check_parameters(In, globals())" in code[places[0] + 1]["source"]
    assert not code[places[0]]["source"].startswith("# Parameters"), "that is how papermill marks its own cell"
    for line in code[places[0]]["source"].splitlines():
        assert re.match(r"\w+ = .+ # \S", line), f"a plain value and a comment are wanted: {line}"
    assert not any(cell["outputs"] for cell in code), "jupyter nbconvert --clear-output --inplace"


@each_notebook
def test_cells_of_imports_hold_nothing_else(notebook):
    "The documentation executes cells that import, and only those"
    for cell in cells(notebook, "code"):
        tree = python_source(cell)
        if tree is None: continue
        imports = [isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body]
        exported = re.search(r"^#\|\s*export", cell["source"], re.MULTILINE)
        assert exported or all(imports) or not any(imports), f"imports and other code:\n{cell['source'][:300]}"


@each_notebook
def test_prose_is_prose(notebook):
    "A text editor's cell format puts `#` before every line; in a notebook that makes every line a heading"
    for cell in cells(notebook, "markdown"):
        assert not re.match(r"# #+ |# \w[^\n]*\n#", cell["source"]), cell["source"][:100]


@each_notebook
def test_exported_cells_import_by_name(notebook):
    for cell in cells(notebook, "code"):
        if not re.search(r"^#\|\s*export", cell["source"], re.MULTILINE): continue
        stars = [n for n in ast.walk(python_source(cell)) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
        assert not stars, f"import * in an exported cell:\n{cell['source'][:200]}"


@each_notebook
def test_one_dialect(notebook):
    "Docstrings end with a period and do not say (ours); a comment in a signature is one space behind the code"
    for cell in cells(notebook, "code"):
        tree, lines = python_source(cell), cell["source"].split("\n")
        for node in ast.walk(tree) if tree else []:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef): continue
            text = ast.get_docstring(node)
            assert not text or text[-1] in ".?!" and "(ours)" not in text, f"{node.name}: {text}"
            first = node.body[0].lineno if not isinstance(node, ast.ClassDef) else node.lineno
            for line in lines[node.lineno - 1:first - 1]:
                assert not re.search(r"[,:(\[]  +# ", line), f"one space before the comment: {line}"


@each_notebook
def test_notebooks_are_small(notebook):
    assert notebook.stat().st_size <= 600_000


@pytest.mark.parametrize("notebook", SOURCES, ids=name)
def test_links_between_notebooks_lead_somewhere(notebook):
    for cell in cells(notebook, "markdown"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", cell["source"]):
            assert (notebook.parent / target).exists(), f"{notebook.name} links to {target}"


def test_formulas_become_mathml(build):
    "The site shows formulas without fetching anything; what the converter does not know it would show as text"
    mathml = build("conf").mathml
    formula = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.DOTALL)
    seen = 0
    for notebook in NOTEBOOKS:
        for cell in cells(notebook, "markdown"):
            prose = re.sub(r"```.*?```|`[^`]*`", "", cell["source"], flags=re.DOTALL)
            for block, inline in formula.findall(prose):
                result, seen = mathml(block or inline), seen + 1
                assert "\\" not in result and "<mi>&</mi>" not in result, f"{notebook.name}: {block or inline}"
    assert seen > 20


# README and site


def test_readme_is_in_step(build, monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert build("build").readme_text() == readme, "nbs/index.ipynb changed: run make readme"


def test_the_demo_page_is_computed_from_the_rows():
    from modnb.lab.results import compare_systems, markdown_table, read_rows

    table = markdown_table(compare_systems(read_rows(ROOT / "results/demo.csv")))
    texts = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells(NBS / "findings/03_demo.ipynb", "code")
             for o in c["outputs"]]
    assert table in texts, "run make results"


def test_the_front_page_shows_the_rows(build):
    from PIL import Image

    from modnb.lab.reports import of_seeds, published_beside, short_table, table_rows
    from modnb.lab.results import kept_rows, markdown_table

    rows = of_seeds(table_rows(kept_rows(ROOT / "results", "cifar10_small")))
    table = markdown_table(short_table(rows, published_beside(rows)))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "run make refresh"
    picture = Image.open(NBS / "images/headline.png")
    assert picture.text["Description"] == build("build").headline_digest(), "run make refresh"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_committed_rows_are_valid():
    from modnb.lab.results import read_rows

    for path in (ROOT / "results").glob("*.csv"): assert len(read_rows(path))


# What is tracked


def test_nothing_private_or_large_is_tracked():
    private = re.compile(r"(?<![\w.])/(?:home|Users|root|work|tmp)/[\w.-]+/")
    for path in tracked_files():
        assert path.stat().st_size <= 600_000, f"{path} is large"
        assert path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth"), f"{path}: weights are not committed"
        if path.suffix in (".png", ".svg", ".gz", ".xz"): continue
        found = private.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path}: a path of one machine: {found[0]}"


def test_versions_agree():
    version = re.search(r"^version = (\S+)", (ROOT / "settings.ini").read_text(), re.MULTILINE)[1]
    import modnb

    assert modnb.__version__ == version
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_one_command():
    "Continuous integration runs what everybody runs"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / ".ci/run").read_text()
    helped = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "lab", "docs", "readme", "clean"): assert f"make {target}" in helped
