"Properties of the training loop: repeatable, resumable, honest about failure, the same as a loop written by hand."

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import modnb.devices
import modnb.files
import modnb.training
from modnb.checkpoints import History, load_checkpoint, read_checkpoint
from modnb.data import ImageData, Split, batches, load_dataset
from modnb.devices import training_precision
from modnb.files import load_tensors, save_tensors
from modnb.locks import Taken, claimed_file
from modnb.models import create_model
from modnb.objectives import COLUMNS, CrossEntropy, Objective, Unobserved, WeightedTerms, rise
from modnb.prediction import evaluate, predict
from modnb.progress import wants_progress
from modnb.settings import SCHEDULES, Settings, epoch_seed, learning_rates
from modnb.training import Loop, TrainingDiverged, count_steps, fit, forward_pass, make_optimizer, run_epoch
from modnb.units import observe


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=8, valid=0.2, device="cpu")


@pytest.fixture
def few(data):
    return small(data, 100)


def small(data, images):
    return ImageData("few", data.classes, data.train.select(range(images)), data.valid.select(range(20)), data.test)


def make_net(seed=0, classes=10):
    "A convolution with everything that has state or chance: batch norm, dropout."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes))


def train(model, data, objective=None, **knobs):
    return fit(model, data, objective, **dict(epochs=4, batch_size=32, device="cpu", precision="float32") | knobs)


def same(one, other):
    "The two models have the same weights and statistics, bit for bit."
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_time(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]


class StopsIn(CrossEntropy):
    "Cross-entropy that raises an error at the first batch of an epoch."

    def __init__(self, epoch, steps, error=RuntimeError):
        super().__init__()
        self._left, self._error = (epoch - 1) * steps, error

    def __call__(self, logits, labels, observed):
        self._left -= 1
        if self._left < 0: raise self._error("stopped")
        return super().__call__(logits, labels, observed)


# The recipe against torch


def torch_schedule(make, lr, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(1, 200), lr=st.floats(1e-4, 1))
def test_cosine_is_torchs(epochs, lr):
    knobs = Settings(epochs=epochs, lr=lr)
    ours = [learning_rates(knobs, epoch, 1)[0] for epoch in range(1, epochs + 1)]
    make = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    assert ours == pytest.approx(torch_schedule(make, lr, epochs), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(epochs=st.integers(1, 12), steps=st.integers(1, 20), lr=st.floats(1e-4, 1))
def test_onecycle_is_torchs(epochs, steps, lr):
    knobs = Settings(epochs=epochs, lr=lr, schedule="onecycle")
    ours = [rate for epoch in range(1, epochs + 1) for rate in learning_rates(knobs, epoch, steps)]
    make = lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=epochs * steps, pct_start=0.3, cycle_momentum=False)
    assert ours == pytest.approx(torch_schedule(make, lr, epochs * steps), rel=1e-6, abs=1e-9)


def test_steps_fall_at_60_and_120_of_200():
    ours = [SCHEDULES["steps"](epoch, 200) for epoch in range(200)]
    make = lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 120])
    assert ours == pytest.approx(torch_schedule(make, 1.0, 200))


@given(schedule=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 1000), data=st.data())
def test_a_schedule_is_a_fraction(schedule, steps, data):
    assert 0 <= SCHEDULES[schedule](data.draw(st.integers(0, steps - 1)), steps) <= 1 + 1e-12


def test_cosine_by_batch_is_finer_than_by_epoch():
    by_epoch = learning_rates(Settings(), 100, 5)
    by_batch = learning_rates(Settings(schedule_step="batch"), 100, 5)
    assert len({*by_epoch}) == 1 and by_batch[0] == pytest.approx(by_epoch[0])
    assert by_batch == sorted(by_batch, reverse=True) and len({*by_batch}) == 5


