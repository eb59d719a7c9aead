"""Sub-tasks: how many, which, and what composed networks reach on them, against composing and evaluating each one."""

import copy
import hashlib
import json
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modnb import walk
from modnb.compose import Composer, compose
from modnb.data import Split
from modnb.extract import EmptyModule
from modnb.masks import ModuleMasks
from modnb.metrics import count_flops
from modnb.models import create_model
from modnb.prediction import evaluate, predict
from modnb.subtasks import (
    all_subtasks,
    draw_sizes,
    draw_subtasks,
    load_subtasks,
    measure_subtask,
    measure_whole,
    sample_size,
    sample_subtasks,
    save_subtasks,
    subtask_indices,
)
from modnb.units import unit_sites
from modnb.walk import Family, Runner, evaluate_subtasks, formula_holds

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def random_masks(model, example, classes, seed, share=0.5):
    "Masks of random units, at least one of each class at each site"
    random, masks = torch.Generator().manual_seed(seed), {}
    for site, units in unit_sites(model, example).items():
        mask = torch.rand(len(classes), units, generator=random) < share
        mask[torch.arange(len(classes)), torch.randint(units, [len(classes)], generator=random)] = True
        masks[site] = mask
    return ModuleMasks(masks, list(classes))


def random_split(classes, size, count, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, [count, 3, size, size], generator=random, dtype=torch.uint8)
    labels = torch.randint(len(classes), [count], generator=random)
    labels[:len(classes)] = torch.arange(len(classes))
    return Split(images, labels, list(classes), (0.5, 0.5, 0.5), (0.2, 0.3, 0.25))


def lively(model, seed=0):
    "Statistics of normalisations and biases unlike those of a new network, so that dead channels matter"
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(torch.randn(layer.num_features, generator=random) * 0.1)
                layer.running_var.copy_(torch.rand(layer.num_features, generator=random) + 0.5)
                layer.bias.copy_(torch.randn(layer.num_features, generator=random) * 0.3)
            elif isinstance(layer, nn.Linear):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * layer.in_features**-0.5)
    return model.eval()


def naive_rows(model, masks, split, subtasks, mode="train"):
    "Copy, compose, evaluate and count, one sub-task after the other"
    example, rows = torch.zeros(1, *split.images.shape[1:]), []
    weights = sum(p.numel() for p in model.parameters())
    for names in subtasks:
        part, columns = split.subtask(names), sorted(split.classes.index(name) for name in names)
        composed = compose(copy.deepcopy(model), masks, names, example)
        rows.append({"classes": [split.classes[c] for c in columns], "images": len(part),
                     "accuracy": evaluate(model, part, columns), "composed_accuracy": evaluate(composed, part),
                     "composed_size": sum(p.numel() for p in composed.parameters()) / weights,
                     "composed_flops": count_flops(composed, example, mode) / count_flops(model, example, mode)})
    return rows


def without_trunks(rows): return [{name: value for name, value in row.items() if name != "trunk"} for row in rows]


class InPlace(nn.Module):
    "Everything that sharing could get wrong: operations that overwrite, a sum, a layer called twice, a shape"

    def __init__(self, classes):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.hidden, self.last = nn.Linear(6 * 16, 12), nn.Linear(12, classes)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        y = self.relu(self.second(x))
        y += x
        y = nn.functional.relu_(y)
        y = nn.functional.max_pool2d(y, 2)
        return self.last(self.relu(self.hidden(y.view(y.size(0), -1))))


NETWORKS = {
    "lenet5": lambda: create_model("lenet5", 5, width=0.5, image_size=16, seed=0),
    "vgg12": lambda: create_model("vgg12", 5, width=0.0625, seed=0),
    "resnet18": lambda: create_model("resnet18", 5, width=0.0625, image_size=8, seed=0),
    "mobilenet": lambda: create_model("mobilenet", 5, width=0.125, image_size=8, seed=0),
}


