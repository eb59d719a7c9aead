"""`modnb run`, `status` and `report`: plans, kills, failures, many at once, GPUs shared out. The notebooks do nothing.

The crowd has 24 notebooks; MODNB_MANY_RUNS=60 makes it 60."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from modnb.lab.commands import (
    Measured,
    hardware_kind,
    main,
    measured_epochs,
    measured_stages,
    plan_table,
    study_steps,
    timing_key,
)
from modnb.lab.matrix import check_cells, check_study, choose_studies, read_matrix, study_cells
from modnb.lab.published import TABLES
from modnb.lab.results import compare, describe_run, make_rows, read_rows, summarise, write_rows
from modnb.lab.running import NotebookFailed, notebook_parameters, run_notebook
from modnb.locks import Taken, claimed, gpu_slot, is_held

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "nbs/experiments"
MANY = int(os.environ.get("MODNB_MANY_RUNS", 24))
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def notebook(path: Path, parameters: str, *sources: str) -> Path:
    "A notebook whose second cell holds the parameters"
    tags = lambda i: {"tags": ["parameters"]} if i == 1 else {}
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
              "metadata": tags(i)} for i, source in enumerate(["from pathlib import Path", parameters, *sources])]
    path.write_text(json.dumps({"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}))
    return path


def experiments(folder: Path, matrix: str, train: str = "", look: str = "") -> Path:
    "The Snakefile with a training and a stage that write empty files, and a line in `log` for every start"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(EXPERIMENTS / "Snakefile", folder)
    (folder / "matrix.yaml").write_text(matrix)
    note = f"with open({str(folder / 'log')!r}, 'a') as log: log.write(out + '\\n')"
    files = "for name in {}: (Path(out) / name).write_text('')"
    common = "out = ''  # folder\nstudy = ''  # name\n"
    notebook(folder / "train.ipynb", common + "system = ''  # name\nseed = 0  # number\ndevice = ''  # where", note,
             train or "pass", files.format(["rows_train.csv", "model.safetensors"]))
    notebook(folder / "look.ipynb", common + "run = ''  # folder", note, look or "pass", files.format(["rows.csv"]))
    return folder


def modnb(*words: str, folder: Path, **options) -> subprocess.Popen:
    "The command line in a process group of its own"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen([sys.executable, "-m", "modnb.lab.commands", *map(str, words)], cwd=folder, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                            **options)


def finished(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


# Plans


def trained(folder: Path, hardware: str, seconds: float = 10.0, epochs: int = 10, seed: int = 0, **settings) -> None:
    "Rows of a training, in a folder of all runs"
    run = describe_run("s", "plain", "vgg12", "digits", seed, settings | {"epochs": epochs}) | {"hardware": hardware}
    write_rows(folder / f"networks/net{seed}/rows_train.csv", make_rows(run, {"training_time": seconds}, split="train"))


def test_all_is_planned_with_shared_networks_counted_once(tmp_path, capfd):
    trained(tmp_path, "a GPU", width=7.0)
    assert main(["run", "all", "--dry-run", "--runs", str(tmp_path), "--gpus", "0", "--on", "a GPU"]) == 0
    lines = [re.split(r"  +", line) for line in capfd.readouterr().out.splitlines()]
    matrix, defaults = read_matrix(EXPERIMENTS / "matrix.yaml"), notebook_parameters(EXPERIMENTS / "train.ipynb")
    cells = [cell for study in matrix for cell in study_cells(matrix, study, defaults)]
    check_cells(cells, EXPERIMENTS)
    together = next(line for line in lines if line[0] == "together")
    networks = {cell.network for cell in cells if cell.needs_network}
    assert together[1:3] == [str(len(cells)), str(len(networks))] and len(networks) < len(cells)
    assert together[6:] == ["not measured", "not measured"], "no hours are made up"
    assert len({line[0] for line in lines} & set(matrix)) == len(matrix)


def test_hours_by_precision_where_a_plan_names_one(tmp_path):
    settings = {"model": "vgg12", "dataset": "digits", "system": "moda", "epochs": 600, "width": 1.0}
    for seed, (precision, seconds) in enumerate({"float32": 40.0, "bfloat16": 20.0}.items()):
        run = describe_run("s", "moda", "vgg12", "digits", seed, settings | {"epochs": 10, "precision": precision})
        rows = make_rows(run, {"training_time": seconds}, split="train")
        write_rows(tmp_path / f"networks/net{seed}/rows_train.csv", rows)
    epochs, kind = measured_epochs([tmp_path]), hardware_kind(run["hardware"])
    found = [epochs[timing_key(settings | {"precision": precision}, kind)] for precision in ("float32", "bfloat16", "")]
    assert found == [4.0, 2.0, 3.0], "the median of all where it is left open"
    assert timing_key(settings | {"train_limit": 700}, kind) not in epochs, "other images take another time"


def test_hours_come_from_measured_epochs_of_the_same_kind(tmp_path):
    settings = {"width": 1.0, "batch_size": 64}
    for seed, seconds in ((0, 50.0), (1, 70.0)): trained(tmp_path, "a GPU", seconds, seed=seed, **settings)
    epochs = measured_epochs([tmp_path])
    assert list(epochs.values()) == [6.0]
    train = {"model": "vgg12", "dataset": "digits", "system": "plain", "epochs": 600} | settings

    def hours(kind="a GPU", **changes):
        matrix = {"a": check_study("a", {"vary": {"seed": [0, 1]}, "train": train | changes})}
        return plan_table({"a": study_cells(matrix, "a")}, tmp_path / "none", {}, Measured(kind, epochs))[1][6]

    assert hours() == "2"
    for change in ({"kind": "another"}, {"system": "moda"}, {"dataset": "a folder"}, {"width": 0.5},
                   {"dataset": "svhn"}, {"batch_size": 128}, {"train_limit": 719}):
        assert hours(**change) == "not measured", change
    assert hours(precision="") == "2", "left open"
    assert hours(precision="float32") == "not measured", "older rows do not say what it was"
    assert hours(lr=0.3) == "2", "does not change the time"


def test_stages_take_as_long_as_their_like_did(tmp_path):
    "The first cell of a study tells what the others will take, on the same hardware alone"
    matrix = {"a": check_study("a", {"vary": {"system": ["plain", "moda"], "seed": [0, 1, 2]},
                                     "train": {"model": "vgg12", "dataset": "digits"},
                                     "stages": {"search": {"sizes": "2"}, "patch": {"after": {"found": "search"}}}})}
    cells = study_cells(matrix, "a")
    for cell in cells[:2]: # plain
        for stage, seconds in (("search", 1800), ("patch", 360)):
            run = describe_run("a", "plain", "vgg12", "digits", 0, {}) | {"hardware": "a GPU"}
            write_rows(tmp_path / f"a/{cell.name}/{stage}/rows.csv", make_rows(run, {"accuracy": 1.0}))
            book = {"cells": [], "metadata": {"papermill": {"duration": seconds * (1 + cell.train["seed"])}}}
            (tmp_path / f"a/{cell.name}/{stage}/{stage}.ipynb").write_text(json.dumps(book))
    stages, rehearsed = measured_stages(cells, tmp_path, {}), {("a", "patch"): 36.0}
    assert sorted(stages.values()) == [540, 2700], "medians"
    line = lambda **known: plan_table({"a": cells}, tmp_path, {}, Measured(**known))[1]
    assert line(kind="a GPU", stages=stages)[5:] == ["8", "not measured", "0.9 for 2 of 8, others not measured"]
    assert line(kind="another", stages=stages)[7] == "not measured"
    assert line(kind="another", stages=stages, rehearsed=rehearsed)[7] == (
        "not measured; in a rehearsal 0.04 for 4 of those")
    assert line(kind="a GPU", stages=stages, rehearsed=rehearsed)[7] == (
        "0.9 for 2 of 8, others not measured; in a rehearsal 0.03 for 3 of those")
    (tmp_path / f"a/{cells[0].name}/search/search.ipynb").write_text("{}")
    assert sorted(measured_stages(cells, tmp_path, {}).values()) == [540, 3600], "some notebook does not say"


@pytest.mark.parametrize("words, message", [
    (["--on", "NVIDIA H20"], "no hardware with measured epochs 'NVIDIA H20'. Did you mean 'NVIDIA H200'? There is: "),
    (["--rehearsed", "nowhere.csv"], "--rehearsed nowhere.csv: there is no nowhere.csv to read"),
    (["--rehearsed", "README.md"], "study, cell, stage, seconds are expected as columns"),
])
def test_costs_of_what_is_not_there(words, message, tmp_path, capsys, monkeypatch):
    trained(tmp_path, "NVIDIA H200")
    monkeypatch.chdir(ROOT)
    assert main(["run", "smoke", "--dry-run", "--runs", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_plan_for_another_gpu(tmp_path, capsys):
    "From any machine; without --on the plan says which hardware rows name"
    trained(tmp_path, "NVIDIA H200", 100.0, 10, width=0.125, train_limit=400, test_limit=200, valid=0.2)
    plan = ["run", "smoke", "--dry-run", "--gpus", "0", "--runs", str(tmp_path)]
    assert main([*plan, "--on", "NVIDIA H200"]) == 0
    said = capsys.readouterr().out
    assert "hours of training on NVIDIA H200" in said and "for 1 of 4, others not measured" in said
    assert main(plan) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200" not in said.splitlines()[0]


def test_every_published_table_has_its_study():
    matrix = read_matrix(EXPERIMENTS / "matrix.yaml")
    filled = {name for study in matrix.values() for name in study["fills"]}
    assert set(TABLES) - filled == {"mwt_table1"}, "which lists settings"
    assert {name for name in filled if "_table" in name} <= set(TABLES)
    assert choose_studies(matrix, "mwt_figure6,headline,mwt_weights") == ["mwt_weights", "headline"]


@pytest.mark.parametrize("words, message", [
    (["run", "smok"], "no study 'smok'. Did you mean 'smoke'"),
    (["run", "mwt_tabel4"], "Did you mean 'mwt_table4'"),
    (["status", "demos"], "no study 'demos'"),
    (["run", "smoke", "--per-gpu", "0"], "--per-gpu must be at least 1"),
    (["run", "smoke", "--jobs", "0"], "--jobs must be at least 1"),
    (["run", "smoke", "--gpus", "two"], "GPUs are a number"),
    (["run", "smoke", "--on", "a GPU"], "--on and --rehearsed are for plans: add --dry-run"),
    (["status", "smoke", "--", "--cores", "2"], "only `modnb run` passes words on"),
    (["run", "smoke", "--experiments", "nowhere"], "--experiments FOLDER"),
    (["report", "smoke"], "nothing was run yet"),
])
def test_wrong_commands_start_nothing(words, message, tmp_path, capsys):
    cut = words.index("--") if "--" in words else len(words)
    assert main([*words[:cut], "--runs", str(tmp_path / "runs"), *words[cut:]]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("matrix, message", [
    ("studies:\n  a:\n    vary: {seed: [0, 1}\n", "matrix.yaml, line 3"),
    ("studies: {a: {}}\nprofile: {b: 1}\n", "unknown profile"),
    ("studies: {a: {train: {sed: 1}}}", "train.ipynb has no parameter 'sed'. Did you mean 'seed'"),
    ("studies: {a: {train: {seed: one}}}", "parameter 'seed' is 'one'"),
    ("studies: {a: {stages: {lok: {}}}}", "no notebook for the stage 'lok'; there is look, train"),
    ("studies: {a: {stages: {look: {system: x}}}}", "look.ipynb has no parameter 'system'"),
])
def test_a_wrong_matrix_is_refused(matrix, message, tmp_path, capsys):
    folder = experiments(tmp_path / "e", matrix)
    assert main(["run", "a", "--dry-run", "--experiments", str(folder), "--runs", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_stops_its_cell(tmp_path):
    with pytest.raises(NotebookFailed, match="no model 'vgg61'"):
        run_notebook(EXPERIMENTS / "train.ipynb", tmp_path / "x.ipynb", {"model": "vgg61", "train_limit": 100})


@pytest.fixture(scope="module")
def options_of_snakemake() -> set[str]:
    snakemake = Path(sys.executable).parent / "snakemake"
    helped = subprocess.run([snakemake, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--([a-z][a-z-]+)", helped))


@pytest.mark.parametrize("name", ["local", "slurm", "kubernetes"])
def test_profiles_name_options_of_snakemake(name, options_of_snakemake):
    content = yaml.safe_load((EXPERIMENTS / f"profiles/{name}/config.yaml").read_text())
    of_plugins = {key for key in content if key.startswith(f"{content.get('executor')}-")}
    unknown = set(content) - options_of_snakemake - of_plugins
    assert content and not unknown, unknown
    assert content["keep-going"] and content["rerun-incomplete"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    "A kubectl that keeps what it is given, and a function that calls the job program of the Kubernetes profile"
    program = tmp_path / "bin/kubectl"
    program.parent.mkdir()
    program.write_text(f"""#!{sys.executable}