@pytest.mark.parametrize("channels_last", [False, True])
def test_fit_is_the_loop_written_by_hand(few, channels_last):
    ours, hand = make_net(), make_net()
    history = train(ours, few, weight_decay=1e-3, max_norm=0.5, seed=3, channels_last=channels_last)
    if channels_last: hand.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(hand.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for epoch in range(1, 5):
        order = torch.Generator().manual_seed(epoch_seed(3, epoch, "order"))
        with torch.random.fork_rng():
            torch.manual_seed(epoch_seed(3, epoch, "dropout"))
            for x, y in batches(few.train, 32, augment=True, shuffle=True, generator=order):
                optimizer.zero_grad()
                F.cross_entropy(hand(x), y).backward()
                nn.utils.clip_grad_norm_(hand.parameters(), 0.5)
                optimizer.step()
        assert history.rows[epoch - 1]["lr"] == pytest.approx(scheduler.get_last_lr()[0])
        scheduler.step()
    for name, value in hand.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


# Precision


def test_precision_is_that_of_the_processor_unless_told(few, tmp_path, monkeypatch):
    "bfloat16 where it has instructions for it, not in groups or for small images; accuracies stay float32"
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 10))
    for able in (True, False):
        monkeypatch.setattr(modnb.devices, "has_bfloat16", lambda device, able=able: able)
        assert training_precision(torch.device("cpu"), make_net()) == ("bfloat16" if able else "float32")
        assert training_precision(torch.device("cpu"), grouped) == "float32"
        assert training_precision(torch.device("cpu"), make_net(), side=16) == "float32"
    monkeypatch.setattr(modnb.devices, "has_bfloat16", lambda device: True)
    train(make_net(), few, precision=None, epochs=1, checkpoint=tmp_path / "run") # digits of 16 pixels
    assert read_checkpoint(tmp_path / "run").run["precision"] == "float32"
    model = make_net()
    row = train(model, few, precision="bfloat16", epochs=2).last
    assert row["valid_accuracy"] == evaluate(model, few.valid, precision="float32")
    exact = train(make_net(), few, epochs=2).last["loss"]
    assert row["loss"] != exact and row["loss"] == pytest.approx(exact, rel=0.05)


def test_bfloat16_without_instructions_works_with_a_warning(few, tmp_path, monkeypatch):
    monkeypatch.setattr(modnb.devices, "has_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="no instructions for it"):
        train(make_net(), few, precision="bfloat16", epochs=1, checkpoint=tmp_path / "run")
    assert read_checkpoint(tmp_path / "run").run["precision"] == "bfloat16"


# What is recorded


def test_rows_are_means_over_the_images(few):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    row = train(model, few, epochs=1, lr=1e-9, batch_size=64, augment=False).last # batches of 64 and 36
    logits, labels = predict(model, few.train), few.train.labels
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["train_accuracy"] == (logits.argmax(1) == labels).sum().item() / 100
    assert row["valid_accuracy"] == evaluate(model, few.valid)
    assert [*row] == ["epoch", "lr", "loss", "cross_entropy", "train_accuracy", "seconds", "valid_accuracy"]


class SmallActivations(Objective):
    def __init__(self, weight=0.1): self.weight = weight

    def prepare(self, model, example): return observe(model, ["2"])

    def __call__(self, logits, labels, observed):
        terms = {"cross_entropy": F.cross_entropy(logits, labels), "size": observed["2"].abs().mean()}
        return terms["cross_entropy"] + self.weight * terms["size"], terms


def test_a_custom_objective_changes_the_training_and_is_recorded(few):
    rows = {weight: train(make_net(), few, SmallActivations(weight), augment=False).last for weight in (0.0, 10.0)}
    for weight, row in rows.items():
        assert row["loss"] == pytest.approx(row["cross_entropy"] + weight * row["size"], rel=1e-5)
    assert rows[10.0]["size"] < 0.7 * rows[0.0]["size"]


def test_the_network_is_prepared_once_in_training_mode_with_the_seed(few):
    calls = []

    class Spy(CrossEntropy):
        def prepare(self, model, example):
            calls.append((model.training, tuple(example.shape), torch.rand(1).item()))
            return super().prepare(model, example)

    for seed in (0, 0, 1): train(make_net(), few, Spy(), epochs=1, seed=seed)
    assert [call[:2] for call in calls] == [(True, (2, 3, 8, 8))] * 3
    assert calls[0] == calls[1] != calls[2]


def test_label_smoothing_is_torchs():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
    loss, terms = CrossEntropy(0.2)(logits, labels, {})
    assert torch.equal(loss, F.cross_entropy(logits, labels, label_smoothing=0.2)) and [*terms] == ["cross_entropy"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.floats(0, 5), min_size=1, max_size=3), st.floats(0.1, 1), st.integers(1, 9))
def test_weighted_terms_are_added_by_hand(seed, weights, warmup, epoch):
    random = torch.Generator().manual_seed(seed)
    terms = dict(zip("abc", torch.rand(len(weights), generator=random)))
    terms["cross_entropy"] = torch.rand((), generator=random)
    chosen = dict(zip("abc", weights))
    expected = terms["cross_entropy"]
    for name, weight in chosen.items(): expected = expected + weight * terms[name]
    plain, objective = WeightedTerms(), WeightedTerms(warmup=warmup)
    plain.start_epoch(epoch, 9)
    assert torch.equal(plain.add_up(terms, chosen), expected), "bit for bit"
    assert torch.equal(objective.add_up(terms, chosen), expected), "in full before an epoch is told"
    objective.start_epoch(epoch, 9)
    added = min(1, (epoch - 1) / (9 * warmup)) * sum(weight * terms[name] for name, weight in chosen.items())
    torch.testing.assert_close(objective.add_up(terms, chosen), terms["cross_entropy"] + added)


