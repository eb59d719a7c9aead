"""The experiments: every notebook at smoke size, misspelt parameters, the Snakefile, failures that stay readable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modnb.masks import ModuleMasks
from modnb.matrix import check_cells, read_matrix, study_cells
from modnb.results import compare_systems, read_rows
from modnb.running import NotebookFailed, run_notebook
from modnb.samples import draw_subtasks

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
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
    out = tmp_path_factory.mktemp("study") / "moda-small"
    run_notebook(TRAIN, out / "train.ipynb", SMALL | {"system": "moda", "out": str(out), "study": "study", "seed": 3})
    return out


# Notebooks


def test_training_leaves_rows_weights_and_history(trained):
    rows = read_rows(trained / "rows_train.csv").set_index("metric")
    assert set(rows.index) == {"accuracy", "training_time", "step_time", "parameters"}
    assert rows.loc["accuracy", "split"] == "test" and 0 <= rows.loc["accuracy", "value"] <= 1
    assert (rows["run"] == "study/moda-small").all() and (rows["system"] == "moda").all() and (rows["seed"] == 3).all()
    config = json.loads(rows["config"].iloc[0])
    assert SMALL.items() <= config.items() and config["dispersion"] == 1.0
    assert not {"seed", "root", "out", "device", "study"} & set(config), "settings that do not decide the result"
    assert len(json.loads((trained / "history.json").read_text())) == 2
    assert {"model.safetensors", "train.ipynb"} <= {p.name for p in trained.iterdir()}
    assert len(list(trained.glob("checkpoint-*.safetensors"))) == 1, "what a killed run would resume from"


def test_taking_apart_and_reporting(trained):
    run_notebook(MODULARIZE, trained / "modularize.ipynb", {"run": str(trained), "sizes": "2,3", "latency_runs": 2})
    rows = read_rows(trained / "rows_modularize.csv")
    counts = rows.groupby("metric").size().to_dict()
    assert counts == {"accuracy": 4, "composed_accuracy": 4, "composed_size": 4, "composed_flops": 4, "latency": 2,
                      "composed_latency": 2, "kernel_retention": 11, "module_size": 11, "overlap": 1, "coupling": 1,
                      "cohesion": 1}
    assert (rows["run"] == "study/moda-small").all() and rows["value"].notna().all()
    subtasks = [draw_subtasks([str(digit) for digit in range(10)], size, 2) for size in (2, 3)]
    composed = rows[rows.metric == "composed_accuracy"].classes
    assert list(composed) == ["|".join(classes) for drawn in subtasks for classes in drawn], "whatever the run's seed"
    assert rows[rows.metric == "composed_size"]["value"].between(0.01, 1).all()
    assert len(ModuleMasks.load(trained / "masks.safetensors").classes) == 10
    run_notebook(REPORT, trained.parent / "report.ipynb", {"runs": str(trained.parent), "seed": 3})
    text = (trained.parent / "report.txt").read_text()
    table = compare_systems(read_rows([trained / "rows_train.csv", trained / "rows_modularize.csv"]))
    assert all(label in text and cell in text for label, cell in table["moda"].items())
    assert (trained.parent / "masks.png").stat().st_size < 300_000
    assert len(read_rows(trained.parent / "rows.csv")) == len(rows) + 4


def test_kept_rows_say_what_decided_them():
    rows = read_rows(EXPERIMENTS.parents[1] / "results/demo.csv")
    configs = {system: json.loads(part.config.iloc[0]) for system, part in rows.groupby("system")}
    assert "dispersion" in configs["moda"] and "dispersion" not in configs["plain"], "ordinary training does not use it"
    tested = rows[rows.metric == "composed_accuracy"].groupby("run").classes.agg(" ".join)
    assert len(tested) == 6 and tested.nunique() == 1, "the same sub-tasks for every system and seed"


@pytest.mark.parametrize("notebook", [TRAIN, MODULARIZE, REPORT], ids=lambda p: p.stem)
def test_misspelt_parameters_stop_any_runner(notebook, tmp_path):
    with pytest.raises(ValueError, match="no parameter 'sed'"): run_notebook(notebook, tmp_path / "x.ipynb", {"sed": 1})
    papermill = [str(Path(sys.executable).parent / "papermill"), "--no-progress-bar", "-p", "sed", "1"]
    ran = subprocess.run([*papermill, notebook, tmp_path / "y.ipynb"], capture_output=True, text=True)
    assert ran.returncode == 1 and "no parameter 'sed'" in ran.stderr
    written = json.loads((tmp_path / "y.ipynb").read_text())["cells"]
    later = [c for c in written if c["cell_type"] == "code" and "load" in "".join(c["source"]) and c["outputs"]]
    assert not later, "nothing ran behind the check"


def test_an_unknown_system_is_named_and_the_notebook_is_kept(tmp_path):
    message = "no system 'modular'; there is plain, moda"
    with pytest.raises(NotebookFailed, match=message):
        run_notebook(TRAIN, tmp_path / "train.ipynb", {"system": "modular", "out": str(tmp_path)})
    assert message in (tmp_path / "train.ipynb").read_text() and not (tmp_path / "rows_train.csv").exists()


# Matrix and Snakefile


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_can_be_planned(study, tmp_path):
    cells = study_cells(STUDIES, study)
    check_cells(cells, TRAIN, MODULARIZE)
    planned = snakemake(tmp_path, "-n", "--config", f"study={study}", f"runs={tmp_path / 'runs'}")
    assert planned.returncode == 0, planned.stderr
    for cell in cells: assert f"{cell.folder}/rows_modularize.csv" in planned.stdout + planned.stderr


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
                  "modularize": "run = ''  # folder\nnote = ''  # text"}
    write = "for name in {0}: (Path({1}) / name).write_text({2})"
    work = {"train": "1 / (2 - seed)\n" + write.format(["rows_train.csv", "model.safetensors"], "out", "''"),
            "modularize": write.format(["rows_modularize.csv", "masks.safetensors"], "run", "note")}
    for name in parameters:
        sources = ["from pathlib import Path", parameters[name], work[name]]
        cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
                  "metadata": {"tags": ["parameters"]} if i == 1 else {}} for i, source in enumerate(sources)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (folder / f"{name}.ipynb").write_text(json.dumps(content))
    (folder / "matrix.yaml").write_text(
        "studies: {a: {vary: {seed: [0, 2]}, train: {system: x}, modularize: {note: it's a \"note\" with $HOME}}}")
    return folder


def test_a_failing_cell_keeps_its_notebook_and_the_others_go_on(quick_runs, tmp_path):
    words = ["-s", quick_runs / "Snakefile", "--config", "study=a", f"runs={tmp_path / 'my runs'}"]
    ran = snakemake(tmp_path, *words, "--keep-going")
    good, bad = tmp_path / "my runs/a/x-seed0", tmp_path / "my runs/a/x-seed2"
    assert ran.returncode == 1
    assert (good / "rows_modularize.csv").read_text() == "it's a \"note\" with $HOME"
    for kept in ("train.ipynb", "train.log"): assert "ZeroDivisionError" in (bad / kept).read_text()
    assert not (bad / "rows_train.csv").exists() and not (bad / "rows_modularize.csv").exists()
    (good / "masks.safetensors").unlink()
    planned = snakemake(tmp_path, *words, "-n").stdout
    made = "".join(line for line in planned.splitlines() if line.strip().startswith("output:"))
    assert "x-seed0/masks.safetensors" in made, "a deleted file is made again"
    assert "x-seed0/model.safetensors" not in made and "x-seed2/model.safetensors" in made, "what is finished is kept"