import pathlib, sys
folder = pathlib.Path({str(tmp_path)!r})
if "create" in sys.argv: (folder / "given.json").write_text(sys.stdin.read()); print("modnb-abc")
if "get" in sys.argv: print((folder / "job.json").read_text())
(folder / "words").write_text(" ".join(sys.argv[1:]))
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in (("IMAGE", "modnb:1"), ("CLAIM", "runs"), ("SHARED", "/shared"), ("NAMESPACE", "lab")):
        monkeypatch.setenv(f"MODNB_{name}", value)
    job = EXPERIMENTS / "profiles/kubernetes/job.py"
    return lambda *words: subprocess.run([sys.executable, job, *words], capture_output=True, text=True)


def test_kubernetes_jobs(cluster, tmp_path, monkeypatch):
    made = cluster("submit", "1", "16000", "some script.sh")
    assert (made.returncode, made.stdout.strip()) == (0, "modnb-abc"), made.stderr
    pod = json.loads((tmp_path / "given.json").read_text())["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == "modnb:1" and container["command"] == ["bash", str(Path("some script.sh").resolve())]
    assert container["resources"]["limits"] == {"memory": "16000Mi", "nvidia.com/gpu": "1"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"} and pod["restartPolicy"] == "Never"
    states = {"": "failed", '{"status": {"active": 1}}': "running", '{"status": {"succeeded": 1}}': "success",
              '{"status": {"failed": 1}}': "failed", "{}": "running",
              '{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}': "failed"}
    for answer, state in states.items():
        (tmp_path / "job.json").write_text(answer)
        assert cluster("status", "modnb-abc").stdout.strip() == state, answer
    assert cluster("cancel", "a", "b").returncode == 0
    assert (tmp_path / "words").read_text() == "--namespace lab delete job --ignore-not-found a b"
    monkeypatch.delenv("MODNB_CLAIM")
    refused = cluster("submit", "1", "16000", "script.sh")
    assert refused.returncode and "MODNB_CLAIM is not set" in refused.stderr
    assert cluster("start").returncode and "job.py submit" in cluster("start").stderr


def test_the_local_profile_plans(tmp_path):
    words = ["run", "smoke", "--dry-run", "--runs", str(tmp_path / "runs")]
    assert main([*words, "--", "--profile", str(EXPERIMENTS / "profiles/local")]) == 0


# Running


def test_a_killed_study_goes_on_and_repeats_nothing(tmp_path):
    matrix = "studies: {a: {vary: {system: [x], seed: [0, 1, 2]}, stages: {look: {}}}}"
    hold = f"import time\nwhile seed and not Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.1)"
    folder, runs = experiments(tmp_path / "e", matrix, train=hold), tmp_path / "my runs"
    words = ["run", "a", "--experiments", folder, "--runs", runs, "--jobs", "3", "--gpus", "0"]
    first = modnb(*words, folder=tmp_path)
    cells = study_cells(read_matrix(folder / "matrix.yaml"), "a", notebook_parameters(folder / "train.ipynb"))
    state = lambda: Counter(step.state for step in study_steps(cells, runs))
    for _ in range(1200):
        marked = len(list((runs / ".snakemake/incomplete").glob("*")))  # Snakemake has seen the others end
        if state()["done"] == 2 and state()["running"] == 2 and len(finished(folder)) == 4 and marked == 4: break
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    second = modnb(*words, folder=tmp_path)
    assert second.wait() == 3 and "is being worked on by process" in second.stdout.read()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    for _ in range(100):
        if not state()["running"]: break
        time.sleep(0.1)
    assert state() == {"done": 2, "stopped": 2, "missing": 2}
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.suffix in (".csv", ".safetensors")}
    (tmp_path / "go").touch()
    again = modnb(*words, folder=tmp_path)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert "a: 3 of 3 cells done" in said
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items()), "what was done stays as it was"
    starts = Counter(finished(folder))
    assert sorted(starts.values()) == [1, 1, 1, 1, 2, 2], "the two that were cut short ran twice, the others once"
    assert not list(runs.rglob(".*.running")) and not (runs / ".modnb-run").exists()
    assert modnb(*words, "--dry-run", folder=tmp_path).communicate()[0].splitlines()[1].split()[:6] == \
        ["a", "3", "3", "0", "3", "0"]


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path, capsys):
    matrix = "studies: {a: {vary: {system: [x], seed: [0, 1, 2]}, stages: {look: {}}}}"
    folder, runs = experiments(tmp_path / "e", matrix, train="1 / (1 - seed)"), tmp_path / "runs"
    words = ["--experiments", str(folder), "--runs", str(runs)]
    ran = modnb("run", "a", *words, "--jobs", "3", folder=tmp_path)
    said = ran.communicate()[0]
    assert ran.returncode == 1 and "a: 2 of 3 cells done; of 6 steps 4 done, 1 failed, 1 missing" in said
    assert main(["status", "a", *words]) == 1
    told = capsys.readouterr().out
    assert "failed   x-seed1, train: ZeroDivisionError: division by zero" in told
    kept = Path(next(line.strip() for line in told.splitlines() if line.strip().endswith("train.ipynb")))
    assert "ZeroDivisionError" in kept.read_text() and "x-seed2" not in told


