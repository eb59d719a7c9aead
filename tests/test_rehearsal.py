"""`modnb rehearse`: drawn images, small settings, steps that fail on purpose, an empty table, all published studies"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modnb.lab.commands import main
from modnb.lab.matrix import REHEARSAL, check_study, read_matrix, stage_notebook, study_cells
from modnb.lab.playing import Job, code_cells, play_jobs
from modnb.lab.rehearsal import SECONDS, SIZES, stand_in, thinned, tiny, tiny_cell, written_settings
from modnb.lab.results import read_rows
from modnb.lab.running import notebook_parameters

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "nbs/experiments"
MATRIX = read_matrix(EXPERIMENTS / "matrix.yaml")
DEFAULTS = {path.stem: notebook_parameters(path) for path in EXPERIMENTS.glob("*.ipynb")}


def notebook(path: Path, parameters: str, *sources: str) -> Path:
    "A notebook whose first cell holds the parameters"
    cells = [{"cell_type": "code", "source": source, "metadata": {"tags": ["parameters"]} if i == 0 else {}}
             for i, source in enumerate([parameters, *sources])]
    path.write_text(json.dumps({"cells": cells}))
    return path


def toys(folder: Path, matrix: str, look: str = "pass") -> Path:
    "A training that writes empty files, and a stage that runs a text; both note that they were there"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "matrix.yaml").write_text(matrix)
    rows = ("from modnb.lab.results import describe_run, make_rows, write_rows\n"
            "about = describe_run('s', 'plain', 'vgg16', 'cifar10', seed, {'epochs': 200})\n")
    common = "out = '' # folder\nstudy = '' # name\nseed = 0 # number\ndevice = '' # where\n"
    note = f"with open({str(folder / 'log')!r}, 'a') as log: log.write(out + '\\n')"
    notebook(folder / "train.ipynb", common + "system = '' # name\nmodel = '' # name", rows, note,
             "write_rows(f'{out}/rows_train.csv', make_rows(about, {'accuracy': 0.5}))",
             "open(f'{out}/model.safetensors', 'w').close()")
    notebook(folder / "look.ipynb", common + "run = '' # folder", rows, note, look,
             "write_rows(f'{out}/rows.csv', make_rows(about, {'coupling': 0.5}, split='train'))")
    return folder


def finished(folder: Path) -> list[str]:
    return [Path(line).name for line in (folder / "log").read_text().splitlines()]


TOY = """
studies:
  a: {vary: {seed: [0, 1, 2]}, train: {model: vgg16}, stages: {look: {}}}
  b: {vary: {seed: [0]}, train: {model: vgg16}}