@given(st.integers(1, 50), st.floats(0.01, 1))
def test_a_warm_up_rises_from_nothing_to_one(epochs, warmup):
    factors = [rise(epoch, epochs, warmup) for epoch in range(1, epochs + 1)]
    assert factors[0] == 0 and factors == sorted(factors) and max(factors) <= 1
    for epoch, factor in enumerate(factors, 1):
        if epoch - 1 >= warmup * epochs: assert factor == 1
        else: assert factor == pytest.approx((epoch - 1) / (warmup * epochs))
    assert rise(1, epochs, 0) == rise(epochs, epochs, 0.0) == 1


def test_later_settings_count_in_the_name_where_they_are_used():
    names = [repr(objective) for objective in (WeightedTerms(), WeightedTerms(0.1))]
    assert names == ["WeightedTerms()", "WeightedTerms(label_smoothing=0.1)"]
    for options in ({"warmup": 1.1}, {"label_smoothing": -0.1}, {"warmup": math.nan}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be between 0 and 1"): WeightedTerms(**options)


def test_a_checkpoint_from_before_there_was_a_choice_of_heads(few, tmp_path):
    path, net = tmp_path / "run.ckpt", lambda **options: create_model("mobilenet", width=0.1, image_size=16, **options)
    train(net(head="published"), few, epochs=1, checkpoint=path)
    tensors, header = load_tensors(path, "checkpoint")
    for later in ("model.head", "model.dropout"): del header["run"][later]
    save_tensors(path, tensors, "checkpoint", {name: header[name] for name in ("epoch", "run", "rows")})
    assert len(train(net(head="published"), few, epochs=1, checkpoint=path)) == 1
    for other, told in ((net(), "model.head was 'published' and is 'scaled'"),
                        (net(head="published", dropout=0.1), "model.dropout was 0.0 and is 0.1")):
        with pytest.raises(ValueError, match=told): train(other, few, epochs=1, checkpoint=path)


def test_history_goes_through_json(few, tmp_path):
    history = train(make_net(), few, epochs=2)
    history.save(tmp_path / "new" / "history.json")
    assert History.from_json((tmp_path / "new" / "history.json").read_text()) == history
    assert history.column("epoch") == [1, 2] and len(history) == 2 and history.last is history.rows[1]
    with pytest.raises(ValueError, match="no column of the history 'los'.*There is: epoch, lr"): history.column("los")
    assert History().last == {}


@pytest.mark.parametrize("every, looked", [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [])])
def test_validation_is_looked_at_as_often_as_asked(few, every, looked):
    history = train(make_net(), few, epochs=5, evaluate_every=every)
    assert [row["epoch"] for row in history.rows if "valid_accuracy" in row] == looked


def test_training_never_touches_the_test_split(few):
    with_test, without = make_net(), make_net()
    rows = without_time(train(with_test, few))
    few.test = few.test.select([])
    few.valid = few.valid.select([])
    bare = train(without, few)
    assert same(with_test, without) and "valid_accuracy" not in bare.last
    assert bare.column("loss") == [row["loss"] for row in rows]


class CountsReads(TorchDispatchMode):
    "Counts how often the host asks for a number."

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += "local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing(few):
    model, knobs = make_net(), Settings(batch_size=8, max_norm=1.0)
    optimizer = make_optimizer(model, knobs)
    loop = Loop(forward_pass(Unobserved(model), CrossEntropy()), optimizer, knobs)
    with CountsReads() as counter: run_epoch(loop, few.train, 1)
    assert counter.reads == 0
    with CountsReads() as counter: torch.ones(3).sum().item()
    assert counter.reads == 1


# Chance


def test_the_callers_random_numbers_are_left_alone(few):
    states = lambda: (torch.random.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))
    before = states()
    train(make_net(), few)
    assert states() == before


def test_the_seed_alone_decides(few):
    models = [make_net() for _ in range(3)]
    with torch.random.fork_rng():
        for model, mood, seed in zip(models, (1, 2, 2), (0, 0, 1), strict=True):
            torch.manual_seed(mood)
            train(model, few, seed=seed)
    assert same(models[0], models[1]) and not same(models[0], models[2])


@given(st.integers(-5, 2**40), st.integers(0, 300), st.integers(0, 300))
def test_epochs_and_uses_have_seeds_of_their_own(seed, one, other):
    seeds = {epoch_seed(seed, epoch, use) for epoch in (one, other) for use in ("order", "dropout")}
    assert len(seeds) == (2 if one == other else 4) and all(0 <= each < 2**63 for each in seeds)


# Checkpoint and resume

CHILD = """
import sys, time
import test_training as t

class Slow(t.CrossEntropy):
    def __call__(self, logits, labels, observed):
        time.sleep(float(sys.argv[2]))
        return super().__call__(logits, labels, observed)

t.torch.set_num_threads(1)
t.train(t.make_net(), t.read_images(sys.argv[3]), Slow(), epochs=8, checkpoint=sys.argv[1])
"""