def one_of_a_crowd(folder: Path, number: int) -> None:
    out = folder / f"runs/{number}"
    run_notebook(folder / "small.ipynb", out / "small.ipynb", {"number": number, "out": str(out)})


def test_a_crowd_of_notebooks_four_at_a_time(tmp_path):
    "None fails, none collides: every one leaves its own number in its own folder"
    work = "(Path(out)/'n').write_text(str(number))"
    notebook(tmp_path / "small.ipynb", "number = 0  # which\nout = ''  # folder", work)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        failed = [done.exception() for done in [pool.submit(one_of_a_crowd, tmp_path, n) for n in range(MANY)]]
    assert [error for error in failed if error] == []
    assert [(tmp_path / f"runs/{number}/n").read_text() for number in range(MANY)] == [str(n) for n in range(MANY)]


def test_two_runs_of_one_folder(tmp_path):
    "The second is refused and changes nothing, whichever notebook it is"
    notebook(tmp_path / "a.ipynb", "out = ''  # folder", "(Path(out)/'rows.csv').write_text('a')")
    notebook(tmp_path / "b.ipynb", "out = ''  # folder", "(Path(out)/'rows.csv').write_text('b')")
    out = tmp_path / "out"
    run_notebook(tmp_path / "a.ipynb", out / "a.ipynb", {"out": str(out)})
    before = {path: path.read_bytes() for path in out.iterdir()}
    with claimed(out / ".running"):
        for name in "ab":
            with pytest.raises(Taken, match=r"out is being worked on by process \d+ on "):
                run_notebook(tmp_path / f"{name}.ipynb", out / f"{name}.ipynb", {"out": str(out)})
        command = [sys.executable, "-m", "modnb.lab.running", tmp_path / "b.ipynb", out / "b.ipynb", "-p", "out", out]
        assert subprocess.run(command, capture_output=True).returncode == 3
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    run_notebook(tmp_path / "b.ipynb", out / "b.ipynb", {"out": str(out)})
    assert (out / "rows.csv").read_text() == "b" and not is_held(out / ".running")