"""


# Images and settings


@pytest.mark.parametrize("dataset, classes, side", [
    ("digits", 10, 16), ("cifar10", 10, 32), ("svhn", 10, 32), ("cifar100", 100, 32)])
def test_stand_ins_have_shapes_and_classes_and_can_be_told_apart(dataset, classes, side):
    source = stand_in(dataset, side)
    (images, labels), (tested, wanted) = source.train, source.test
    assert images.shape[1:] == (3, side, side) and len(source.classes) == len(set(source.classes)) == classes
    assert set(labels.tolist()) == set(wanted.tolist()) == set(range(classes))
    means = [images[labels == label].float().mean(0) for label in range(classes)]
    nearest = lambda image: min(range(classes), key=lambda label: (means[label] - image).norm().item())
    assert [nearest(image) for image in tested.float()[:30]] == wanted[:30].tolist()
    assert stand_in(dataset, side).train[0].equal(images), "drawn by the names alone"


def test_sizes_name_settings_that_the_notebooks_have_and_of_their_types():
    for name, sizes in SIZES.items():
        wrong = {setting for setting, value in sizes.items() if setting not in DEFAULTS[name]}
        assert not wrong, f"{name}.ipynb has no {wrong}"
        for setting, value in sizes.items():
            default = DEFAULTS[name][setting]
            assert default is None or isinstance(value, type(default) | int), f"{name}.ipynb: {setting} is {default!r}"
    stages = {stage_notebook(stage) for spec in MATRIX.values() for stage in spec["stages"]}
    assert stages <= SIZES.keys(), "a stage of the matrix that nothing makes small"


def test_only_sizes_are_small_and_can_be_put_back():
    for study in MATRIX:
        for cell in study_cells(MATRIX, study, DEFAULTS["train"])[:3]:
            small = tiny_cell(cell, DEFAULTS)
            for step in cell.steps:
                name = stage_notebook(step)
                said, played = ((one.train if step == "train" else one.stages[step]) for one in (cell, small))
                changed = {key for key in played if played[key] != said.get(key, DEFAULTS[name][key])}
                assert changed <= SIZES.get(name, {}).keys()
                whole = DEFAULTS[name] | said
                assert written_settings(DEFAULTS[name] | played, [(name, DEFAULTS[name] | played, whole)]) == whole
    assert tiny("train", {"epochs": 1, "width": 0.01}, DEFAULTS["train"])["epochs"] == 1, "smaller already"


def test_every_kind_of_cell_is_played_once():
    vary = {"system": ["mwt"], "model": ["vgg16", "simcnn"], "w_cohesion": [0.1, 0.2], "seed": [0, 1]}
    stages = {"look": {"only": {"model": "simcnn"}}, "more": {"only": {"seed": 1}}}
    spec = check_study("s", {"vary": vary, "stages": stages})
    kept = thinned(study_cells({"s": spec}, "s"))
    models = [cell.train["model"] for cell in kept]
    assert models.count("vgg16") == 4, "both weights, with the stage of seed 1 and without"
    assert {(cell.train["model"], *cell.stages) for cell in kept} == {
        ("vgg16",), ("vgg16", "more"), ("simcnn", "look"), ("simcnn", "look", "more")}


# The command


@pytest.mark.parametrize("words, message", [
    (["smok"], "no study 'smok'. Did you mean 'smoke'"),
    (["mwt_tabel4"], "Did you mean 'mwt_table4'"),
    (["smoke", "--jobs", "0"], "--jobs must be at least 1"),
    (["smoke", "--cells", "-1"], "--cells must be at least 0"),
    (["smoke", "--experiments", "nowhere"], "--experiments FOLDER"),
])
def test_wrong_commands_start_nothing(words, message, tmp_path, capsys):
    assert main(["rehearse", *words, "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_rehearsals_and_runs_never_share_a_folder(tmp_path, capsys):
    (tmp_path / "runs/networks").mkdir(parents=True)
    folder = toys(tmp_path / "e", TOY)
    words = ["--experiments", str(folder), "--runs", str(tmp_path / "runs")]
    assert main(["rehearse", "b", *words]) == 2 and "is not of a rehearsal" in capsys.readouterr().err
    (tmp_path / "runs/networks").rmdir()
    (tmp_path / "runs" / REHEARSAL).write_text("{}")
    assert main(["run", "b", *words, "--gpus", "0"]) == 2 and "holds a rehearsal" in capsys.readouterr().err
    assert not (folder / "log").exists()


def test_a_failing_study_fails_and_goes_on_after_the_repair(tmp_path, capsys):
    folder, words = toys(tmp_path / "e", TOY, "raise OSError('no more paper')"), ["--runs", str(tmp_path / "runs")]
    words = ["rehearse", "a,b", "--experiments", str(folder), *words]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "FAILED a" in said and "look.ipynb, cell [5]: OSError: no more paper" in said
    assert "a: 1 of 3 cells" in said and said.splitlines()[-1].startswith("steps: 1 done, 0 kept, 1 failed, 0 skipped")
    assert "no more paper" in next((tmp_path / "runs").glob("a/*/look/look.log")).read_text()
    toys(folder, TOY)
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("steps: 1 done, 1 kept, 0 failed")
    with pytest.raises(ValueError, match="no results"): read_rows(tmp_path / "runs")
    lines = [line.split(",")[:3] for line in (tmp_path / "runs" / SECONDS).read_text().splitlines()]
    assert ["a", "look"] in [[line[0], line[2]] for line in lines] and lines[0] == ["study", "cell", "stage"]


def test_a_table_with_an_empty_cell_fails(tmp_path, capsys):
    matrix = "studies:\n  a: {fills: [mwt_table2], vary: {seed: [0]}, train: {model: vgg16}}\n"
    folder = toys(tmp_path / "e", matrix)
    assert main(["rehearse", "mwt_table2", "--experiments", str(folder), "--runs", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().out
    assert "mwt_table2" in said and "EMPTY" in said and "no row of" in said and "0 failed" in said.splitlines()[-1]


def test_a_killed_rehearsal_goes_on(tmp_path):
    look = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)"
    folder, places = toys(tmp_path / "e", TOY, look), ["--runs", str(tmp_path / "runs")]
    words = [sys.executable, "-m", "modnb.lab.commands", "rehearse", "a", "--experiments", str(folder), *places]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    state = tmp_path / "runs" / REHEARSAL
    begun = lambda: (folder / "log").exists() and len(finished(folder)) == 2
    while process.poll() is None and not begun(): time.sleep(0.05)
    assert "rows_train.csv" in state.read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "go").touch()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("steps: 1 done, 1 kept, 0 failed")
    assert finished(folder).count("look") == 2 and len(finished(folder)) == 3, "the training once, the stage twice"


def test_a_process_that_dies_takes_nobody_along(tmp_path):
    texts = {"dies": "os.kill(os.getpid(), 9)", "lives": "open('lives.txt', 'w').close()", "forgets": "pass"}
    write = lambda name: notebook(tmp_path / f"{name}.ipynb", "x = 0 # number", "import os", texts[name])
    jobs = [Job("s", "", name, write(name), {}, (f"{name}.txt",)) for name in texts]
    found = {one.job.stage: one for one in play_jobs(jobs, tmp_path, workers=2)}
    assert {name: one.state for name, one in found.items()} == {"dies": "failed", "lives": "done", "forgets": "failed"}
    assert "exit code -9" in found["dies"].error and "did not write forgets.txt" in found["forgets"].error


def test_parameters_are_put_in_as_papermill_does(tmp_path):
    path = notebook(tmp_path / "x.ipynb", "size = 3 # a number\nname = '' # a text", "size")
    assert code_cells(path, {"size": 4, "name": "a'b"})[1:] == ["# Parameters\nsize = 4\nname = \"a'b\"", "size"]


# Published studies


def kinds(study: str) -> set[str]:
    "What the first cell of a study runs, on which data set, and who reports"
    cell = study_cells(MATRIX, study, DEFAULTS["train"])[0]
    return {cell.train["dataset"], MATRIX[study]["report"], *map(stage_notebook, cell.stages)}


def test_one_cell_of_every_kind_of_published_study_goes_through(tmp_path):
    "Short studies first; one that has nothing new is left to `modnb rehearse all`"
    published, seen = [study for study, spec in MATRIX.items() if spec["fills"]], set()
    chosen = [study for study in sorted(published, key=lambda name: len(MATRIX[name]["stages"]))
              if kinds(study) - seen and not seen.update(kinds(study))]
    assert seen == set.union(*map(kinds, published)) and 4 <= len(chosen) <= len(published)
    words = ["rehearse", ",".join(chosen), "--cells", "1", "--runs", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "modnb.lab.commands", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{study}: 1 of " in done.stdout for study in chosen)
    assert ", 0 failed, 0 skipped" in done.stdout.splitlines()[-1]
    shutil.rmtree(tmp_path / "runs")
