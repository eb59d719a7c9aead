"""The studies of MwT's and MODA's tables: each published number has a run of its recipe, and its notebooks run."""

import itertools
import json
from functools import cache
from pathlib import Path

import pandas
import pytest

from modnb.lab.matrix import read_matrix, study_cells
from modnb.lab.published import TABLES, beside, read_published, what_differs
from modnb.lab.results import describe_run, make_rows, read_rows
from modnb.lab.running import notebook_parameters, run_notebook

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
MATRIX = read_matrix(EXPERIMENTS / "matrix.yaml")
OWN_RULES = {"mwt": "relax", "moda": "top_share", "plain": "top_share"}
OF_NEMO = {"w_contrast", "temperature", "contrast", "spared", "attention"}
OF_SYSTEM = { # settings of the training that rows of a system do not record, because the system has no such thing
    "plain": OF_NEMO | {"warmup", "average", "affinity", "dispersion", "compactness", "compactness_form", "sites",
                        "w_cohesion", "w_coupling", "generators", "floor", "mask_slope"},
    "moda": OF_NEMO | {"w_cohesion", "w_coupling", "generators", "floor", "mask_slope"},
    "mwt": OF_NEMO | {"affinity", "dispersion", "compactness", "compactness_form", "sites"}}
SUBTASKS = "2,3,4,5,6,7,8,9,10"


@cache
def parameters(notebook): return notebook_parameters(EXPERIMENTS / f"{notebook}.ipynb")


def recorded(system, settings):
    "What rows of a stage record for these parameters, once for each value that the stage goes through"
    config = {name: value for name, value in settings.items() if name not in OF_SYSTEM[system]}
    if config.get("empty") == "own": config["empty"] = OWN_RULES[system]
    words = lambda name: [word for word in str(config.get(name, "")).split(",") if word]
    lists = {"tune_select": words("tune_select"), "keep_threshold": [float(word) for word in words("thresholds")],
             "adaptation_epochs": [int(word) for word in words("adaptation_epochs")], "inputs": words("inputs")}
    lists = {name: values for name, values in lists.items() if values}
    for values in itertools.product(*lists.values()):
        yield config | dict(zip(lists, values, strict=True))


@cache
def configurations(table):
    "model, dataset, system and settings of all rows that the studies for a table will write"
    found, defaults = [], parameters("train")
    for study in (name for name, paragraph in MATRIX.items() if table in paragraph["fills"]):
        for cell in study_cells(MATRIX, study, defaults):
            for stage, settings in cell.stages.items():
                notebook = stage.partition("@")[0]
                if notebook.startswith("cnnsplitter"): continue
                own = {name: value for name, value in parameters(notebook).items()
                       if name != "batch_size"} # of counting
                whole = ({} if stage in cell.alone else defaults | cell.train) | own | settings
                for config in recorded(whole.get("system", "moda"), whole):
                    found.append((whole["model"], whole["dataset"], whole["system"], config))
    return found


def variants(number, system, config):
    "A stage that repairs weak networks does so in several ways"
    if number["metric"] not in ("target_change", "other_change"): return [(system, config)]
    details = json.loads(number["details"])
    patch = {"adaptation_epochs": 0, "inputs": "none", "fed_with": "patch, range of all classes"}
    return [("moda", config | details | {"fed_with": "module"}), ("cnnsplitter", config | details | patch)]


OURS = [(table, number) for table in TABLES if table.startswith(("mwt", "moda")) and table != "mwt_table1"
        for number in read_published(table).to_dict("records")
        if "average" not in (number["model"], number["target"]) and number["reading"] != "superseded"
        and (number["system"] != "cnnsplitter" or table == "moda_table2")]


@pytest.mark.parametrize("table", sorted({table for table, _ in OURS}))
def test_every_published_number_has_a_run_of_its_recipe(table):
    for number in (number for name, number in OURS if name == table):
        best, sizes = None, [number, number | {"size": "all sub-tasks"}] if number["size"] == "sub-tasks" else [number]
        for model, dataset, system, config in configurations(table):
            if (model, dataset) != (number["model"], number["dataset"]): continue
            for made, settings in variants(number, system, config):
                if made != number["system"]: continue
                row = {"model": model, "dataset": dataset, "hardware": "A100 V100"}
                for asked in sizes:
                    differs = what_differs(asked, row, settings)
                    best = differs if best is None or len(differs) < len(best) else best
        assert best == [], f"{table}, {number['line']}, {number['system']} {number['metric']}: {best or 'no such run'}"