# Which sub-tasks


def test_published_numbers_of_subtasks():
    assert len(all_subtasks([str(digit) for digit in range(10)])) == 1013
    drawn = sample_subtasks([f"c{number}" for number in range(100)])
    sizes = [len(names) for names in drawn]
    assert len(drawn) == 14697 and max(map(sizes.count, set(sizes))) == 151 and set(sizes) == set(range(2, 101))


@pytest.mark.parametrize("population, wanted", [(1, 1), (10, 10), (100, 61), (4950, 146), (10**5, 150), (10**40, 151)])
def test_sample_sizes(population, wanted):
    unlimited = 1.96**2 * 0.25 / 0.08**2
    assert sample_size(population) == wanted == math.ceil(unlimited / (1 + (unlimited - 1) / population))


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(0, 9))
def test_samples_have_no_repetition_and_repeat_under_their_seed(classes, seed):
    names = [f"c{number}" for number in range(classes)]
    drawn = sample_subtasks(names, seed=seed)
    assert drawn == sample_subtasks(names, seed=seed)
    assert len({tuple(subtask) for subtask in drawn}) == len(drawn) == len(subtask_indices(drawn, names))
    for size in range(2, classes + 1):
        of_size = [subtask for subtask in drawn if len(subtask) == size]
        assert len(of_size) == sample_size(math.comb(classes, size))
        assert all(subtask == [name for name in names if name in subtask] for subtask in of_size)


def test_another_seed_draws_others():
    names = [f"c{number}" for number in range(30)]
    assert sample_subtasks(names, seed=1) != sample_subtasks(names, seed=2)


def test_all_subtasks_are_all_subsets():
    wanted = {frozenset(chosen) for size in range(2, 6) for chosen in combinations(NAMES, size)}
    assert {frozenset(names) for names in all_subtasks(NAMES)} == wanted and len(all_subtasks(NAMES)) == len(wanted)


@pytest.mark.parametrize("subtasks, message", [
    ([["ant", "bee"], ["cat", "hen"]], "sub-task 2.*no class 'hen'"),
    ([["ant", "bee"], ["cat", "dog"], ["bee", "ant"]], "sub-task 3.*number 1 again"),
    ([["ant", "ant"]], "more than once: ant"),
    ([["ant"]], "at least two classes"),
    ([[]], "no class chosen"),
    ([], "no sub-task"),
])
def test_wrong_lists_are_refused(subtasks, message, tmp_path):
    with pytest.raises(ValueError, match=message): subtask_indices(subtasks, NAMES)
    with pytest.raises(ValueError, match=message): save_subtasks(tmp_path / "x.json", subtasks, NAMES)
    assert not (tmp_path / "x.json").exists()


def test_wrong_numbers_are_refused():
    for arguments in ((0,), (9, 1.0), (9, 0.95, 0), (9, 0.95, 8)):
        with pytest.raises(ValueError, match="population"): sample_size(*arguments)
    with pytest.raises(ValueError, match="21 classes"): all_subtasks([str(number) for number in range(21)])
    with pytest.raises(ValueError, match="at least two"): sample_subtasks(["ant"])


