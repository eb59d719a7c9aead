"""`modnb check`: what it tells, that it notices loops that disagree, and that a compiler that fails stops nothing."""

import json
import os
import platform
import re
import subprocess
import sys
import warnings

import pytest
import torch

from modnb.data import load_dataset
from modnb.lab import check
from modnb.lab.commands import main
from modnb.models import create_model
from modnb.training import fit

ROWS = {"system", "loop", "network", "batch_size", "precision", "losses", "images_per_second", "peak_mib", "warnings"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def not_compiled(monkeypatch):
    "Compiling takes longer than all the rest"
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_a_report_has_what_a_bug_report_needs(not_compiled, tmp_path, capsys):
    assert main(["check", "--device", "cpu", "--out", str(tmp_path / "check.json")]) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "check.json").read_text())
    assert report["agree"] and not report["complaints"] and "The loops agree." in said
    for name in ("modnb", "python", "torch", "system", "processor", "memory"):
        assert report["machine"][name] and f"{name} " in said
    assert {"device", "precision", "layout", "compile"} <= report["choices"].keys()
    assert report["choices"]["device"] == "cpu: asked for" and report["graphs"] == "only on CUDA"
    assert torch.__version__ in said and platform.node() not in said.split()
    seen = {(ran["system"], ran["loop"]) for ran in report["loops"]}
    assert {(system, loop) for system in ("plain", "moda", "mwt") for loop in ("plain", "float32", "fast")} < seen
    assert ("plain", "compiled") in seen
    for ran in report["loops"]:
        assert ROWS <= ran.keys() and len(ran["losses"]) == check.STEPS and ran["images_per_second"] > 0
        assert ran["loop"] == "plain" or 0 <= ran["first_apart"] <= ran["apart"] <= ran["limits"][1]


@pytest.mark.parametrize("words, message", [
    (["--device", "cdua"], "no device 'cdua'. There is: cpu"),
    (["--device", "cuda:99"], "no device 'cuda:99'. There is: cpu"),
    (["--out", "nowhere/at/all.json"], "there is no folder 'nowhere/at'"),
    (["--out", "."], "--out .: is a folder, not a file"),
    (["--", "--cores", "2"], "only `modnb run` passes words on"),
])
def test_wrong_words_try_nothing(words, message, capsys, monkeypatch):
    monkeypatch.setattr(check, "try_loops", lambda data: pytest.fail("something was tried"))
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change, complaint", [
    ({"lr": 0.5}, r"DISAGREES: moda, float32 loop in float32: ten steps \d.\de[+-]\d\d apart, 3e-02 allowed"),
    ({"lr": -1.0}, r"DISAGREES: moda, float32: ValueError: lr must be a number"),
])
def test_loops_that_disagree_are_named(change, complaint, not_compiled, monkeypatch, capsys):
    take = check.take_steps
    monkeypatch.setattr(check, "SYSTEMS", {"moda": check.SYSTEMS["moda"]})
    monkeypatch.setattr(check, "take_steps", lambda task, system, data, **knobs:
                        take(task, system, data, **knobs | ({} if knobs == {"fast": False} else change)))
    assert main(["check", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert re.search(complaint, said) and "The loops agree" not in said


def test_a_forward_pass_that_is_wrong_shows_in_the_first_step(monkeypatch):
    data = load_dataset("digits", image_size=check.SIDE, device="cpu")
    good = check.take_steps(check.LEAST, "plain", data, fast=False)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda layer, x, was=torch.nn.Conv2d.forward: was(layer, x) * 1.05)
    bad = check.take_steps(check.LEAST, "plain", data, precision="float32", compile=False)
    first, _ = check.distances(bad["losses"], good["losses"])
    assert first > check.LIMITS["float32"][0]


def test_losses_that_are_not_finite_never_agree():
    for losses in ([2.0, float("nan")], [float("inf"), 1.0], [2.0, -float("inf")]):
        assert check.distances(losses, [2.0, 1.0])[1] == float("inf")


# A compiler that fails


@pytest.mark.parametrize("when", ["at once", "at the first call", "in the third step"])
def test_training_goes_on_uncompiled_with_one_warning(when, monkeypatch):
    data, steps = load_dataset("digits", device="cpu"), []

    def broken(function, **options):
        if when == "at once": raise RuntimeError("no compiler here")
        def call(*arguments):
            steps.append(1)
            if when == "at the first call" or len(steps) == 3: raise KeyError("no compiler here")
            return function(*arguments)
        return call

    monkeypatch.setattr(torch, "compile", broken)
    model = create_model("lenet5", image_size=16, seed=0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        history = fit(model, data, epochs=2, batch_size=128, lr=0.05, device="cpu", compile=True)
    assert ["no compiler here" in str(warning.message) for warning in told] == [True]
    assert len(history) == 2 and history.last["loss"] < history.rows[0]["loss"]


def test_without_a_c_compiler_the_check_ends_well(tmp_path):
    "The real compiler, that finds no g++: told in the report, and no reason to fail"
    code = ("import torch\nfrom modnb.lab import check\ntorch.set_num_threads(1)\n"
            "check.SYSTEMS = {'plain': check.SYSTEMS['plain']}\ncheck.SMALL = check.LEAST\n"
            "report = check.check_machine('cpu')\nprint(check.report_text(report))\n"
            "assert report['agree'], report['complaints']\nassert report['loops'][-1]['compiled'] is False")
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert ran.stdout.count("training goes on without torch.compile") == 1 and "The loops agree." in ran.stdout