# GPUs


def test_gpus_are_shared_out_and_given_back(tmp_path):
    "Six runs, two GPUs with two places each: never more than two on one, each sees one GPU, both are used"
    text = "device = ''  # where\nout = ''  # folder"
    work = ("import os, time\nstart = time.time()\ntime.sleep(1.5)\n"
            "(Path(out)/'n').write_text(f\"{os.environ['CUDA_VISIBLE_DEVICES']} {start} {time.time()}\")")
    notebook(tmp_path / "small.ipynb", text, work)
    shared = os.environ | {"MODNB_GPUS": "2", "MODNB_PER_GPU": "2", "MODNB_SLOTS": str(tmp_path / "slots")}
    shared.pop("CUDA_VISIBLE_DEVICES", None)

    def one(number):
        out = tmp_path / str(number)
        command = ["-m", "modnb.lab.running", tmp_path / "small.ipynb", out / "small.ipynb", "-p", "out", out]
        return subprocess.run([sys.executable, *command], env=shared, capture_output=True, text=True)

    with ThreadPoolExecutor(6) as pool: ran = list(pool.map(one, range(6)))
    assert [r.stderr for r in ran if r.returncode] == []
    times = [(tmp_path / f"{number}/n").read_text().split() for number in range(6)]
    assert {gpu for gpu, *_ in times} == {"0", "1"}
    for gpu, start, _ in times:
        beside = [t for t in times if t[0] == gpu and float(t[1]) <= float(start) < float(t[2])]
        assert len(beside) <= 2, f"{len(beside)} at once on GPU {gpu}"
    assert not [path for path in (tmp_path / "slots").rglob("gpu*") if is_held(path)]


