"""Two processes that share each batch compute the loss and the gradient of one process that has it all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modnb.data import ImageData, Split
from modnb.moda.losses import MODA
from modnb.mwt.generators import add_mask_generators
from modnb.mwt.losses import MwT
from modnb.objectives import CrossEntropy
from modnb.settings import Settings
from modnb.similarity import AVERAGES, cosine_losses
from modnb.training import check_group, fit, share_of

OBJECTIVES = {"plain": CrossEntropy, "moda": MODA, "moda by class": lambda: MODA(average="classes"),
              "mwt": lambda: MwT(watch=0), "mwt by class": lambda: MwT(watch=0, average="classes")}


def make(name):
    "No batch norm: its statistics are those of a process's own images, and so would differ"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).double()
    if name.startswith("mwt"): model = add_mask_generators(model, torch.zeros(2, 3, 10, 10).double(), seed=0)
    return model


def batch():
    random = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 3, 0, 0, 0]) # class 3 has one image, and no process has all classes
    return torch.randn(12, 3, 10, 10, generator=random, dtype=torch.float64), labels


def images():
    random = torch.Generator().manual_seed(2)
    split = Split(torch.randint(256, [22, 3, 10, 10], generator=random, dtype=torch.uint8), torch.arange(22) % 4,
                  list("abcd"), (0.5,) * 3, (0.25,) * 3, 1, True)
    return ImageData("made up", list("abcd"), split, split.select([]), split.select([]))


def loss_and_gradients(name, group=None):
    model, (x, labels) = make(name), batch()
    objective = OBJECTIVES[name]().across(group)
    network = objective.prepare(model.train(), x[:2])
    if group is not None: x, labels = share_of(group, x), share_of(group, labels)
    logits, observed = network(x)
    loss, terms = objective(logits, labels, observed)
    return terms, list(torch.autograd.grad(loss, list(model.parameters())))


def train(name, group=None, **options):
    model = make(name).float()
    options = dict(epochs=3, batch_size=8, lr=0.05, device="cpu", evaluate_every=0, precision="float32") | options
    history = fit(model, images(), OBJECTIVES[name](), process_group=group, **options)
    return {"rows": [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows],
            "state": model.state_dict()}


def work(folder):
    "What each of the two processes does"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, found = dist.group.WORLD, {}
    for name in OBJECTIVES:
        terms, gradients = loss_and_gradients(name, group)
        for gradient in gradients: dist.all_reduce(gradient)
        found[name] = {"terms": {k: v.item() for k, v in terms.items()}, "gradients": [g / 2 for g in gradients]}
        found[name] |= {"fit": train(name, group, checkpoint=Path(folder) / f"{name}.ckpt")}
    odd = Settings(epochs=1, batch_size=9, lr=.1)
    try: check_group(group, odd)
    except ValueError as error: found["odd"] = str(error)
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", f"import test_distributed; test_distributed.work({str(folder)!r})"]
    running = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(2)]
    try: assert [process.wait(timeout=600) for process in running] == [0, 0]
    finally:
        for process in running: process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_terms_over_pairs_are_those_of_the_whole_batch(name, two):
    terms, _ = loss_and_gradients(name)
    for term in ("affinity", "dispersion", "cohesion_loss", "coupling_loss"):
        if term not in terms: continue
        for process in two: assert process[name]["terms"][term] == pytest.approx(terms[term].item(), abs=1e-12)
    means = [process[name]["terms"]["cross_entropy"] for process in two]
    assert sum(means) / 2 == pytest.approx(terms["cross_entropy"].item()) and means[0] != means[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_averaged_gradients_are_those_of_the_whole_batch(name, two):
    _, expected = loss_and_gradients(name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected)
    for process in two:
        for found, gradient in zip(process[name]["gradients"], expected, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_of_two_is_the_run_of_one(name, two):
    expected = train(name)
    first, second = (process[name]["fit"] for process in two)
    assert first["rows"] == second["rows"] and len(first["rows"]) == 3
    watched = ("top_prediction", "dead_layers") # of one process's share: neither of them is a mean over images
    for found, row in zip(first["rows"], expected["rows"], strict=True):
        for key in row.keys() - {*watched}: assert found[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key
    for key, value in expected["state"].items():
        assert torch.equal(first["state"][key], second["state"][key])
        torch.testing.assert_close(first["state"][key], value, atol=1e-5, rtol=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(two):
    assert "multiple of the 2 processes" in two[0]["odd"]


def test_a_process_cannot_count_classes_alone():
    rows, labels = [torch.rand(4, 3)], torch.arange(4) % 2
    for average in AVERAGES:
        with pytest.raises(ValueError, match="num_classes"): cosine_losses(rows, labels, average, None, object())
    with pytest.raises(ValueError, match="l1"):
        MODA(compactness_form="l1").across(object())(torch.randn(4, 2), labels, {"a": rows[0]})