def test_lists_survive_a_file(tmp_path):
    drawn = sample_subtasks(NAMES, seed=4)
    save_subtasks(tmp_path / "s.json", drawn, NAMES)
    assert load_subtasks(tmp_path / "s.json", NAMES) == drawn
    other = load_subtasks(tmp_path / "s.json", ["eel", "dog", "cat", "bee", "ant"])
    assert set(other[0]) == set(drawn[0]) and other[0] == drawn[0][::-1], "names, not positions"
    with pytest.raises(ValueError, match="s.json.*no class"): load_subtasks(tmp_path / "s.json", ["ant", "bee"])
    (tmp_path / "s.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="no list of sub-tasks"): load_subtasks(tmp_path / "s.json", NAMES)


def test_the_draws_are_those_of_every_run_so_far():
    "Rows of many runs name these sub-tasks; other draws would compare other things"
    digits, hundred = [str(digit) for digit in range(10)], [f"c{number}" for number in range(100)]
    assert draw_subtasks(digits, 2, 5) == [["1", "8"], ["1", "3"], ["3", "8"], ["0", "9"], ["1", "2"]]
    assert draw_sizes(digits, "3,2", 2, 7) == draw_subtasks(digits, 2, 2, 7) + draw_subtasks(digits, 3, 2, 7)
    drawn = {"digits": [draw_subtasks(digits, size, count, seed) for size in (1, 2, 3, 5, 10) for count in (0, 2, 20)
                        for seed in (1, 2)],
             "hundred": [draw_subtasks(hundred, size, 20, seed) for size in (2, 50, 99) for seed in (1, 2)],
             "samples": [sample_subtasks(digits, seed=seed) for seed in (0, 1)],
             "all": sample_subtasks(hundred, seed=1)}
    known = {name: hashlib.sha256(json.dumps(lists).encode()).hexdigest()[:12] for name, lists in drawn.items()}
    assert known == {"digits": "e6dda9d126b8", "hundred": "dfbddc87239d", "samples": "562514513564",
                     "all": "b4b325c25535"}


@pytest.mark.parametrize("flops", [True, False])
def test_a_subtask_is_measured_as_composed_and_evaluated(flops):
    model = lively(NETWORKS["lenet5"]())
    split = random_split(NAMES, 16, 60)
    masks = random_masks(model, torch.zeros(2, 3, 16, 16), NAMES, seed=1, share=0.5)
    composer, subtasks = Composer(model, masks, torch.zeros(2, 3, 16, 16)), all_subtasks(NAMES)[::4]
    whole = measure_whole(model, split, flops=flops)
    for expected in naive_rows(model, masks, split, subtasks):
        wanted = {name: expected[name] for name in ("accuracy", "composed_accuracy", "composed_size")}
        if flops: wanted["composed_flops"] = expected["composed_flops"]
        assert measure_subtask(composer(expected["classes"]), split, whole) == wanted


# Evaluating them


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("share, mode", [(0.3, "train"), (0.9, "eval")])
def test_rows_equal_composing_and_evaluating_each(name, share, mode):
    model = lively(NETWORKS[name]())
    split = random_split(NAMES, model.config["image_size"], 60)
    masks = random_masks(model, torch.zeros(2, *split.images.shape[1:]), NAMES, seed=1, share=share)
    every = 3 if share == 0.9 else 2 if name in ("resnet18", "mobilenet") else 1
    subtasks = all_subtasks(NAMES)[::every]
    found = evaluate_subtasks(model, masks, split, subtasks, batch_size=25, flops_mode=mode)
    expected = naive_rows(model, masks, split, subtasks, mode)
    assert without_trunks(found) == expected
    assert len({row["composed_accuracy"] for row in expected}) > 3, "not a network that always says the same"


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.95]), st.booleans())
def test_logits_equal_the_composed_networks(seed, share, rare):
    "Of networks that overwrite tensors, with sub-tasks in any order"
    torch.manual_seed(seed)
    model = lively(InPlace(5), seed)
    split = random_split(NAMES[:2] if rare else NAMES, 8, 40, seed)
    split.classes = NAMES
    example = torch.zeros(2, 3, 8, 8)
    masks = random_masks(model, example, NAMES, seed, share)
    for mask in masks.masks.values(): mask[:, 0] = True # two sites in a row must not switch everything off
    subtasks = all_subtasks(NAMES)
    if rare: subtasks = [names for names in subtasks if {"ant", "bee"} & set(names)]
    order = torch.randperm(len(subtasks), generator=torch.Generator().manual_seed(seed)).tolist()
    subtasks = [subtasks[number] for number in order][:12]
    found = evaluate_subtasks(model, masks, split, subtasks, batch_size=15)
    assert without_trunks(found) == naive_rows(model, masks, split, subtasks)


