"""What the studies of the matrix leave goes through every table, figure and report; real settings, made up numbers."""

import json
from pathlib import Path

import matplotlib
import pandas
import pytest

matplotlib.use("Agg")

import made_up
from matplotlib import pyplot

from modnb.lab.figures import convergence_figure
from modnb.lab.matrix import (
    ABOUT_METRICS,
    MEASURES,
    Cell,
    check_cells,
    check_metrics,
    check_repeats,
    check_study,
    study_cells,
)
from modnb.lab.published import FIGURES, TABLES, beside_text, coverage, side_by_side
from modnb.lab.reports import (
    comparable_rows,
    named_histories,
    published_figure,
    sizes_figure,
    study_table,
    sweep_figure,
    table_rows,
)
from modnb.lab.results import counted_once, read_rows, write_rows
from modnb.lab.running import run_notebook

ROOT = Path(__file__).parents[1]


def small(**changes) -> pandas.DataFrame:
    "The accuracy of a network trained with MwT by the recipe, but for some settings"
    cell = next(cell for cell in study_cells(made_up.matrix(), "mwt_published", made_up.parameters("train"))
                if (cell.train["system"], cell.train["model"], cell.train["dataset"]) == ("mwt", "vgg16", "cifar10"))
    run = made_up.describe(made_up.trained(cell), changes)
    rows = made_up.rows_about(run, "train", {"all": [None]})
    return pandas.DataFrame([row for row in rows if row["metric"] == "accuracy"])



def test_every_setting_has_its_place():
    "A parameter of a notebook whose rows are compared decides something, or is listed as indifferent"
    notebooks = {"train", *(name for fact in MEASURES.values() for name in fact.get("from", ()))}
    listed = {name for group in ABOUT_METRICS["settings"].values() for name in group} | {*ABOUT_METRICS["indifferent"]}
    for notebook in notebooks:
        assert not made_up.parameters(notebook).keys() - listed, f"{notebook}: say in metrics.yaml what these decide"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_kept_rows_agree(path):
    "Stages that measured the same found the same, and every metric of the table comes from who is said to measure it"
    rows = read_rows(path)
    once = counted_once(rows)
    places = lambda table: set(map(tuple, table[["run", "metric", "classes"]].to_numpy()))
    assert places(once) == places(rows)


@pytest.mark.parametrize("study", made_up.published_studies())
def test_reports_of_a_published_study(study):
    "Every cell and every stage, through the tables and everything that its report draws"
    rows = made_up.study_rows(study)
    tables = side_by_side(comparable_rows(rows), smaller=True, draws=10)
    filled = {name for name, table in tables.items() if ((table.n > 0) & (table.differs == "")).any()}
    assert {name for name in made_up.matrix()[study]["fills"] if name in TABLES} <= filled
    assert len(study_table(rows)) and len(table_rows(rows))
    histories = named_histories(rows, made_up.histories(rows))
    figures = [sizes_figure(rows), sweep_figure(rows),
               *(published_figure(table, name) for name, table in tables.items())]
    if histories: figures.append(convergence_figure(histories, ["cohesion_loss", "train_accuracy"], None))
    for table in tables.values(): beside_text(table, run_only=True)
    assert any(figures) or not histories, "only a study of repairs trains no networks of its own"
    pyplot.close("all")


def test_all_published_studies_together():
    "Rows of all studies clash nowhere; every number that is due is filled, but for times of other machines"
    rows = pandas.concat(map(made_up.study_rows, made_up.published_studies()), ignore_index=True)
    found = coverage(rows, histories=made_up.histories(rows))
    assert {*found.table} == {*TABLES, *FIGURES} and found[found.filled].reason.eq("").all()
    empty = found[found.due & ~found.filled & found.table.isin(TABLES)]
    assert empty.reason.str.contains("instead of V100").all(), empty.to_string()
    assert (found[~found.due].reason == "an average of other lines").all()