def write_images(path, data):
    "Spare the child the reading of the digits, which takes longer than its training."
    tensors = {f"{name}.{part}": getattr(getattr(data, name), part)
               for name in ("train", "valid") for part in ("images", "labels")}
    modnb.files.save_tensors(path, tensors, "images", vars(data.train) | {"images": None, "labels": None})


def read_images(path):
    tensors, header = modnb.files.load_tensors(path, "images")
    split = lambda name: Split(**header | {part: tensors[f"{name}.{part}"] for part in ("images", "labels")})
    return ImageData("few", header["classes"], split("train"), split("valid"), split("valid"))


def start_child(path, pause, images):
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(path), str(pause), str(images)], env=environment)


def test_a_killed_run_goes_on_and_ends_in_the_same_weights(few, tmp_path):
    path, images = tmp_path / "run.ckpt", tmp_path / "images"
    write_images(images, few)
    child = start_child(path, 0.05, images)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or len(read_checkpoint(path).rows) < 2:
            assert child.poll() is None and time.monotonic() < deadline, "the child ended by itself"
            time.sleep(0.02)
    finally: child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    done = len(read_checkpoint(path).rows)
    assert 2 <= done < 8
    assert start_child(path, 0, images).wait() == 0
    resumed, whole = make_net(1), make_net()
    history = load_checkpoint(path, resumed)
    undisturbed = train(whole, few, epochs=8)
    assert same(resumed, whole)
    assert without_time(history) == without_time(undisturbed)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("knobs", [
    {}, dict(schedule="onecycle"), dict(momentum=0.0, nesterov=False), dict(checkpoint_every=2),
    dict(schedule_step="batch", precision="bfloat16")], ids=str)