@pytest.mark.parametrize("name", NETWORKS)
def test_runner_calculates_what_builder_builds(name):
    model = lively(NETWORKS[name]())
    size = model.config["image_size"]
    example, images = torch.zeros(2, 3, size, size), torch.randn(9, 3, size, size)
    masks = random_masks(model, example, NAMES, seed=2, share=0.4)
    family, composer = Family(model, masks, example), Composer(model, masks, example)
    with torch.no_grad():
        for columns in ([0, 1], [2, 3, 4], [0, 1, 2, 3, 4]):
            runner = Runner(images, torch.arange(9))
            signature = family.read(columns).signature
            for node, number in zip(family.nodes, signature): runner.step(node, family.states[number])
            outputs = torch.tensor([c in columns for c in range(5)])
            assert torch.equal(runner.take(family.source, outputs), composer(columns)(images))


def test_trunks_are_shared_exactly_where_features_are_the_same():
    model = lively(create_model("vgg12", 3, width=0.0625, seed=0))
    example = torch.zeros(2, 3, 16, 16)
    masks = random_masks(model, example, NAMES[:3], seed=0)
    for mask in masks.masks.values(): mask[2] = mask[0] | mask[1] # cat needs nothing that ant and bee have not
    split = random_split(NAMES[:3], 16, 30)
    rows = evaluate_subtasks(model, masks, split, all_subtasks(NAMES[:3]))
    trunks = {"".join(name[0] for name in row["classes"]): row["trunk"] for row in rows}
    assert trunks == {"ab": 0, "ac": 0, "bc": 0, "abc": 0}
    networks = {names: Composer(model, masks, example)(names) for names in (("ant", "cat"), ("ant", "bee", "cat"))}
    small, large = (predict(network, split) for network in networks.values())
    torch.testing.assert_close(small, large[:, [0, 2]])
    masks.masks["features.relu9"][2] = ~masks.masks["features.relu9"][0]
    rows = evaluate_subtasks(model, masks, split, all_subtasks(NAMES[:3]))
    assert len({row["trunk"] for row in rows}) > 1


def test_early_layers_run_once_for_all(monkeypatch):
    "With full masks in the first layer the first convolution runs once a batch, not once a sub-task"
    model = lively(create_model("lenet5", 5, image_size=16, seed=0))
    split = random_split(NAMES, 16, 40)
    masks = random_masks(model, torch.zeros(2, 3, 16, 16), NAMES, seed=0, share=0.5)
    masks.masks["features.relu1"][:] = True
    convolve, seen = nn.Conv2d.forward, []
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: seen.append(self.in_channels) or convolve(self, x))
    evaluate_subtasks(model, masks, split, all_subtasks(NAMES), batch_size=20, flops_mode=None)
    assert seen.count(3) == 1 + 2 + 2, "for tracing; for the logits of the whole model; for all composed networks"
    assert seen.count(6) > 10, "the second layer differs"


@pytest.mark.parametrize("stop", [1, 7, 20])
def test_a_stopped_evaluation_continues_as_if_nothing_had_happened(stop, tmp_path, monkeypatch):
    model = lively(create_model("lenet5", 5, width=0.5, image_size=16, seed=0))
    split = random_split(NAMES, 16, 50)
    masks = random_masks(model, torch.zeros(2, 3, 16, 16), NAMES, seed=5, share=0.4)
    arguments = model, masks, split, all_subtasks(NAMES)
    wanted = evaluate_subtasks(*arguments, batch_size=20)
    count, calls = walk.right_answers, []

    def killed(*given):
        calls.append(given)
        if len(calls) == 2 * stop + 1: raise KeyboardInterrupt
        return count(*given)

    monkeypatch.setattr(walk, "right_answers", killed)
    path = tmp_path / "answers.safetensors"
    with pytest.raises(KeyboardInterrupt): evaluate_subtasks(*arguments, path, batch_size=20, save_every=0)
    assert path.exists()
    calls.clear()
    monkeypatch.setattr(walk, "right_answers", lambda *given: calls.append(given) or count(*given))
    assert evaluate_subtasks(*arguments, path, batch_size=20) == wanted
    assert len(calls) == 2 * (26 * 3 - stop), "what was done is not done again"
    calls.clear()
    assert evaluate_subtasks(*arguments, path, batch_size=20) == wanted and not calls