def test_a_crashed_run_frees_its_slot(tmp_path):
    program = ("import sys, time; from modnb.locks import gpu_slot\n"
               "with gpu_slot(sys.argv[1], ['0']): print('held', flush=True); time.sleep(600)")
    holding = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holding.stdout.readline() == "held\n"
    with pytest.raises(Taken, match="all 1 slots of 1 GPUs are taken"):
        gpu_slot(tmp_path, ["0"], patience=0).__enter__()
    holding.kill()
    holding.wait()
    with gpu_slot(tmp_path, ["0"], patience=5) as gpu: assert gpu == "0"


def test_notebooks_without_a_device_need_no_gpu(tmp_path, monkeypatch):
    notebook(tmp_path / "report.ipynb", "runs = ''  # folder", "1 + 1")
    monkeypatch.setenv("MODNB_GPUS", "1")
    monkeypatch.setenv("MODNB_SLOTS", str(tmp_path / "slots"))
    run_notebook(tmp_path / "report.ipynb", tmp_path / "out.ipynb")
    assert not (tmp_path / "slots").exists()


# Tables


def measured(value, seed=0, metric="accuracy", hardware="a CPU", **config):
    run = describe_run("s", "plain", "vgg16", "cifar10", seed, {"lr": 0.1} | config)
    return make_rows(run | {"hardware": hardware}, {metric: value})