def test_a_run_stopped_by_an_error_goes_on(few, tmp_path, knobs, channels_last):
    knobs = knobs | dict(checkpoint=tmp_path / "run.ckpt", channels_last=channels_last)
    stopped, whole = make_net(), make_net()
    with pytest.raises(RuntimeError, match="stopped"): train(stopped, few, StopsIn(4, 4), **knobs)
    assert len(read_checkpoint(knobs["checkpoint"]).rows) == (2 if "checkpoint_every" in knobs else 3)
    resumed = make_net(7)
    history = train(resumed, few, StopsIn(99, 4), **knobs)
    undisturbed = train(whole, few, StopsIn(99, 4), **knobs | dict(checkpoint=None))
    assert same(resumed, whole) and without_time(history) == without_time(undisturbed)
    assert all(value.is_contiguous() for value in resumed.state_dict().values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("accuracies", [[0.1, 0.9, 0.9, 0.2], [0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]], ids=str)
def test_the_best_epoch_is_kept_also_by_a_run_that_goes_on(few, tmp_path, monkeypatch, accuracies, every):
    "With made-up accuracies: the weights are those of a run that ends with the first of the best epochs"
    best = accuracies.index(max(accuracies)) + 1
    knobs, until = dict(checkpoint=tmp_path / "run.ckpt", checkpoint_every=every), make_net()
    train(until, few, schedule="constant", epochs=best)
    for keep, stops in ((False, 99), (True, 99), (True, 4)): # the last one is stopped behind its third epoch
        for file in tmp_path.iterdir(): file.unlink()
        shown = iter(accuracies)
        monkeypatch.setattr(modnb.training, "evaluate", partial(lambda left, *_, **__: next(left), shown))
        run = partial(train, data=few, schedule="constant", keep_best=keep, **knobs)
        model = make_net()
        if stops == 4:
            with pytest.raises(RuntimeError, match="stopped"): run(model, objective=StopsIn(4, 4))
            model = make_net(7)
        run(model, objective=StopsIn(99, 4))
        assert same(model, until) is (keep or best == 4), (keep, stops)


def test_the_best_epoch_needs_images_to_choose_it_by(few, tmp_path):
    without = ImageData(few.name, few.classes, few.train, few.valid.select([]), few.test)
    for data, knobs in ((without, {}), (few, {"evaluate_every": 0})):
        with pytest.raises(ValueError, match="keep_best=True chooses an epoch by validation images"):
            train(make_net(), data, keep_best=True, **knobs)
    train(make_net(), few, checkpoint=tmp_path / "run.ckpt", epochs=1)
    assert "keep_best" not in read_checkpoint(tmp_path / "run.ckpt").run, "runs without it are named as before"
    with pytest.raises(ValueError, match="keep_best"):
        train(make_net(), few, checkpoint=tmp_path / "run.ckpt", keep_best=True)


class Grows(CrossEntropy):
    "Cross-entropy that begins at nothing and notes which epochs it hears of."

    def __init__(self, stops=99):
        super().__init__()
        self._heard, self._batches, self._stops = [], [], stops

    def start_epoch(self, epoch, epochs):
        if epoch == self._stops: raise RuntimeError("stopped")
        self._heard.append((epoch, epochs))
        self._batches.append(0)
        self._now = (epoch - 1) / epochs

    def __call__(self, logits, labels, observed):
        self._batches[-1] += 1
        loss, terms = super().__call__(logits, labels, observed)
        return self._now * loss, terms


def test_an_objective_hears_of_each_epoch_before_its_batches(few):
    objective, model = Grows(), make_net()
    history = train(model, few, objective, epochs=3)
    assert objective._heard == [(1, 3), (2, 3), (3, 3)] and objective._batches == [4, 4, 4]
    for row in history.rows:
        assert row["loss"] == pytest.approx((row["epoch"] - 1) / 3 * row["cross_entropy"], rel=1e-5)
    assert Objective().start_epoch(1, 3) is None and repr(objective) == repr(Grows())


@pytest.mark.parametrize("stops", [2, 4])
def test_a_loss_that_changes_goes_on_where_it_was(few, tmp_path, stops):
    stopped, whole, resumed, path = make_net(), make_net(), make_net(7), tmp_path / "run.ckpt"
    with pytest.raises(RuntimeError, match="stopped"): train(stopped, few, Grows(stops), checkpoint=path)
    objective = Grows()
    history = train(resumed, few, objective, checkpoint=path)
    assert objective._heard == [(epoch, 4) for epoch in range(stops, 5)]
    undisturbed = train(whole, few, Grows())
    assert same(resumed, whole) and without_time(history) == without_time(undisturbed)
    again = Grows(1)
    assert train(make_net(), few, again, checkpoint=path) == history and not again._heard


def test_a_finished_run_is_loaded_and_not_trained(few, tmp_path):
    first, second = make_net(), make_net(1)
    history = train(first, few, StopsIn(99, 4), checkpoint=tmp_path / "run.ckpt")
    before = (tmp_path / "run.ckpt").stat().st_mtime_ns
    again = train(second, few, StopsIn(1, 4), checkpoint=tmp_path / "run.ckpt")
    assert same(first, second) and again == history and not second.training
    assert (tmp_path / "run.ckpt").stat().st_mtime_ns == before


def test_the_last_epoch_is_saved_whatever_the_interval(few, tmp_path):
    model, loaded = make_net(), make_net(1)
    train(model, few, epochs=5, checkpoint_every=3, checkpoint=tmp_path / "run.ckpt")
    assert len(load_checkpoint(tmp_path / "run.ckpt", loaded)) == 5 and same(model, loaded)


def test_control_c_leaves_the_checkpoint(few, tmp_path):
    model = make_net()
    with pytest.raises(KeyboardInterrupt):
        train(model, few, StopsIn(3, 4, KeyboardInterrupt), checkpoint=tmp_path / "run.ckpt")
    assert len(read_checkpoint(tmp_path / "run.ckpt").rows) == 2
    assert not model.training and [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_failing_write_leaves_the_old_file(few, tmp_path, monkeypatch):
    path, real, calls = tmp_path / "run.ckpt", modnb.files.save_file, []

    def full_disk(tensors, target, metadata):
        calls.append(target)
        if len(calls) < 3: return real(tensors, target, metadata)
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(modnb.files, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"): train(make_net(), few, checkpoint=path)
    assert len(read_checkpoint(path).rows) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_checkpoint_belongs_to_one_process(few, tmp_path):
    path = tmp_path / "run.ckpt"
    train(make_net(), few, epochs=1, checkpoint=path)
    with claimed_file(path), pytest.raises(Taken, match=f"run.ckpt is being worked on by process {os.getpid()} "):
        train(make_net(), few, epochs=1, checkpoint=path)
    train(make_net(), few, epochs=1, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.ckpt"], "given back"


@pytest.mark.parametrize("knob, value, told", [
    ("epochs", 9, "epochs was 4 and is 9"), ("lr", 0.1, "lr was 0.05 and is 0.1"), ("seed", 5, "seed was 0 and is 5"),
    ("batch_size", 16, "batch_size was 32 and is 16"), ("augment", False, "augment was True and is False"),
    ("schedule", "constant", "schedule was 'cosine' and is 'constant'"), ("precision", "bfloat16", "precision"),
    ("max_norm", 1.0, "max_norm was None and is 1.0"), ("weight_decay", 0.1, "weight_decay")])
def test_another_setting_is_named(few, tmp_path, knob, value, told):
    path = tmp_path / "run.ckpt"
    train(make_net(), few, checkpoint=path)
    before, model = path.read_bytes(), make_net(1)
    with pytest.raises(ValueError, match="other settings") as caught:
        train(model, few, **{"checkpoint": path, knob: value})
    assert told in str(caught.value) and path.read_bytes() == before and same(model, make_net(1))


def test_other_data_models_and_objectives_are_named(few, data, tmp_path):
    path, net = tmp_path / "run.ckpt", lambda width: create_model("lenet5", image_size=16, width=width)
    larger = load_dataset("digits", valid=0.2, device="cpu")
    one, two = small(larger, 60), small(larger, 60)
    fit(net(1), one, epochs=1, device="cpu", checkpoint=path)
    two.train = two.train.select(range(59, -1, -1))
    for model, other, objective, told in (
            (net(2), one, None, "model.width was 1 and is 2"), (net(1), two, None, "data.train_digest"),
            (net(1), one, CrossEntropy(0.1), "objective was 'CrossEntropy(label_smoothing=0.0)' and is 'CrossEntropy")):
        with pytest.raises(ValueError) as caught: fit(model, other, objective, epochs=1, device="cpu", checkpoint=path)
        assert told in str(caught.value), caught.value


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other", "folder"])
def test_a_damaged_checkpoint_is_named_and_kept(few, tmp_path, damage):
    path, model = tmp_path / "run.ckpt", make_net(1)
    train(make_net(), few, epochs=1, checkpoint=path)
    content = {"cut": path.read_bytes()[:-100], "empty": b"", "noise": bytes(range(256)) * 9}.get(damage)
    if content is not None: path.write_bytes(content)
    elif damage == "other": modnb.files.save_tensors(path, {"a": torch.ones(1)}, "masks", {})
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(ValueError, match="run.ckpt.*Move or delete"): train(model, few, epochs=1, checkpoint=path)
    with pytest.raises(ValueError, match="run.ckpt"): load_checkpoint(path, model)
    assert same(model, make_net(1))
    assert path.is_dir() if damage == "folder" else content is None or path.read_bytes() == content


def test_weights_do_not_load_into_another_architecture(few, tmp_path):
    train(make_net(), few, epochs=1, checkpoint=tmp_path / "run.ckpt")
    other = make_net(1, classes=5)
    with pytest.raises(ValueError, match=r"2 tensors differ, the first is '6.weight', \(10, 16\).*\(5, 16\)"):
        load_checkpoint(tmp_path / "run.ckpt", other)
    assert same(other, make_net(1, classes=5))


def test_a_checkpoint_has_a_readable_header_and_no_pickle(few, tmp_path):
    train(make_net(), few, epochs=2, checkpoint=tmp_path / "run.ckpt")
    raw = (tmp_path / "run.ckpt").read_bytes()
    head = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    told = json.loads(head["__metadata__"]["modnb"])["header"]
    assert told["epoch"] == 2 and told["run"]["lr"] == 0.05 and told["run"]["data.name"] == "few"
    assert {"model.0.weight", "momentum.0.weight", "model.1.running_mean"} <= head.keys()


def test_shared_weights_are_saved_and_resumed(few, tmp_path):
    def tied():
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Linear(10, 10), nn.Linear(10, 10))
        model[3].weight = model[2].weight
        return model

    stopped, whole = tied(), tied()
    whole.load_state_dict(stopped.state_dict())
    with pytest.raises(RuntimeError): train(stopped, few, StopsIn(3, 4), checkpoint=tmp_path / "run.ckpt")
    train(stopped, few, StopsIn(99, 4), checkpoint=tmp_path / "run.ckpt")
    train(whole, few, StopsIn(99, 4))
    assert same(stopped, whole) and stopped[3].weight is stopped[2].weight


def test_parts_that_do_not_learn_stay(few, tmp_path):
    model = make_net()
    model[0].requires_grad_(False)
    train(model, few, checkpoint=tmp_path / "run.ckpt")
    assert torch.equal(model[0].weight, make_net()[0].weight) and not torch.equal(model[6].weight, make_net()[6].weight)
    assert "0.weight" not in read_checkpoint(tmp_path / "run.ckpt").momentum


# Failure


class BreaksIn(Objective):
    "Adds a term that is no number from some epoch on."

    def __init__(self, epoch, steps): self._left = (epoch - 1) * steps

    def __call__(self, logits, labels, observed):
        self._left -= 1
        loss, extra = F.cross_entropy(logits, labels), torch.tensor(math.nan if self._left < 0 else 0.0)
        return loss + extra, {"cross_entropy": loss, "extra": extra}


def test_a_term_that_is_no_number_stops_the_run(few, tmp_path):
    path = tmp_path / "run.ckpt"
    with pytest.raises(TrainingDiverged, match=r"epoch 3: \w+ is not finite.*epoch 2, is in .*run.ckpt") as caught:
        train(make_net(), few, BreaksIn(3, 4), checkpoint=path)
    error = caught.value
    assert isinstance(error, ValueError) and (error.epoch, error.checkpoint, error.checkpoint_epoch) == (3, path, 2)
    assert len(error.history) == len(read_checkpoint(path).rows) == 2
    assert all(value.isfinite().all() for value in read_checkpoint(path).model.values())


def test_without_a_checkpoint_it_says_so(few, tmp_path):
    for checkpoint in (None, tmp_path / "run.ckpt"):
        with pytest.raises(TrainingDiverged, match="no checkpoint of an earlier epoch") as caught:
            train(make_net(), few, BreaksIn(1, 4), checkpoint=checkpoint, batch_size=100)
        assert (caught.value.term, caught.value.checkpoint) == ("extra", None)
    assert not [*tmp_path.iterdir()]


def test_a_broken_weight_behind_a_good_loss_is_found(few, tmp_path):
    class ZeroWithBadGradient(Objective):
        def __call__(self, logits, labels, observed): return (0 * logits.sum()).sqrt(), {}

    with pytest.raises(TrainingDiverged) as caught:
        train(make_net(), few, ZeroWithBadGradient(), batch_size=100, checkpoint=tmp_path / "run.ckpt")
    assert caught.value.term == "weight '0.weight'" and not (tmp_path / "run.ckpt").exists()


def test_a_learning_rate_far_too_high_diverges(few):
    with pytest.raises(TrainingDiverged, match="A lower lr"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(192, 99), nn.Linear(99, 10)), few, lr=1e9)


@pytest.mark.parametrize("knobs, told", [
    (dict(schedule="cosin"), "schedule 'cosin'.*'cosine'"), (dict(schedule_step="step"), "schedule_step"),
    (dict(epochs=-1), "epochs must be a whole number"), (dict(epochs=1.5), "epochs"), (dict(lr=0), "lr must be"),
    (dict(batch_size=0), "batch_size"), (dict(lr=math.nan), "lr"), (dict(lr="fast"), "lr"), (dict(seed="a"), "seed"),
    (dict(momentum=1.0), "momentum"), (dict(momentum=0.0), "nesterov"), (dict(max_norm=0), "max_norm"),
    (dict(augment="no"), "augment must be True or False"), (dict(seed=-1), "seed"),
    (dict(precision="float16"), "precision 'float16'.*float32, bfloat16"), (dict(weight_decay=-1), "weight_decay"),
    (dict(checkpoint_every=0), "checkpoint_every"), (dict(evaluate_every=-1), "evaluate_every"),
    (dict(batch_size=200, drop_last=True), "batch_size 200 leaves no batch"), (dict(device="gpu9"), "device")], ids=str)
def test_a_bad_knob_is_named(few, knobs, told):
    model = make_net()
    with pytest.raises(ValueError, match=told): train(model, few, **knobs)
    assert same(model, make_net())


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_refused(few, precision):
    with pytest.raises(ValueError, match=f"is {precision}, but weights are trained in float32: pass model.float"):
        train(make_net().to(precision), few)


def test_data_and_models_that_do_not_fit_are_refused(few):
    with pytest.raises(ValueError, match="ImageData"): train(make_net(), few.train)
    with pytest.raises(ValueError, match=r"\[2, 7\].*num_classes=10"): train(make_net(classes=7), few)
    with pytest.raises(ValueError, match="requires_grad"): train(make_net().requires_grad_(False), few)
    with pytest.raises(ValueError, match="training split of 'few' is empty"): train(make_net(), small(few, 0))
    with pytest.raises(ValueError, match="a single image is no batch"): train(make_net(), small(few, 1))
    for no_objective in ("moda", CrossEntropy):
        with pytest.raises(ValueError, match="objective must be an object"): train(make_net(), few, no_objective)


def test_objectives_that_break_the_contract_are_refused(few):
    def objective(answer, network=None):
        class Wrong(Objective):
            def prepare(self, model, example): return network(model) if network else super().prepare(model, example)
            def __call__(self, logits, labels, observed): return answer(logits.mean())
        return Wrong()

    def grown(model):
        model[0].more = nn.Linear(1, 1)
        return model

    fine = lambda loss: (loss, {})
    for wrong, told in (
            (objective(lambda loss: (loss, {"vector": torch.ones(2)})), r"vector is a tensor of shape \[2\]"),
            (objective(lambda loss: (loss, {"number": 1.0})), "number is float"),
            (objective(lambda loss: (loss, {"lr": loss})), "'lr'"),
            (objective(lambda loss: (loss, {str(loss.item()): loss})), "the same terms"),
            (objective(fine, lambda model: model), "logits, {name: tensor}"),
            (objective(fine, lambda model: Unobserved(nn.Sequential(model, nn.Linear(10, 10)))), "'model.1.weight'"),
            (objective(fine, lambda model: Unobserved(grown(model))), "'model.0.more.weight'"),
            (Objective(), "define __call__")):
        with pytest.raises((ValueError, NotImplementedError), match=told): train(make_net(), few, wrong)
    assert "seconds" in COLUMNS


# Batches of one


@settings(max_examples=50)
@given(st.integers(1, 400), st.integers(1, 150), st.booleans())
def test_steps_are_the_batches_without_a_single_last_image(images, batch_size, drop_last):
    split = Split(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64), ["a"],
                  (0.0,) * 3, (1.0,) * 3)
    sizes = [len(y) for _, y in batches(split, batch_size, drop_last=drop_last)]
    if batch_size > 1: sizes = [size for size in sizes if size > 1]
    assert count_steps(images, batch_size, drop_last) == len(sizes)


def test_a_last_batch_of_one_does_not_stop_batch_norm(data):
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)) # 1x1 maps
    history = train(model, small(data, 65), epochs=2, batch_size=32)
    assert int(model[1].num_batches_tracked) == 4
    assert history.last["train_accuracy"] * 64 == pytest.approx(round(history.last["train_accuracy"] * 64), abs=1e-5)


