"""Replacing an output by a module: the adaptation layer against literal training, folding, names, bad input."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modnb.compose import compose
from modnb.data import ImageData, Split, batches, load_dataset
from modnb.extract import Anatomy
from modnb.lab.results import read_rows
from modnb.lab.running import NotebookFailed, run_notebook
from modnb.masks import ModuleMasks
from modnb.moda.losses import MODA
from modnb.moda.replacement import (
    Replaced,
    adapt_alone,
    class_accuracies,
    class_module,
    compare_replacement,
    fit_adaptation,
    fold,
    in_order,
    replace_module,
    replace_output,
    standardisation,
    train_weak,
    weak_classes,
)
from modnb.models import create_model
from modnb.objectives import CrossEntropy
from modnb.prediction import evaluate, predict
from modnb.units import unit_sites

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
STRONG, WEAK = ["ant", "bee", "cat"], ["dog", "eel", "bee"]


def make_split(classes, count=40, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, [count, 3, 16, 16], generator=random, dtype=torch.uint8)
    labels = torch.arange(count) % len(classes)
    return Split(images, labels, list(classes), (0.5,) * 3, (0.25,) * 3)


def make_strong(seed=0):
    "A network with BatchNorm, statistics unlike those of a new one, and random masks"
    model = create_model("vgg12", 3, width=0.0625, seed=seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d): layer.running_mean.uniform_(-0.2, 0.2)
    random = torch.Generator().manual_seed(seed)
    masks = {site: torch.rand(3, units, generator=random) < 0.7
             for site, units in unit_sites(model, torch.zeros(2, 3, 16, 16)).items()}
    for mask in masks.values(): mask[:, 0] = True
    return model, ModuleMasks(masks, STRONG)


def make_weak(seed=1): return create_model("lenet5", 3, image_size=16, seed=seed)


# The layer


def test_one_step_by_hand():
    found = fit_adaptation(torch.eye(2), torch.tensor([0, 1]), epochs=1, spread=0.0)
    torch.testing.assert_close(found.weight, torch.tensor([[0.02375, -0.02375], [-0.02375, 0.02375]]))
    assert torch.equal(found.bias, torch.zeros(2))
    two = fit_adaptation(torch.tensor([[2.0, 0]]), torch.tensor([0]), epochs=1, spread=0.0, lr=1.0)
    torch.testing.assert_close(two.weight, torch.tensor([[1.9, 0], [-1.9, 0]])) # gradient (p - y) o = (-1/2, 1/2) 2
    torch.testing.assert_close(two.bias, torch.tensor([0.95, -0.95]))


def literal_training(weak, module, split, target, epochs, batch_size, lr, seed, standardise):
    "Every image through both whole networks in every epoch; inputs standardised in front of the layer, not folded"
    weak, module = weak.eval(), module.eval()
    images, labels = next(batches(split, len(split)))
    random, n, inputs = torch.Generator().manual_seed(seed), len(split.classes), []
    for start in range(0, len(images), 7): # all inputs, for mean and deviation
        with torch.no_grad():
            outputs = weak(images[start:start + 7]), module(images[start:start + 7])
        inputs.append(replace_output(*outputs, target))
    inputs = torch.cat(inputs)
    mean, std = (inputs.mean(0), inputs.var(0, correction=0).sqrt()) if standardise else (0.0, 1.0)
    layer = nn.Linear(n, n)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(n, n, generator=random) * 0.01)
        layer.bias.zero_()
    order = torch.randperm(len(split), generator=random)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for start in range(0, len(order), batch_size):
            chosen = order[start:start + batch_size]
            with torch.no_grad(): x = replace_output(weak(images[chosen]), module(images[chosen]), target)
            loss = nn.functional.cross_entropy(layer((x - mean) / std), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return lambda x: layer((replace_output(weak(x), module(x), target) - mean) / std)


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("epochs", [5, 20])
def test_cached_training_equals_training_on_whole_networks(standardise, epochs):
    (strong, masks), weak, split = make_strong(), make_weak(), make_split(WEAK)
    fitting = {"epochs": epochs, "batch_size": 16, "lr": 0.05, "seed": 3, "standardise": standardise}
    repaired = replace_module(weak, strong, masks, split, "bee", **fitting)
    module = compose(strong, masks, ["bee"], torch.zeros(2, 3, 16, 16))
    slow = literal_training(weak, module, split, 2, **fitting)
    images, _ = next(batches(make_split(WEAK, seed=9), 40))
    with torch.no_grad(): torch.testing.assert_close(repaired(images), slow(images), rtol=1e-3, atol=1e-4)


@settings(max_examples=50)
@given(st.integers(0, 99), st.integers(1, 6), st.floats(-50, 50), st.floats(0.01, 100))
def test_folded_equals_not_folded(seed, n, shift, scale):
    random = torch.Generator().manual_seed(seed)
    layer = nn.Linear(n, n, dtype=torch.float64)
    inputs = torch.randn(30, n, generator=random, dtype=torch.float64) * scale + shift
    mean, std = standardisation(inputs)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(fold(layer, mean, std)(inputs), layer((inputs - mean) / std))
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
    torch.testing.assert_close(((inputs - mean) / std).mean(0), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 99), st.floats(-20, 20), st.floats(0.05, 20))
def test_standardised_training_does_not_depend_on_shift_and_scale(seed, shift, scale):
    random = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(40, 3, generator=random, dtype=torch.float64), torch.arange(40) % 3
    options = {"epochs": 3, "batch_size": 8, "standardise": True, "seed": seed}
    plain = fit_adaptation(inputs, labels, **options)(inputs)
    moved = fit_adaptation(inputs * scale + shift, labels, **options)(inputs * scale + shift)
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


def test_an_input_that_never_changes_is_only_shifted():
    inputs = torch.tensor([[5.0, 1], [5, 3], [5, 2]])
    mean, std = standardisation(inputs)
    assert mean.tolist() == [5, 2] and std[0] == 1 and std[1] < 1
    assert fit_adaptation(inputs, torch.tensor([0, 1, 0]), standardise=True)(inputs).isfinite().all()


def test_seeds_and_orders():
    inputs, labels = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    weights = lambda **options: fit_adaptation(inputs, labels, batch_size=8, **options).weight
    torch.manual_seed(1)
    first = weights()
    torch.manual_seed(2)
    assert torch.equal(first, weights()), "the global generator has no say"
    assert not torch.equal(first, weights(seed=1)) and not torch.equal(first, weights(reshuffle=True))
    assert not fit_adaptation(inputs, labels).weight.requires_grad


# The repaired model


@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(0, 9))
def test_only_the_targets_column_is_replaced(target, seed):
    random = torch.Generator().manual_seed(seed)
    logits, output = torch.randn(3, 6, generator=random), torch.randn(3, 1, generator=random)
    wanted = logits.clone()
    wanted[:, target] = output[:, 0]
    assert torch.equal(replace_output(logits, output, target), wanted)


@pytest.mark.parametrize("order", [WEAK, ["bee", "dog", "eel"]])
def test_the_target_is_found_by_name_in_both_models(order):
    (strong, masks), weak, split = make_strong(), make_weak(), make_split(order)
    repaired = replace_module(weak, strong, masks, split, "bee", epochs=0)
    assert repaired.target == order.index("bee")
    images, _ = next(batches(split, 40))
    with torch.no_grad():
        module = Anatomy(strong.eval(), torch.zeros(2, 3, 16, 16)).extract(masks.keep(["bee"]), [1]) # bee is 1 there
        torch.testing.assert_close(repaired.module(images), module(images))


def test_both_networks_stay_as_they_are():
    (strong, masks), weak, split = make_strong(), make_weak(), make_split(WEAK)
    strong.train(), weak.train()
    states = [copy.deepcopy(model.state_dict()) for model in (strong, weak)]
    repaired = replace_module(weak, strong, masks, split, "bee", standardise=True)
    for model, state in zip((strong, weak), states):
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(layer.training for layer in repaired.modules()), "evaluation mode, module included"
    other = Replaced(make_weak(7), copy.deepcopy(repaired.module), nn.Linear(3, 3), 2).eval()
    other.load_state_dict(repaired.state_dict())
    assert torch.equal(predict(other, split), predict(repaired, split)), "the state holds all of it"


def test_the_control_is_the_weak_models_own_logits():
    weak, split = make_weak(), make_split(WEAK)
    control = adapt_alone(weak, split, "bee", epochs=4, batch_size=8)
    direct = fit_adaptation(predict(weak, split), split.labels, epochs=4, batch_size=8)
    assert torch.equal(control[1].weight, direct.weight)


# Accuracies, classes


def test_changes_by_hand():
    split = make_split(WEAK, 12)
    right, wrong = torch.eye(3)[split.labels], torch.eye(3)[(split.labels + 1) % 3]
    before = torch.where((torch.arange(12) < 6)[:, None], right, wrong) # half of each class
    assert class_accuracies(before, split) == {"dog": 0.5, "eel": 0.5, "bee": 0.5}
    after = torch.where((split.labels == 2)[:, None], right, torch.where((split.labels == 1)[:, None], wrong, right))
    found = compare_replacement(before, after, split, "bee")
    assert found == {"tc_accuracy_before": 0.5, "non_tc_accuracy_before": 0.5, "tc_accuracy_after": 1.0,
                     "non_tc_accuracy_after": 0.5, "tc_change": 50.0, "non_tc_change": 0.0}


def test_non_tc_weighs_classes_alike():
    split = make_split(WEAK, 12).select([0, 3, 6, 9, 1, 2]) # four dogs, one eel, one bee
    logits = torch.eye(3)[[0, 0, 0, 0, 0, 2]]
    assert compare_replacement(logits, logits, split, "bee")["non_tc_accuracy_after"] == 0.5


def test_weak_classes_and_their_order():
    assert weak_classes(["ant", "bee", "cat", "dog", "eel"], STRONG, "bee") == WEAK
    split = make_split(["ant", "bee", "cat", "dog", "eel"], 25)
    part = in_order(split, WEAK)
    assert part.classes == WEAK and len(part) == 15
    old = split.labels[torch.isin(split.labels, torch.tensor([1, 3, 4]))]
    assert [part.classes[i] for i in part.labels] == [split.classes[i] for i in old]


def test_stages_are_those_of_one_run():
    data = load_dataset("digits", device="cpu").subtask(["1", "2", "3"])
    data.train = data.train.select(range(60))
    train = lambda stages, **options: train_weak(create_model("lenet5", 3, image_size=16, seed=0), data, stages,
                                                 epochs=6, batch_size=16, lr=0.02, **options)
    both = train((2, 6))
    torch.testing.assert_close(train((2,))[2].state_dict(), both[2].state_dict(), rtol=0, atol=0)
    assert set(both) == {2, 6} and not torch.equal(predict(both[2], data.test), predict(both[6], data.test))
    assert not torch.equal(predict(train((2,), objective=CrossEntropy())[2], data.test), predict(both[2], data.test))
    assert evaluate(both[6], data.train) > evaluate(both[2], data.train)


def test_training_the_weak_model_looks_at_no_test_image():
    data = load_dataset("digits", device="cpu").subtask(["1", "2"])
    data.train = data.train.select(range(32))
    blind = ImageData("x", data.classes, data.train, data.valid, data.test.select([]))
    stages = [train_weak(create_model("lenet5", 2, image_size=16, seed=0), each, (2,), epochs=3, batch_size=16, lr=0.02,
                         objective=MODA()) for each in (data, blind)]
    torch.testing.assert_close(stages[0][2].state_dict(), stages[1][2].state_dict(), rtol=0, atol=0)


# Bad input


def test_bad_input():
    (strong, masks), weak, split = make_strong(), make_weak(), make_split(WEAK)
    with pytest.raises(ValueError, match="strong model does not know 'dog'"):
        replace_module(weak, strong, masks, split, "dog")
    with pytest.raises(ValueError, match="weak model does not know 'ant'"):
        replace_module(weak, strong, masks, split, "ant")
    with pytest.raises(ValueError, match="3 outputs.*2 classes"):
        replace_module(weak, strong, masks, in_order(split, ["dog", "bee"]), "bee")
    with pytest.raises(ValueError, match="no images of eel"):
        replace_module(weak, strong, masks, split.select(split.labels != 1), "bee")
    with pytest.raises(ValueError, match="a whole number"): fit_adaptation(torch.eye(2), torch.arange(2), epochs=-1)
    with pytest.raises(ValueError, match="not all logits are finite"):
        fit_adaptation(torch.eye(2) / 0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="inputs must be"): fit_adaptation(torch.zeros(0, 2), torch.zeros(0).long())
    with pytest.raises(ValueError, match="logits must be"): class_accuracies(torch.zeros(3, 3), split)
    with pytest.raises(ValueError, match="no class 'ant'"):
        compare_replacement(torch.zeros(40, 3), torch.zeros(40, 3), split, "ant")
    with pytest.raises(ValueError, match="more than once"): weak_classes(STRONG + ["dog"], ["ant", "ant"], "ant")
    with pytest.raises(ValueError, match="knows all classes"): weak_classes(STRONG, STRONG, "ant")
    with pytest.raises(ValueError, match="stage must lie"):
        train_weak(weak, ImageData("x", WEAK, split, split, split), stages=(300,))


def test_masks_of_another_model_are_refused():
    strong, masks = make_strong()
    example = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="10 outputs for the 3 classes"):
        class_module(create_model("vgg12", 10, width=0.0625), masks, "bee", example)
    with pytest.raises(ValueError, match="units"):
        class_module(create_model("vgg12", 3, width=0.125), masks, "bee", example)
    with pytest.raises(ValueError, match="no site"):
        class_module(create_model("resnet18", 3, width=0.0625), masks, "bee", example)


# Experiments


def test_experiment_on_replacement(tmp_path):
    parameters = {"out": str(tmp_path), "targets": "1", "strong_epochs": 2, "weak_epochs": 4, "underfit_epoch": 1,
                  "overfit_epoch": 4, "adaptation_epochs": "2", "study": "small"}
    run_notebook(EXPERIMENTS / "moda_replacement.ipynb", tmp_path / "x.ipynb", parameters)
    rows = read_rows(tmp_path / "rows.csv")
    assert len(rows) == 6 * 2 * (2 * 2 + 2) and set(rows.classes) == {"1"} and set(rows.split) == {"test"}
    settings = [json.loads(text) for text in rows.config]
    ways = [(kind, fed) for kind in ("raw", "standardised") for fed in ("module", "own logit")]
    ways += [("none", "patch"), ("none", "patch, range of all classes")]
    assert {(s["weak"], s["inputs"], s["fed_with"]) for s in settings} == {
        (weak, *way) for weak in ("underfitting", "overfitting") for way in ways}
    assert set(rows[[s["inputs"] == "none" for s in settings]].system) == {"cnnsplitter"}
    with pytest.raises(NotebookFailed, match="no class '7'"):
        run_notebook(EXPERIMENTS / "moda_replacement.ipynb", tmp_path / "y.ipynb", parameters | {"targets": "7"})


def test_experiment_on_subtasks(tmp_path):
    small = {"out": str(tmp_path), "epochs": 1, "train_limit": 300, "test_limit": 60}
    run_notebook(EXPERIMENTS / "train.ipynb", tmp_path / "train.ipynb", small)
    run_notebook(EXPERIMENTS / "moda_subtasks.ipynb", tmp_path / "x.ipynb", {
        "run": str(tmp_path), "per_size": 2, "rows_of_each": True})
    rows, lists = read_rows(tmp_path / "rows.csv"), json.loads((tmp_path / "subtasks.json").read_text())
    count = 2 * 8 + 1
    assert len(rows) == 7 + 4 * count and len(lists["subtasks"]) == count and set(rows.system) == {"plain"}
    each = rows[rows.metric == "composed_accuracy"]
    assert list(each.classes) == ["|".join(names) for names in lists["subtasks"]]
    summary = rows.set_index("metric").value["subtasks_composed_accuracy"]
    assert abs(summary - each.value.mean()) < 1e-12