def test_ten_classes_are_among_the_sizes():
    for study in ("mwt_published", "moda_figure3"):
        for cell in study_cells(MATRIX, study, parameters("train")):
            if "mwt_reuse" in cell.stages: assert cell.stages["mwt_reuse"]["sizes"] == SUBTASKS
            if "modularize" in cell.stages: assert cell.stages["modularize"]["sizes"] == SUBTASKS


def test_five_seeds_where_the_paper_has_five():
    for study in ("moda_published", "moda_without_compactness", "moda_hundred", "moda_replaced"):
        assert MATRIX[study]["vary"]["seed"] == [0, 1, 2, 3, 4], study


def test_what_had_no_study():
    "Where each remedy and each reading of the texts is run at full size"
    cells = {study: study_cells(MATRIX, study, parameters("train")) for study in MATRIX}
    full = {study: [cell for cell in found if cell.train.get("width") == 1.0] for study, found in cells.items()}
    every = [cell for found in full.values() for cell in found]
    assert any(cell.train.get("compactness_form") == "l1" for cell in every)
    assert any(cell.train.get("mask_slope", 1) < 1 and cell.train["model"] == "mobilenet" for cell in every)
    assert {cell.train["system"] for cell in full["moda_published"] if "moda_subtasks" in cell.stages} == {*OWN_RULES}
    assert any("moda_residual" in cell.stages and cell.train["dataset"] == "cifar100" for cell in every)
    assert {cell.train["label_smoothing"] for cell in full["headline_strong"]} == {0.1}, "for all systems"
    assert all(cell.stages for found in full.values() for cell in found if MATRIX[cell.study]["report"])


def config_for(table, **about):
    "Settings of the studies for the published number with these columns"
    numbers = read_published(table)
    for column, value in about.items(): numbers = numbers[numbers[column] == value]
    number = numbers.iloc[0].to_dict()
    return next(config for model, dataset, system, config in configurations(table)
                if (model, dataset, system) == (number["model"], number["dataset"], number["system"])
                and what_differs(number, {"model": model, "dataset": dataset, "hardware": ""}, config) == [])


def test_losses_follow_from_rows_of_two_networks():
    of = {"model": "vgg16", "dataset": "cifar10", "size": "2"}
    tuned = config_for("mwt_table7", system="mwt", metric="tuned_accuracy", **of)
    plain = config_for("mwt_table7", system="plain", metric="accuracy", **of)
    rows = []
    for pair in list(itertools.combinations("0123456789", 2))[:10]:
        for system, metric, value, config in (
                ("plain", "accuracy", 0.993, plain), ("mwt", "tuned_accuracy", 0.99, tuned)):
            about = describe_run("s", system, "vgg16", "cifar10", 0, config, run=system)
            rows += make_rows(about, {metric: value}, pair)
    found = beside(pandas.DataFrame(rows), "mwt_table7", draws=10)
    lost = found[(found.metric == "tuned_loss") & (found.n > 0)]
    assert lost.line.tolist() == ["vgg16 cifar10, 2 classes"] and lost.ours.tolist() == pytest.approx([0.3])
    other = [row | {"config": json.dumps(json.loads(row["config"]) | {"lr": 0.1}, sort_keys=True),
                    "config_hash": "other"} if row["system"] == "plain" else row for row in rows]
    found = beside(pandas.DataFrame(other), "mwt_table7", smaller=True, draws=10)
    assert not (found[found.metric == "tuned_loss"].n > 0).any(), "an ordinary network of another recipe"


def test_savings_follow_from_rows_with_and_without_compactness():
    of = {"model": "resnet18", "dataset": "svhn", "system": "moda"}
    config, rows = config_for("moda_table3", metric="module_size_saving", **of), []
    for compactness, sizes in ((0.3, (0.08, 0.05)), (0.0, (0.1, 0.1))):
        about = describe_run(f"s{compactness}", "moda", "resnet18", "svhn", 0, config | {"compactness": compactness},
                             run=f"moda{compactness}")
        rows += make_rows(about, dict(zip(("module_size", "overlap"), sizes, strict=True)), split="train")
    found = beside(pandas.DataFrame(rows), "moda_table3", draws=10)
    saved = found[found.metric.str.endswith("_saving") & (found.n > 0)]
    assert saved.line.tolist() == ["resnet18 svhn"] * 2 and saved.ours.tolist() == pytest.approx([0.2, 0.5])


