"""The site: what Sphinx gets, what Quarto gets, what is published, and how every page looks in a browser."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "docs/build.py")
check_site = load(ROOT / "tests/check_site.py")
PAGES = build.pages()
each_page = pytest.mark.parametrize("page", PAGES, ids=str)


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch): monkeypatch.chdir(ROOT)


# Pages


@each_page
def test_a_page_is_ready_for_sphinx(page):
    "No directive is left, pictures have texts, and links lead to pages or to files of the repository"
    notebook = PAGES[page]
    converted = build.convert_notebook(notebook)
    build.link_pages(converted, notebook)
    text = [cell["source"] for cell in converted.cells if cell["cell_type"] == "markdown"]
    assert text[0].startswith(f"# {build.heading(notebook)[0]}\n")
    assert not any(re.search(r"^#\|", cell["source"], re.MULTILINE) for cell in converted.cells)
    for cell in converted.cells:
        if build.has_picture(cell): assert "mystnb" in cell["metadata"], f"no `#| fig-alt:`: {cell['source'][:200]}"
    for path in re.findall(r"\]\(([^()\s#]+\.ipynb)", "\n".join(text)):
        if path.startswith("https:"): continue
        target = build.posixpath.normpath((Path(page).parent / path).as_posix()).removesuffix(".ipynb")
        assert target in PAGES, f"{notebook} links to {path}"


def test_exports_are_documented_and_their_code_can_be_opened():
    cells = build.convert_notebook(Path("lab/01_matrix.ipynb")).cells
    text = "\n".join(cell["source"] for cell in cells)
    assert "### study_cells\n\n:::{code-block} python\n:class: signature\n\nstudy_cells(" in text
    assert f'href="{build.FILES}/modnb/lab/matrix.py#L' in text
    assert "<details class=\"code\"><summary>Code of <code>study_cells</code>" in text
    assert "```python\ndef study_cells(" in text


def cell(kind: str, source: str, **more) -> dict:
    return {"cell_type": kind, "source": source, "metadata": {}, "id": source[:4] or "none"} | more


def test_an_experiment_shows_its_run_and_goes_without_one_that_failed(monkeypatch, tmp_path, capsys):
    source, kept = NBS / "experiments/train.ipynb", tmp_path / "kept.ipynb"
    notebook = json.loads(source.read_text(encoding="utf-8"))
    said = [{"output_type": "stream", "name": name, "text": text}
            for name, text in (("stdout", "seen"), ("stderr", "50%"))]
    for part in notebook["cells"]:
        if part["cell_type"] == "code": part["outputs"] = said
    kept.write_text(json.dumps(notebook))
    monkeypatch.setattr("modnb.lab.definitions.run_file", lambda path: kept)
    shown = build.convert_notebook(Path("experiments/train.ipynb")).cells
    outputs = [[output["text"] for output in part["outputs"]] for part in shown if part["cell_type"] == "code"]
    assert outputs and all(texts == ["seen"] for texts in outputs) and "those of a run" in shown[2]["source"]
    failing = {"nbformat": 4, "nbformat_minor": 5, "metadata": notebook["metadata"], "cells": [
        cell("code", "seed = 0", outputs=[], execution_count=None) | {"metadata": {"tags": ["parameters"]}},
        cell("code", "1 / 0", outputs=[], execution_count=None)]}
    (tmp_path / "bad.ipynb").write_text(json.dumps(failing))
    monkeypatch.setattr(build, "run_file", lambda path: tmp_path / "bad-run.ipynb")
    build.run_experiment(tmp_path / "bad.ipynb")
    assert "no run for the page of bad.ipynb" in capsys.readouterr().out and not (tmp_path / "bad-run.ipynb").exists()


def test_links():
    here, below = Path("15_metrics.ipynb"), Path("experiments/train.ipynb")
    text = f"[`extract`]({build.HOME}/extract.html#extract), [next](14_similarity.ipynb#why), [other](https://example.org)"
    assert build.site_links(text, here) == (
        "[`extract`](extract.ipynb#extract), [next](similarity.ipynb#why), [other](https://example.org)")
    assert build.site_links("[a](../13_extract.ipynb) [b](report.ipynb)", below) == (
        "[a](../extract.ipynb) [b](../experiments/report.ipynb)")
    assert build.site_links("[rows](../results/demo.csv)", here) == f"[rows]({build.FILES}/results/demo.csv)"
    assert build.site_links("[all](../../results/demo.csv)", below) == f"[all]({build.FILES}/results/demo.csv)"
    assert build.site_links("[m](matrix.yaml)", below) == f"[m]({build.FILES}/nbs/experiments/matrix.yaml)"
    assert build.site_links("![x](images/masks.png)", Path("index.ipynb")) == "![x](images/masks.png)"
    assert build.site_links("[t](13_extract.ipynb)", here, ".html") == "[t](extract.html)"
    text = "[a](13_extract.ipynb) ![b](images/x.png) [c](../results/demo.csv) [d](https://example.org)"
    assert build.readme_links(text) == (
        "[a](nbs/13_extract.ipynb) ![b](nbs/images/x.png) [c](results/demo.csv) [d](https://example.org)")
    assert build.readme_links(f"[`extract`]({build.HOME}/extract.html#extract)") == "[`extract`](nbs/13_extract.ipynb)"


def test_callouts():
    assert build.convert_text("::: {.callout-note}\nText\n:::") == ":::{note}\nText\n:::"
    titled = ":::{admonition} Mind\n:class: warning\n\nText\n:::"
    assert build.convert_text("::: {.callout-warning}\n## Mind\nText\n:::") == titled
    assert build.convert_text('::: {.callout-warning title="Mind"}\nText\n:::') == titled
    with pytest.raises(ValueError, match="only callouts"): build.convert_text("::: {.panel-tabset}\n:::")


def test_figures_have_texts():
    picture = [{"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}]
    cell = lambda source: {"cell_type": "code", "source": source, "outputs": picture, "metadata": {}}
    shown = build.convert_cell(cell('#| label: fig-a\n#| fig-cap: Bars\n#| fig-alt: "Two bars: one is longer"\ndraw()'))
    assert shown["source"] == "draw()"
    assert shown["metadata"]["mystnb"] == {"image": {"alt": "Two bars: one is longer"},
                                           "figure": {"caption": "Bars", "name": "fig-a"}}
    assert build.convert_text("As @fig-a shows, a@b.org") == "As [](#fig-a) shows, a@b.org"


def test_headings_have_quartos_anchors():
    from pages import anchor

    names = {"Split.subtask": "split.subtask", "load_dataset": "load_dataset", "MwT's losses": "mwts-losses",
             "2 classes, in short": "classes-in-short", "A picture": "a-picture"}
    assert {name: anchor(name) for name in names} == names


# Sidebar and Quarto


def test_every_notebook_has_a_place():
    from pages import EXPERIMENTS, START, group_of

    assert len(PAGES) == sum(map(len, build.groups().values())) and list(PAGES)[:len(START)] == START
    for name in EXPERIMENTS: assert (NBS / f"experiments/{name}.ipynb").exists(), "docs/pages.py: EXPERIMENTS"
    places = {"index": "Start", "tutorials/01_take_apart": "Start", "tutorials/09_x": "Use",
              "explanations/01_x": "Understand", "moda/00_losses": "Methods: MODA", "other/x": "Methods: other",
              "experiments/train": "Experiments", "findings/01_measured": "Results",
              "13_extract": "Reference: Shared vocabulary", "lab/00_x": "Reference: The lab"}
    assert {name: group_of(Path(f"{name}.ipynb")) for name in places} == places
    with pytest.raises(ValueError, match="no place"): group_of(Path("x.ipynb"))
    readers = list(dict.fromkeys(heading.split(":")[0] for heading in build.groups()))
    assert readers == ["Start", "Use", "Understand", "Methods", "Experiments", "Results", "Reference"]
    assert {"Methods: CNNSplitter", "Methods: MwT", "Methods: MODA"} <= set(build.groups()), "as papers write them"


MAPPED = ("cnnsplitter", "moda", "mwt") # methods whose papers are on the map


@pytest.mark.parametrize("page", [page for page in PAGES
                                  if page.split("/")[0] in (*MAPPED, "gradsplitter", "seam", "nemo")])
def test_a_method_opens_with_a_picture_and_its_place_in_the_paper(page):
    opening = "\n".join(cell["source"] for cell in build.convert_notebook(PAGES[page]).cells[:3])
    assert re.search(r"^!\[[^\]]{40,}\]\(\.\./images/\w+\.svg\)", opening, re.MULTILINE)
    if page.startswith(MAPPED):
        assert re.search(r"\[\w+, Sections? [\d.]+[^\]]*\]\(\.\./explanations/01_paper_map", opening)


def test_page_names_are_nbdevs():
    "nbdev links to the pages of definitions by its own names"
    from nbdev.doclinks import _nbpath2html
    from pages import page_name

    for notebook in [*PAGES.values(), Path("tutorials/01_take_apart.ipynb"), Path("21b_Two_parts.ipynb")]:
        assert _nbpath2html(notebook).with_suffix("").as_posix() == page_name(notebook)


KNOWN = {"project": {"type"}, "format": {"html"}, "metadata-files": None,
         "website": {"twitter-card", "open-graph", "repo-actions", "navbar", "sidebar", "favicon", "page-navigation",
                     "bread-crumbs", "back-to-top-navigation", "search", "page-footer"}}
KNOWN_HTML = {"theme", "toc", "toc-depth", "html-math-method", "code-copy", "code-overflow", "fig-format", "css",
              "grid", "respect-user-color-scheme", "include-after-body"}


def test_quarto_settings():
    "Only what was seen to work: Quarto itself is not at hand where the tests run"
    settings = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    for key, value in settings.items():
        assert key in KNOWN, f"_quarto.yml: {key}"
        if KNOWN[key]: assert set(value) <= KNOWN[key], f"_quarto.yml: {key}: {set(value) - KNOWN[key]}"
    assert set(settings["format"]["html"]) <= KNOWN_HTML
    assert settings["project"]["type"] == "website"
    assert settings["format"]["html"]["html-math-method"] == "mathml", "the default fetches MathJax"
    assert settings["metadata-files"] == ["nbdev.yml", "sidebar.yml"], "nbdev_docs and docs/build.py write these"
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert "custom_sidebar = True" in (ROOT / "settings.ini").read_text(), "nbdev would write a sidebar of its own"


def test_quarto_sidebar():
    contents = yaml.safe_load(build.quarto_sidebar())["website"]["sidebar"]["contents"]
    named = [f"{reader['section']}: {part['section']}" if isinstance(part, dict) else reader["section"]
             for reader in contents for part in reader["contents"]]
    assert list(dict.fromkeys(named)) == list(build.groups())
    files = [name for reader in contents for part in reader["contents"]
             for name in (part["contents"] if isinstance(part, dict) else [part])]
    assert files == [p.as_posix() for p in PAGES.values()] and all((NBS / name).exists() for name in files)


def test_the_search_of_quarto_learns_what_is_defined(tmp_path):
    (tmp_path / "compose.html").write_text('<section id="compose"><h3>compose</h3></section>')
    page = {"objectID": "compose.html", "href": "compose.html", "title": "Composition", "section": "", "text": "Why"}
    (tmp_path / "search.json").write_text(json.dumps([page]))
    build.index_definitions(tmp_path)
    found = json.loads((tmp_path / "search.json").read_text())
    assert [(e["href"], e["section"]) for e in found] == [("compose.html", ""), ("compose.html#compose", "compose")]


# Workflows

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows(path):
    "They parse, ask for little, pin what they use, and run commands that exist"
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    assert workflow[True], "`on` is read as true by YAML 1.1"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120 and set(job.get("permissions", {}).values()) <= {"read", "write"}
        for step in job["steps"]:
            assert set(step) <= {"name", "uses", "with", "run", "if", "id", "env"}, step
            assert ("uses" in step) != ("run" in step), f"{name}: {step}"
            if "uses" in step: assert re.fullmatch(r"[\w.-]+/[\w./-]+@v\d+", step["uses"]), f"{name}: {step['uses']}"
            for target in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", step.get("run", "")):
                assert set(target.split()) <= targets, f"{name}: make {target}"
            for script in re.findall(r"python ([\w/]+\.py)", step.get("run", "")): assert (ROOT / script).exists()


def test_workflows_cover_tests_and_site():
    text = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}
    assert "make test" in text["test"] and '"3.11"' in text["test"] and '"3.12"' in text["test"]
    assert "quarto-dev/quarto-actions/setup@" in text["docs"] and "make docs" in text["docs"]


# In a browser

FAULTS = {
    "wide.html": ("<div style='width:3000px'>wide</div>", "scrolls sideways"),
    "formula.html": ("<p>The value $x_i$ is left</p>", "formula left as text"),
    "empty.html": ("<p><math></math></p>", "empty formula"),
    "alt.html": ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='>", "no alternative text"),
    "lost.html": ("<img alt='A picture' src='nowhere.png'>", "link to nothing: nowhere.png"),
    "link.html": ("<a href='nowhere.html'>x</a>", "link to nothing: nowhere.html"),
    "markdown.html": ("<p>See [the name](extract.ipynb)</p>", "link left as text"),
    "anchor.html": ("<a href='good.html#nowhere'>x</a>", "no such anchor"),
    "script.html": ("<script>undefined.property</script>", "console: TypeError"),
    "drawing.html": ("<svg width='9' height='9'></svg>", "drawing without a name"),
}
GOOD = ("<h1 id='top'>Good</h1><p>It costs $5 and $6; <code>$x$</code> <math><mi>x</mi></math></p>"
        "<div style='overflow-x:auto'><div style='width:3000px'>scrolls in itself</div></div>"
        "<a href='#top'>up</a> <a href='wide.html'>next</a> <svg aria-hidden='true'></svg>")
HTML = "<!doctype html><html><head><meta name='viewport' content='width=device-width'></head><article>{}</article>"


@pytest.fixture
def browser() -> str:
    return check_site.find_browser() or pytest.skip(f"no browser: one of {', '.join(check_site.BROWSERS)} is wanted")


def test_the_check_sees_what_is_wrong(browser, tmp_path):
    for name, (body, _) in {**FAULTS, "good.html": (GOOD, "")}.items(): (tmp_path / name).write_text(HTML.format(body))
    found = check_site.check(tmp_path, browser)
    for name, (_, problem) in FAULTS.items():
        assert any(problem in text for text in found.get(name, [])), f"{name}: {problem} not in {found.get(name)}"
    assert "good.html" not in found, found.get("good.html")


def test_every_page_in_a_browser(browser):
    site = ROOT / "_docs"
    if not (site / "index.html").exists(): pytest.skip("no site: run make docs")
    sources = [*NBS.rglob("*.ipynb"), *(ROOT / "docs").glob("*.py"), *(ROOT / "docs/static").iterdir()]
    if (site / "index.html").stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("the site is older than its notebooks: run make docs")
    found = check_site.check(site, browser)
    assert not found, "\n".join(f"{page}: {problem}" for page, problems in found.items() for problem in problems)


def test_the_check_says_what_it_lacks(tmp_path):
    ran = subprocess.run([sys.executable, ROOT / "tests/check_site.py", tmp_path], capture_output=True, text=True)
    assert ran.returncode == 3 and "run make docs" in ran.stderr
    shutil.copy(ROOT / "README.md", tmp_path / "index.html")
    command = [sys.executable, ROOT / "tests/check_site.py", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert ran.returncode == 3 and "no browser" in ran.stderr