def test_different_settings_never_share_a_cell(tmp_path):
    cell = ["system", "metric"]
    mixed = read_rows(write_rows(tmp_path / "a.csv", measured(0.9) + measured(0.8, seed=1, lr=0.2)))
    with pytest.raises(ValueError, match=r"system plain, metric accuracy\): lr 0.1 and 0.2"): summarise(mixed, cell)
    with pytest.raises(ValueError, match="would be mixed"): compare(mixed, [("accuracy", "accuracy", 0)])
    assert summarise(mixed, cell, may_differ=["lr"])["mean"].tolist() == pytest.approx([0.85])
    assert summarise(mixed, cell, may_differ=None)["n"].tolist() == [2]
    assert compare(mixed, [("other", "coupling", 0)]).loc["other", "plain"] == "", "only what is shown has to fit"
    stages = read_rows(write_rows(tmp_path / "b.csv", measured(0.9) + measured(0.8, seed=1, tune_epochs=3)))
    assert summarise(stages, cell)["n"].tolist() == [2], "a setting that one stage alone records contradicts nothing"
    machines = measured(3.0, metric="training_time") + measured(9.0, 1, "training_time", "a GPU")
    with pytest.raises(ValueError, match="hardware a CPU and a GPU"):
        summarise(read_rows(write_rows(tmp_path / "c.csv", machines)), cell)
    accuracies = read_rows(write_rows(tmp_path / "d.csv", measured(0.9) + measured(0.8, 1, hardware="a GPU")))
    assert summarise(accuracies, cell)["n"].tolist() == [2], "an accuracy is one on any machine"


def test_a_report_needs_nothing_else(tmp_path):
    kept = sorted((ROOT / "results").glob("*.csv"))
    out = tmp_path / "report"
    assert main(["report", *map(str, kept[:1]), "--out", str(out)]) == 0
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "data:image/png;base64," in page and not re.search(r'(src|href)="(?!data:)', page)
    assert "NOT THE SAME EXPERIMENT" in page and "NOT THE SAME EXPERIMENT" in text
    study = read_rows(kept[0]).study[0]
    pictures = re.findall(r"\((figure\d+.png)\)", text)
    assert f"## Study {study}" in text and pictures and all((out / name).is_file() for name in pictures)