# Prediction


def test_evaluation_changes_nothing(few):
    model = make_net().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = predict(model, few.train, batch_size=7)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not logits.requires_grad and logits.dtype == torch.float32 and logits.shape == (100, 10)
    torch.testing.assert_close(logits, predict(model, few.train)) # whatever the batches: no statistics of the batch


def test_modes_come_back_after_an_error(few):
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError("no")

    model = nn.Sequential(nn.Dropout(), Fails()).train()
    with pytest.raises(RuntimeError): predict(model, few.test)
    assert model.training and model[0].training


@given(st.sets(st.integers(0, 9), min_size=1))
@settings(max_examples=20, deadline=None)
def test_a_subtask_is_evaluated_on_its_own_columns(classes):
    generator = torch.Generator().manual_seed(0)
    labels, logits = torch.arange(10).repeat(4), torch.randn(40, 10, generator=generator)
    split = Split(torch.zeros(40, 3, 1, 1, dtype=torch.uint8), labels, list("abcdefghij"), (0.0,) * 3, (1.0,) * 3)
    columns, right, kept = sorted(classes), 0, [image for image in range(40) if labels[image].item() in classes]
    for image in kept:
        right += max(columns, key=lambda column: logits[image, column].item()) == labels[image].item()
    found = evaluate(None, split.subtask(columns), columns=columns, logits=logits[kept])
    assert found == pytest.approx(right / len(kept))