def test_a_file_of_another_evaluation_is_refused(tmp_path):
    model = lively(create_model("lenet5", 5, width=0.5, image_size=16, seed=0))
    split, path = random_split(NAMES, 16, 20), tmp_path / "answers.safetensors"
    masks = random_masks(model, torch.zeros(2, 3, 16, 16), NAMES, seed=5)
    subtasks = all_subtasks(NAMES)[:4]
    evaluate_subtasks(model, masks, split, subtasks, path)
    other = random_masks(model, torch.zeros(2, 3, 16, 16), NAMES, seed=6)
    with pytest.raises(ValueError, match="masks differ"): evaluate_subtasks(model, other, split, subtasks, path)
    with pytest.raises(ValueError, match="subtasks differ"): evaluate_subtasks(model, masks, split, subtasks[:2], path)
    with pytest.raises(ValueError, match="images differ"):
        evaluate_subtasks(model, masks, random_split(NAMES, 16, 20, 1), subtasks, path)
    with torch.no_grad(): model.classifier.linear3.bias += 1
    with pytest.raises(ValueError, match="model differ"): evaluate_subtasks(model, masks, split, subtasks, path)


def test_bad_input():
    model = lively(create_model("lenet5", 5, width=0.5, image_size=16, seed=0))
    split, example = random_split(NAMES, 16, 20), torch.zeros(2, 3, 16, 16)
    masks = random_masks(model, example, NAMES, seed=5)
    with pytest.raises(ValueError, match="masks are for"):
        evaluate_subtasks(model, masks, random_split(NAMES[:4], 16, 20), all_subtasks(NAMES[:4]))
    with pytest.raises(ValueError, match="4 outputs"):
        four = create_model("lenet5", 4, width=0.5, image_size=16)
        evaluate_subtasks(four, masks, split, [["ant", "bee"]])
    other = create_model("lenet5", 5, width=1.0, image_size=16)
    with pytest.raises(ValueError, match="entries, but the site has"):
        evaluate_subtasks(other, masks, split, [["ant", "bee"]])
    pair = [["ant", "bee"]]
    with pytest.raises(ValueError, match="flops_mode"): evaluate_subtasks(model, masks, split, pair, flops_mode="x")
    with pytest.raises(ValueError, match="no images of ant, bee"):
        evaluate_subtasks(model, masks, split.select(split.labels > 1), pair)
    with pytest.raises(ValueError, match="no images"): evaluate_subtasks(model, masks, split.select([]), pair)
    empty = ModuleMasks({**masks.masks, "features.relu1": masks.masks["features.relu1"] & False}, NAMES)
    with pytest.raises(EmptyModule, match="sub-task ant, bee"): evaluate_subtasks(model, empty, split, pair)


def test_convolutions_with_groups_are_counted_on_the_built_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    split, example = random_split(NAMES, 8, 20), torch.zeros(2, 3, 8, 8)
    masks = random_masks(model, example, NAMES, seed=0, share=0.3)
    assert not formula_holds(model, example, "train")
    found = evaluate_subtasks(model, masks, split, all_subtasks(NAMES))
    expected = naive_rows(model, masks, split, all_subtasks(NAMES))
    for name in ("accuracy", "composed_accuracy", "composed_flops"):
        assert [row[name] for row in found] == [row[name] for row in expected]