# The notebooks, on one small network


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "A study of one MwT network, each stage at its smallest, with the choices of the published ones"
    folder = tmp_path_factory.mktemp("runs")
    network, cell = folder / "networks/small", folder / "tiny/mwt"
    run_notebook(EXPERIMENTS / "train.ipynb", network / "train.ipynb", {
        "study": "training", "system": "mwt", "epochs": 2, "train_limit": 300, "test_limit": 100, "valid": 0.1,
        "record": True, "precision": "float32", "out": str(network)})
    counting = {"empty": "own", "augment_counting": True, "run": str(network), "study": "tiny"}
    stages = {"modularize": {"sizes": "2,10", "subtasks_per_size": 1, "cohesion_images": -1, "renormalise_images": 0},
              "mwt_reuse": {"sizes": "2,10", "subtasks_per_size": 1, "variants": "untuned,tuned", "tune_epochs": 3,
                            "tune_falls": "to half", "tune_select": "test,last", "head": "released"},
              "thresholds": {"thresholds": "0.5,0.99", "sizes": "2", "subtasks_per_size": 1, "cohesion_images": -1,
                             "renormalise_images": 0},
              "moda_subtasks": {"per_size": 1}}
    for stage, settings in stages.items():
        run_notebook(EXPERIMENTS / f"{stage}.ipynb", cell / stage / f"{stage}.ipynb",
                     counting | settings | {"out": str(cell / stage)})
    run_notebook(EXPERIMENTS / "mwt_report.ipynb", folder / "tiny/report.ipynb", {"runs": str(folder / "tiny")})
    return folder


def numbers(path): return read_rows(path).drop_duplicates(["metric", "classes"]).set_index("metric").value


def test_training_says_what_tables_ask(runs):
    found = numbers(runs / "networks/small/rows_train.csv")
    assert found["epochs"] == 2 and found["epoch_time"] * 2 == pytest.approx(found["training_time"], rel=0.5)
    assert {"kernels", "multiply_adds"} <= {*found.index}
    history = json.loads((runs / "networks/small/history.json").read_text())
    assert all(0 <= row["test_accuracy"] <= 1 for row in history)
    assert history[-1]["test_accuracy"] == pytest.approx(found["accuracy"])


def test_taking_apart_as_the_programs_do(runs):
    rows = read_rows(runs / "tiny/mwt/modularize/rows.csv")
    config = json.loads(rows.config[0])
    assert config["empty"] == "relax" and config["augment_counting"] and config["cohesion_images"] == -1
    found, trained = rows.set_index("metric").value, numbers(runs / "networks/small/rows_train.csv")
    assert found["total_time"] == pytest.approx(found["modularizing_time"] + trained["training_time"], rel=1e-3)
    same = read_rows(runs / "tiny/mwt/thresholds/rows.csv")
    assert {json.loads(text)["empty"] for text in same.config} == {"relax"}
    assert set(rows.classes.str.count(r"\|") + 1) >= {2, 10}, "ten classes are a sub-task, too"


def test_reuse_by_both_rules_with_multiply_adds(runs):
    rows = read_rows(runs / "tiny/mwt/mwt_reuse/rows.csv")
    tuned = rows[rows.metric == "tuned_accuracy"]
    by_rule = tuned.assign(rule=[json.loads(text)["tune_select"] for text in tuned.config])
    table = by_rule.pivot(index="classes", columns="rule", values="value")
    assert [*table.columns] == ["last", "test"] and (table.test >= table["last"]).all() and len(table) == 2
    whole = numbers(runs / "networks/small/rows_train.csv")["multiply_adds"]
    counted = rows.pivot_table(index="classes", columns="metric", values="value").dropna(subset=["composed_flops"])
    assert (counted.composed_multiply_adds / whole).tolist() == pytest.approx(counted.composed_flops.tolist(), rel=1e-6)


def test_all_sub_tasks_of_mwt_stand_beside_the_network_with_generators(runs):
    rows = numbers(runs / "tiny/mwt/moda_subtasks/rows.csv")
    lines = (runs / "tiny/mwt/moda_subtasks/subtasks.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert rows["subtasks"] == 9 and last["classes"].count("|") == 9
    accuracy = numbers(runs / "networks/small/rows_train.csv")["accuracy"]
    assert float(last["accuracy"]) == pytest.approx(accuracy, abs=1e-6), "not that of the network without them"


def test_the_report_keeps_the_rules_apart(runs):
    text = (runs / "tiny/report.txt").read_text()
    assert "fine-tuned, last epoch" in text and "epoch chosen by test images" in text and "multiply-adds" in text
    kept = read_rows(runs / "tiny/all_rows.csv")
    assert set(kept[kept.metric.str.startswith("tuned")].metric) == {"tuned_accuracy"}, "rows are as they were"
    histories = json.loads((runs / "tiny/histories.json").read_text())
    assert "test_accuracy" in next(iter(histories.values()))[0]