def test_coverage_says_why():
    rows = small(width=0.25, epochs=2)
    found = coverage(rows).set_index(["table", "line", "system", "metric"])
    here = ("mwt_table2", "vgg16 cifar10", "mwt", "accuracy")
    assert not found.loc[here, "filled"] and "width 0.25 instead of 1" in found.loc[here, "reason"]
    assert found.loc[("mwt_table2", "vgg16 svhn", "mwt", "coupling"), "reason"] == "no row of mwt coupling"
    assert not coverage(rows, rehearsed=True).filled.any(), "a rehearsal puts its settings back to those of the study"
    study = made_up.study_rows("moda_published")
    timed = study[(study.metric == "training_time") & (study.model == "resnet18")]
    there = [coverage(timed, rehearsed=rehearsed) for rehearsed in (False, True)]
    assert [found.filled.sum() for found in there] == [0, 6], "on another machine than the paper's"
    filled = there[1][there[1].filled]
    assert set(filled.study) == {"moda_published"} and set(filled.stage) == {"train"}


def test_reports_of_files(tmp_path):
    "The notebooks that report, on the folder of all runs"
    cells = [cell for cell in study_cells(made_up.matrix(), "mwt_published", made_up.parameters("train"))
             if cell.train["seed"] < 2 and (cell.train["model"], cell.train["dataset"]) == ("simcnn", "cifar10")]
    for cell in cells:
        for step, rows in made_up.cell_rows(cell).items():
            trained, looked_at = f"networks/{cell.network}/rows_train.csv", f"mwt_published/{cell.name}/{step}/rows.csv"
            write_rows(tmp_path / (trained if step == "train" else looked_at), rows)
        history = made_up.histories(read_rows(tmp_path / f"networks/{cell.network}/rows_train.csv"))[cell.network]
        (tmp_path / f"networks/{cell.network}/history.json").write_text(json.dumps(history))
    experiments = ROOT / "nbs/experiments"
    run_notebook(experiments / "mwt_report.ipynb", tmp_path / "a.ipynb", {"runs": str(tmp_path / "mwt_published")})
    chosen = {"runs": str(tmp_path), "out": str(tmp_path / "report"), "draws": 10}
    run_notebook(experiments / "report.ipynb", tmp_path / "b.ipynb", chosen)
    assert "RQ4" in (tmp_path / "mwt_published/report.txt").read_text()
    assert "All of mwt_table2" in (tmp_path / "report/report.html").read_text()


# Bad input


@pytest.mark.parametrize("stages, said", [
    ({"modularize": {}, "modularize@again": {"sizes": "5"}},
     "'modularize' and 'modularize@again' both measure composed_accuracy"),
    ({"thresholds": {}, "thresholds@b": {"latency": 1}}, "both measure empty_masks"),
    ({"cnnsplitter_search@a": {"grouping": "none"}, "cnnsplitter_search@b": {"grouping": "none", "how": "masked"}},
     "both measure union_accuracy")])
def test_a_number_has_one_stage(stages, said):
    cell = Cell("s", "c", "n", {}, stages)
    declared = {stage: made_up.parameters(stage.partition("@")[0]) for stage in stages}
    with pytest.raises(ValueError, match=said): check_repeats(cell, declared)
    apart = {"modularize": {}, "modularize@half": {"keep_threshold": 0.5}, "thresholds": {}, "cnnsplitter_search": {},
             "cnnsplitter_search@none": {"grouping": "none"}}
    declared = {stage: made_up.parameters(stage.partition("@")[0]) for stage in apart}
    check_repeats(Cell("s", "c", "n", {}, apart), declared)


def test_repeats_stop_before_anything_runs():
    spec = {"train": {"seed": 0}, "stages": {"modularize": {}, "modularize@again": {"subtask_seed": 2}}}
    cells = study_cells({"s": check_study("s", spec)}, "s", made_up.parameters("train"))
    with pytest.raises(ValueError, match="study 's': 'modularize' and 'modularize@again' both measure"):
        check_cells(cells, made_up.EXPERIMENTS)


@pytest.mark.parametrize("name, said", [
    ("mwt_tabel3", "Did you mean 'mwt_table3'"), ("moda_figure9", "no published table")])
def test_a_study_fills_what_there_is(name, said):
    with pytest.raises(ValueError, match=said): check_study("study 's'", {"fills": [name]})


@pytest.mark.parametrize("group", ["settings", "indifferent"])
def test_a_setting_of_no_notebook(group, monkeypatch):
    check_metrics(made_up.EXPERIMENTS)
    wrong = {"network": ["widht"]} if group == "settings" else ["widht"]
    monkeypatch.setitem(ABOUT_METRICS, group, wrong)
    with pytest.raises(ValueError, match="'widht' is no setting of any notebook. Did you mean 'width'"):
        check_metrics(made_up.EXPERIMENTS)