def test_outputs_that_do_not_fit_the_split_are_refused(few):
    model, task = make_net(), few.test.subtask([1, 3])
    assert 0 <= evaluate(model, task, columns=[1, 3]) <= 1
    for told, bad in (("10 outputs for the 2 classes", {}), ("1 outputs for the 2", dict(columns=[1])),
                      ("between 0 and 9", dict(columns=[1, 10])), ("different numbers", dict(columns=[1, 1])),
                      ("logits must be", dict(columns=[1, 3], logits=torch.zeros(3, 10)))):
        with pytest.raises(ValueError, match=told): evaluate(model, task, **bad)
    for empty in (lambda: predict(model, few.test.select([])),
                  lambda: evaluate(model, few.test.select([]), logits=torch.zeros(0, 10))):
        with pytest.raises(ValueError, match="no images"): empty()
    with pytest.raises(ValueError, match="precision"): predict(model, few.test, precision="half")


def test_the_loss_is_float32_whatever_the_forward_pass_is(few):
    seen = []

    class Spy(SmallActivations):
        def __call__(self, logits, labels, observed):
            seen.append((logits.dtype, observed["2"].dtype))
            return super().__call__(logits, labels, observed)

    train(make_net(), few, Spy(), epochs=1, precision="bfloat16")
    assert {*seen} == {(torch.float32, torch.bfloat16)}


# Progress


def test_a_bar_shows_only_when_somebody_watches(few, capfd, monkeypatch):
    train(make_net(), few, epochs=1)
    assert capfd.readouterr() == ("", "")
    train(make_net(), few, epochs=2, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "epoch 2/2" in err and "loss=" in err and "valid=" in err and "8/8" in err
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    assert not wants_progress() and wants_progress(True)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.delenv("CI", raising=False)
    assert wants_progress() and not wants_progress(False)
    monkeypatch.setenv("CI", "true")
    assert not wants_progress()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_goes_on(few, tmp_path):
    model, knobs = make_net(), dict(device="cuda", checkpoint=tmp_path / "run.ckpt")
    before = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match="stopped"): train(model, few, StopsIn(3, 4), **knobs)
    history = train(model, few, StopsIn(99, 4), **knobs)
    assert read_checkpoint(tmp_path / "run.ckpt").run["precision"] == "bfloat16"
    assert [row["epoch"] for row in history.rows] == [1, 2, 3, 4] and next(model.parameters()).is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)
