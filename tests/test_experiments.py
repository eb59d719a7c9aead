"""The experiments: every notebook at smoke size, misspelt parameters, the Snakefile, failures that stay readable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modnb.lab.matrix import check_cells, read_matrix, study_cells
from modnb.lab.results import compare_systems, layer_rows, read_layers, read_rows, read_study
from modnb.lab.running import NotebookFailed, notebook_parameters, run_notebook
from modnb.lab.trained import load_trained
from modnb.masks import ModuleMasks
from modnb.subtasks import draw_subtasks

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
NOTEBOOKS = sorted(EXPERIMENTS.glob("*.ipynb"))
TRAIN, MODULARIZE, REPORT = (EXPERIMENTS / f"{name}.ipynb" for name in ("train", "modularize", "demo_report"))
SNAKEMAKE = [str(Path(sys.executable).parent / "snakemake"), "-s", EXPERIMENTS / "Snakefile", "--cores", "2"]
STUDIES = read_matrix(EXPERIMENTS / "matrix.yaml")
SMALL = {"width": 0.125, "epochs": 2, "train_limit": 300, "test_limit": 100}


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run([*SNAKEMAKE, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    "A small modular network, trained by the notebook"
    out = tmp_path_factory.mktemp("runs") / "networks/moda-small"
    run_notebook(TRAIN, out / "train.ipynb", SMALL | {"system": "moda", "out": str(out), "study": "study", "seed": 3})
    return out


# Notebooks


def test_training_leaves_rows_weights_and_history(trained):
    rows = read_rows(trained / "rows_train.csv").set_index("metric")
    assert set(rows.index) == {"accuracy", "training_time", "epoch_time", "epochs", "step_time", "parameters",
                               "kernels", "multiply_adds"}
    assert rows.loc["accuracy", "split"] == "test" and 0 <= rows.loc["accuracy", "value"] <= 1
    assert (rows["run"] == "moda-small").all() and (rows["system"] == "moda").all() and (rows["seed"] == 3).all()
    config = json.loads(rows["config"].iloc[0])
    assert SMALL.items() <= config.items() and config["dispersion"] == 1.0
    assert not {"seed", "root", "out", "device", "study"} & set(config), "settings that do not decide the result"
    assert len(json.loads((trained / "history.json").read_text())) == 2
    assert {"model.safetensors", "train.ipynb"} <= {p.name for p in trained.iterdir()}
    assert len(list(trained.glob("checkpoint-*.safetensors"))) == 1, "what a killed run would resume from"


def test_taking_apart_and_reporting(trained):
    study = trained.parents[1] / "mine"
    out = study / "moda-small-seed3/modularize"
    settings = {"run": str(trained), "out": str(out), "study": "mine", "sizes": "2,3", "latency_runs": 2}
    run_notebook(MODULARIZE, out / "modularize.ipynb", settings)
    rows = read_rows(out / "rows.csv")
    counts = rows.groupby("metric").size().to_dict()
    assert counts == {"accuracy": 4, "composed_accuracy": 4, "renormalised_accuracy": 4, "composed_size": 4,
                      "composed_flops": 4, "latency": 2, "composed_latency": 2, "kernel_retention": 11,
                      "module_size": 11, "masked_retention": 1, "overlap": 1, "coupling": 1, "cohesion": 1,
                      "modularizing_time": 1, "total_time": 1}
    assert (rows["run"] == "moda-small").all() and (rows["study"] == "mine").all() and rows["value"].notna().all()
    subtasks = [draw_subtasks([str(digit) for digit in range(10)], size, 2) for size in (2, 3)]
    composed = rows[rows.metric == "composed_accuracy"].classes
    assert list(composed) == ["|".join(classes) for drawn in subtasks for classes in drawn], "whatever the run's seed"
    assert rows[rows.metric == "composed_size"]["value"].between(0.01, 1).all()
    masks = ModuleMasks.load(out / "masks.safetensors")
    said = read_layers(study)["moda-small"]
    assert len(masks.classes) == len(said["classes"]) == len(said["coupling"]) == 10
    for number, mask in enumerate(list(masks.masks.values())[:9], 1):  # nothing dies behind these convolutions
        assert said["retention"][f"features.conv{number}"] == mask.double().mean(1).tolist()
    pairs = [said["coupling"][a][b] for a in range(10) for b in range(a)]
    assert sum(pairs) / 45 == pytest.approx(rows[rows.metric == "coupling"].value.item())
    assert set(layer_rows(read_layers(study), rows, "retention").classes) == set(masks.classes)
    with pytest.raises(NotebookFailed, match="no image was held out"):
        run_notebook(MODULARIZE, out / "valid.ipynb", settings | {"split": "valid", "out": str(study / "valid")})
    run_notebook(REPORT, study / "report.ipynb", {"runs": str(study), "seed": 3})
    text = (study / "report.txt").read_text()
    table = compare_systems(read_study(study))
    assert all(label in text and cell in text for label, cell in table["moda"].items())
    assert (study / "masks.png").stat().st_size < 300_000
    assert len(read_rows(study / "all_rows.csv")) == len(rows) + 8


def test_modules_of_mwt_are_those_of_its_generators(tmp_path):
    network, study = tmp_path / "networks/mwt-small", tmp_path / "mine"
    settings = {"system": "mwt", "w_coupling": 3.0, "epochs": 3, "record": True, "valid": 0.1}
    run_notebook(TRAIN, network / "train.ipynb", SMALL | settings | {"out": str(network)})
    history = json.loads((network / "history.json").read_text())
    assert {"sample_cohesion", "sample_coupling", "used_kernels", "valid_accuracy"} <= set(history[-1])
    few = {"run": str(network), "study": "mine", "sizes": "2,4", "subtasks_per_size": 2}
    stages = {"modularize": {}, "mwt_reuse": {"tune_epochs": 1}, "thresholds": {"thresholds": "0.1,0.5,0.9"}}
    rows = {}
    for stage, settings in stages.items():
        out = study / "mwt-small-seed0" / stage
        run_notebook(EXPERIMENTS / f"{stage}.ipynb", out / f"{stage}.ipynb", few | settings | {"out": str(out)})
        rows[stage] = read_rows(out / "rows.csv")
    both = ["classes", "metric"]
    chosen = study / "chosen"
    run_notebook(MODULARIZE, chosen / "modularize.ipynb", few | {"split": "valid", "out": str(chosen)})
    held_out = read_rows(chosen / "rows.csv").query("metric.str.endswith('accuracy')")
    assert set(held_out.split) == {"valid"} and len(held_out) == 3 * 4
    same = {stage: rows[stage][rows[stage].metric == "composed_accuracy"].set_index(both).value for stage in stages}
    assert same["modularize"].equals(same["mwt_reuse"]), "two notebooks, one definition"
    at = rows["thresholds"].config.map(lambda text: json.loads(text)["keep_threshold"])
    found = rows["thresholds"][at == 0.9].set_index(both).value
    assert found[same["modularize"].index].equals(same["modularize"])
    kept = rows["thresholds"][rows["thresholds"].metric == "masked_retention"].value.tolist()
    assert kept[0] > kept[-1], "a higher threshold keeps less"
    run_notebook(EXPERIMENTS / "mwt_report.ipynb", study / "report.ipynb", {"runs": str(study)})
    text = (study / "report.txt").read_text()
    assert all(f"RQ{number}" in text for number in (1, 2, 3, 4))
    assert {"figure5.png", "figure6.png", "thresholds.png", "reuse.png"} <= {p.name for p in study.iterdir()}
    assert json.loads((study / "histories.json").read_text())["mwt-small"][-1]["epoch"] == 3


def test_kept_rows_say_what_decided_them():
    rows = read_rows(EXPERIMENTS.parents[1] / "results/demo.csv")
    configs = {system: json.loads(part.config.iloc[0]) for system, part in rows.groupby("system")}
    assert "dispersion" in configs["moda"] and "dispersion" not in configs["plain"], "ordinary training does not use it"
    parts = rows[(rows.metric == "composed_accuracy") & (rows.classes != "all")]
    tested = parts.drop_duplicates(["run", "system", "classes"]).groupby(["run", "system"]).classes.agg(" ".join)
    assert set(rows.system) == {"plain", "moda", "mwt", "cnnsplitter"} and len(tested) == 3 * 4
    assert tested.nunique() == 1, "the same sub-tasks for every system and seed"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_misspelt_parameters_stop_any_runner(notebook, tmp_path):
    with pytest.raises(ValueError, match="no parameter 'sed'"): run_notebook(notebook, tmp_path / "x.ipynb", {"sed": 1})
    papermill = [str(Path(sys.executable).parent / "papermill"), "--no-progress-bar", "-p", "sed", "1"]
    ran = subprocess.run([*papermill, notebook, tmp_path / "y.ipynb"], capture_output=True, text=True)
    assert ran.returncode == 1 and "no parameter 'sed'" in ran.stderr
    written = json.loads((tmp_path / "y.ipynb").read_text())["cells"]
    later = [c for c in written if c["cell_type"] == "code" and "load" in "".join(c["source"]) and c["outputs"]]
    assert not later, "nothing ran behind the check"


def test_cohesion_benchmark_compares_equals(tmp_path):
    small = {"images": 600, "units": 50, "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "speed_cohesion.ipynb", tmp_path / "speed.ipynb", small)
    rows = read_rows(tmp_path / "rows.csv").set_index("metric")
    assert set(rows.index) == {"cohesion_time", "loop_time_extrapolated"} and (rows.value >= 0).all()


def test_speed_benchmark_measures_every_way(tmp_path):
    small = {"rounds": 1, "batch_size": 16, "models": "vgg12", "layer_counts": "2", "batch_sizes": "16", "images": 16,
             "units": 8, "subtasks": "2", "class_counts": "4,40", "processes": "2", "process_seconds": 0.1,
             "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "speed.ipynb", tmp_path / "speed.ipynb", small)
    rows = read_rows(tmp_path / "rows.csv")
    times = rows[rows.metric == "step_seconds"].set_index("system").value
    ways = {f"{system}, {style}" for system in ("plain", "moda", "mwt") for style in ("ours", "published style")}
    assert set(times.index) == ways and (times > 0).all() and (rows.value > 0).all()
    losses = rows[rows.metric == "loss_milliseconds"]
    assert sorted(losses.system) == ["class sums", "class sums", "pairs", "pairs"] and losses.run.nunique() == 4
    assert len(rows[rows.system == "moda, at once"]) == 1 and set(rows.metric) >= {"latency", "composed_latency"}
    operations = rows[rows.metric == "operations"].set_index("system").value
    for system in ("moda", "mwt"):  # of a network with many layers; with two, the joined form has nothing to gain
        assert operations[f"{system}, ours"] < operations[f"{system}, published style"]


def test_exported_networks_compute_the_same(tmp_path):
    small = {"networks": "lenet5", "batch_sizes": "1,3", "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "exported.ipynb", tmp_path / "exported.ipynb", small)
    rows = read_rows(tmp_path / "rows.csv")
    apart = rows[rows.metric == "difference"]
    assert sorted(apart.system) == ["onnx", "onnx", "program", "program"] and (apart.value < 1e-5).all()
    assert (rows[rows.metric == "composed_size"].value < 0.6).all()


def test_latency_benchmark_runs_every_way(tmp_path):
    small = {"model": "lenet5", "width": 0.5, "rounds": 1, "classes": "2", "batch_sizes": "1,4", "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "latency.ipynb", tmp_path / "latency.ipynb", small)
    rows = read_rows(tmp_path / "rows.csv")
    rows = rows.pivot_table(index=["system", "config", "classes"], columns="metric", values="value")
    assert len(rows) == 2 * 2 * 2 and (rows > 0).all(axis=None) and (rows.composed_size <= 1).all()
    assert (rows.latency >= rows.latency_minimum).all()
    assert (rows.latency_ratio.xs("all", level="classes") == 1).all()


def test_search_benchmark_runs_every_way(tmp_path):
    small = {"individuals": 4, "images": 20, "sample": 2, "generations": 1, "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "speed_search.ipynb", tmp_path / "speed.ipynb", small)
    rows = read_rows(tmp_path / "rows.csv")
    assert set(rows.system) == {"auto", "masked", "extracted", "one after another"} and (rows.value > 0).all()
    run = rows[rows.metric == "modules_run"].set_index("system").value
    assert run["one after another"] == 40 and 0 < run["auto"] < 40, "survivors are not run again"


def test_agreement_benchmark_compares_the_loops(tmp_path):
    asked = {"seeds": 2, "bfloat16": True, "out": str(tmp_path)}
    run_notebook(EXPERIMENTS / "speed_agreement.ipynb", tmp_path / "speed.ipynb", asked)
    rows = read_rows(tmp_path / "rows.csv")
    accuracy = rows[rows.metric == "accuracy"]
    assert len(accuracy) == 3 * 2 * 3 and accuracy.value.between(0.05, 1).all()
    apart = rows[rows.metric == "loss_apart"].set_index("system").value
    assert (apart.filter(like="plain loop") == 0).all() and (apart.filter(like="float32") < 1e-3).all()
    assert (apart.filter(like="fast loop") < 0.03).all() and (apart.filter(like="bfloat16") < 0.03).all()


KNOBS = {
    "plain": {"model": "mobilenet", "head_weights": "published", "dropout": 0.1, "precision": "bfloat16"},
    "moda": {"dropout": 0.2, "warmup": 0.5, "sites": "features.relu1, features.relu9", "average": "classes"},
    "mwt": {"model": "mobilenet", "floor": 0.25, "warmup": 1.0, "average": "classes"}}


@pytest.mark.parametrize("system", KNOBS)
def test_knobs_of_the_training_reach_the_network_and_the_rows(system, tmp_path):
    asked = SMALL | {"system": system, "label_smoothing": 0.1, "max_norm": 5.0} | KNOBS[system]
    run_notebook(TRAIN, tmp_path / "train.ipynb", asked | {"out": str(tmp_path)})
    config = json.loads(read_rows(tmp_path / "rows_train.csv").config[0])
    narrow = {"plain": "published", "moda": "", "mwt": "scaled"}[system]
    assert asked.items() <= config.items() and config["head_weights"] == narrow
    assert config["precision"] in (["bfloat16"] if system == "plain" else ["float32", "bfloat16"]), "as it was computed"
    assert "warmup" in config or system == "plain"
    network = load_trained(tmp_path, device="cpu").network.config
    assert network.get("head", "") == narrow and network["dropout"] == KNOBS[system].get("dropout", 0.0)
    assert network.get("mask_floor") == KNOBS[system].get("floor")
    first, last = json.loads((tmp_path / "history.json").read_text())
    assert (first["loss"] == pytest.approx(first["cross_entropy"])) is True, "no other term in the first epoch"
    assert (last["loss"] == pytest.approx(last["cross_entropy"])) is (system == "plain")


def test_a_network_without_the_option_says_so(tmp_path):
    with pytest.raises(NotebookFailed, match="no option of vgg12 'head'. There is: dropout"):
        run_notebook(TRAIN, tmp_path / "train.ipynb", {"head_weights": "scaled", "out": str(tmp_path)})


def test_networks_of_kept_rows_begin_as_they_did():
    "Kept rows that do not say how their head began are older than the choice: a study for them has the published draw"
    checked, defaults = set(), notebook_parameters(TRAIN)
    for study in STUDIES:
        kept = EXPERIMENTS.parents[1] / f"results/{study}.csv"
        cells = [cell.train for cell in study_cells(STUDIES, study, defaults) if cell.needs_network]
        narrow = [train for train in cells if train.get("model") in ("vgg16", "vgg16_4096", "mobilenet")
                  and train["width"] < 1]
        if not narrow or not kept.is_file(): continue
        configs = [json.loads(text) for text in read_rows(kept).config.unique()]
        for train in narrow:
            its_own = [config for config in configs if all(config.get(name, value) == value
                                                           for name, value in train.items() if name != "head_weights")]
            older = [config for config in its_own if "head_weights" not in config]
            if older: checked.add(study)
            assert not older or train.get("head_weights") == "published", (study, train)
    assert "mwt_mobilenet_digits" in checked


def test_an_unknown_system_is_named_and_the_notebook_is_kept(tmp_path):
    message = "no system 'modular'; there is plain, moda, mwt, nemo"
    with pytest.raises(NotebookFailed, match=message):
        run_notebook(TRAIN, tmp_path / "train.ipynb", {"system": "modular", "out": str(tmp_path)})
    assert message in (tmp_path / "train.ipynb").read_text() and not (tmp_path / "rows_train.csv").exists()


# Matrix and Snakefile


def test_every_study_can_be_planned(tmp_path):
    planned = snakemake(tmp_path, "-n", "--config", "study=all", f"runs={tmp_path / 'runs'}")
    assert planned.returncode == 0, planned.stderr
    text, defaults = planned.stdout + planned.stderr, notebook_parameters(TRAIN)
    for study in STUDIES:
        cells = study_cells(STUDIES, study, defaults)
        check_cells(cells, EXPERIMENTS)
        for cell in cells:
            assert not cell.needs_network or f"networks/{cell.network}/rows_train.csv" in text
            for stage in cell.stages: assert f"{study}/{cell.name}/{stage}/rows.csv" in text


def test_studies_share_their_networks(tmp_path):
    (tmp_path / "matrix.yaml").write_text("""studies:
      a: {vary: {seed: [0, 1]}, train: {epochs: 1}, stages: {modularize: {}}}
      b: {vary: {seed: [1, 2]}, train: {epochs: 1}, stages: {thresholds: {}}}""")
    words = ["study=all", f"matrix={tmp_path / 'matrix.yaml'}", f"runs={tmp_path / 'runs'}"]
    planned = snakemake(tmp_path, "-n", "--config", *words)
    assert planned.returncode == 0, planned.stderr
    counts = [line.split() for line in planned.stdout.splitlines()]
    assert ["train", "3"] in counts and ["stage", "4"] in counts, "three networks for four cells"


@pytest.mark.parametrize("matrix, study, message", [
    (None, "demos", "no study 'demos'. Did you mean 'demo'"),
    ("studies:\n  a:\n    vary: {seed: [0, 1}\n", "a", "matrix.yaml, line 3"),
])
def test_a_wrong_matrix_stops_before_anything_runs(matrix, study, message, tmp_path):
    words = [f"study={study}", f"runs={tmp_path / 'runs'}"]
    if matrix:
        (tmp_path / "matrix.yaml").write_text(matrix)
        words.append(f"matrix={tmp_path / 'matrix.yaml'}")
    ran = snakemake(tmp_path, "-n", "--config", *words)
    assert ran.returncode == 1 and message in ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory) -> Path:
    "The Snakefile with notebooks that take no time, in a folder with a blank in its name"
    folder = tmp_path_factory.mktemp("quick runs")
    shutil.copy(EXPERIMENTS / "Snakefile", folder)
    parameters = {"train": "out = ''  # folder\nstudy = ''  # name\nsystem = ''  # name\nseed = 0  # number",
                  "look": "run = ''  # folder\nout = ''  # folder\nstudy = ''  # name\nnote = ''  # text",
                  "tell": "runs = ''  # folder"}
    write = "for name in {0}: (Path(out) / name).write_text({1})"
    work = {"train": "1 / (2 - seed)\n" + write.format(["rows_train.csv", "model.safetensors"], "''"),
            "look": write.format(["rows.csv"], "note"),
            "tell": "found = sorted(str(path.parent) for path in Path(runs).glob('*/*/rows.csv'))\n"
                    "(Path(runs) / 'report.txt').write_text(' '.join(found))"}
    for name in parameters:
        sources = ["from pathlib import Path", parameters[name], work[name]]
        cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
                  "metadata": {"tags": ["parameters"]} if i == 1 else {}} for i, source in enumerate(sources)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (folder / f"{name}.ipynb").write_text(json.dumps(content))
    (folder / "matrix.yaml").write_text(
        "studies: {a: {vary: {seed: [0, 2]}, train: {system: x}, stages: {look: {note: it's a \"note\" with $HOME}}, "
        "report: tell}}")
    return folder


def test_a_failing_cell_keeps_its_notebook_and_the_others_go_on(quick_runs, tmp_path):
    words = ["-s", quick_runs / "Snakefile", "--config", "study=a", f"runs={tmp_path / 'my runs'}"]
    ran = snakemake(tmp_path, *words, "--keep-going")
    runs = tmp_path / "my runs"
    good, bad = next((runs / "networks").glob("x-*-seed0")), next((runs / "networks").glob("x-*-seed2"))
    assert ran.returncode == 1
    assert (runs / "a/x-seed0/look/rows.csv").read_text() == "it's a \"note\" with $HOME"
    for kept in ("train.ipynb", "train.log"): assert "ZeroDivisionError" in (bad / kept).read_text()
    assert not (bad / "rows_train.csv").exists() and not (runs / "a/x-seed2/look/rows.csv").exists()
    assert (runs / "a/report_so_far.txt").read_text() == "a/x-seed0/look", "a report about what is there"
    assert not (runs / "a/report.txt").exists(), "the report proper waits for all cells"
    (runs / "a/x-seed0/look/rows.csv").unlink()
    planned = snakemake(tmp_path, *words, "-n").stdout
    made = "".join(line for line in planned.splitlines() if line.strip().startswith("output:"))
    assert "x-seed0/look/rows.csv" in made, "a deleted file is made again"
    assert f"{good.name}/model" not in made and f"{bad.name}/model" in made, "what is finished is kept"
