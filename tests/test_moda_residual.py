"""Modules by contribution against slow forms, exactness on residual networks, choice of levels, the experiment."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import modnb
from modnb.data import Split
from modnb.extract import Anatomy
from modnb.lab.results import read_rows
from modnb.lab.running import run_notebook
from modnb.masks import ModuleMasks, outline
from modnb.moda.residual import (
    contributions,
    decompose_by_contribution,
    keep_sums_alive,
    lead,
    relative_contributions,
    strictest_level,
    sum_sites,
)
from modnb.models import create_model
from modnb.units import observe, unit_sites

EXPERIMENTS = Path(modnb.__file__).parents[1] / "nbs/experiments"


def residual_network(seed=0, classes=4):
    "A narrow ResNet18 with statistics of normalisation that are not those of a new network"
    model, random = create_model("resnet18", classes, width=0.07, seed=seed), torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, nn.BatchNorm2d): continue
        for tensor in (layer.running_mean, layer.bias.data): tensor.normal_(0, 0.3, generator=random)
        for tensor in (layer.running_var, layer.weight.data): tensor.uniform_(0.5, 1.5, generator=random)
    return model.eval()


def some_images(number=12, classes=4, size=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 3, size, size), generator=random, dtype=torch.uint8)
    return Split(images, torch.arange(number) % classes, [f"c{i}" for i in range(classes)], (0.5,) * 3, (0.25,) * 3)


def normalised(split):
    return (split.images / 255 - 0.5) / 0.25


def slow_contributions(model, split, site):
    "Value times slope at every position, image by image"
    network, sums = observe(model, [site]), None
    for image, label in zip(normalised(split), split.labels.tolist()):
        logits, observed = network(image[None])
        others = torch.cat([logits[0, :label], logits[0, label + 1:]])
        slope, = torch.autograd.grad(logits[0, label] - others.mean(), observed[site])
        moved = (observed[site] * slope).flatten(2).sum(2)[0].abs().detach()
        sums = torch.zeros(len(split.classes), len(moved)) if sums is None else sums
        sums[label] += moved
    return sums / torch.bincount(split.labels)[:, None]


@pytest.mark.parametrize("site", ["features.relu1", "features.block2.body.norm2", "features.block3.shortcut.norm",
                                  "features.block4.activation", "features.block8.activation"])
def test_contributions_are_value_times_slope(site):
    model, split = residual_network(), some_images()
    found = contributions(model, split, [site], batch_size=5)[site]
    assert found.max() > 0
    torch.testing.assert_close(found, slow_contributions(model, split, site), rtol=1e-3, atol=1e-5)


def test_in_place_activations_change_nothing():
    model, split = residual_network(), some_images()
    sites = ["features.block1.body.norm1", "features.block1.body.norm2", *unit_sites(model, torch.zeros(1, 3, 8, 8))]
    before = contributions(model, split, sites)
    for layer in model.modules():
        if isinstance(layer, nn.ReLU): layer.inplace = True
    after = contributions(model, split, sites)
    for site in sites: torch.testing.assert_close(after[site], before[site])


def test_contributions_leave_the_model_as_it_was():
    model, split = residual_network().train(), some_images()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    contributions(model, split)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_contributions_do_not_depend_on_batches_or_order():
    model, split = residual_network(), some_images()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(1))
    whole, parts = contributions(model, split), contributions(model, split.select(order), batch_size=5)
    for site in whole: torch.testing.assert_close(parts[site], whole[site], rtol=1e-3, atol=1e-6)


def test_a_unit_nobody_reads_contributes_nothing():
    model, split = residual_network(), some_images()
    with torch.no_grad():
        model.get_submodule("features.block2.body.conv2").weight[:, 2] = 0
    site = "features.block2.body.relu1"
    found = contributions(model, split, [site])[site]
    assert found[:, 2].eq(0).all() and found.amax(0).gt(0).sum() >= found.shape[1] // 2
    masks = decompose_by_contribution(model, split, 0.01)
    assert not masks.masks[site][:, 2].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 999))
def test_lead_against_a_loop(images, classes, seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=random, dtype=torch.float64)
    labels = torch.randint(classes, (images,), generator=random)
    for row, label, found in zip(logits.tolist(), labels.tolist(), lead(logits, labels).tolist()):
        own = row.pop(label)
        assert abs(own - sum(row) / len(row) - found) < 1e-12
    torch.testing.assert_close(lead(logits + 7, labels), lead(logits, labels))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_relative_contributions_know_no_scale(seed):
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
    values[:, 0] = 0
    relative = relative_contributions({"a": values})["a"]
    assert relative[:, 0].eq(0).all() and relative[:, 1:].amax(0).sub(1).abs().max() < 1e-6
    torch.testing.assert_close(relative_contributions({"a": values * 1e-3})["a"], relative)


def test_sites_of_sums():
    example = torch.zeros(1, 3, 8, 8)
    found = sum_sites(create_model("resnet18", width=0.07), example)
    shortcuts = [f"features.block{i}.shortcut.norm" for i in (3, 5, 7)]
    assert sorted(found) == sorted([f"features.block{i}.body.norm2" for i in range(1, 9)] + shortcuts)
    assert set(found).isdisjoint(unit_sites(create_model("resnet18", width=0.07), example))
    assert sum_sites(create_model("vgg12", width=0.07, image_size=16), torch.zeros(1, 3, 16, 16)) == {}


ANATOMY = Anatomy(residual_network(), torch.zeros(2, 3, 8, 8))
WIDTHS = unit_sites(ANATOMY.model, torch.zeros(2, 3, 8, 8)) | sum_sites(ANATOMY.model, torch.zeros(2, 3, 8, 8))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([0.4, 0.7, 0.9]))
def test_extraction_equals_the_oracle_with_masks_before_and_behind_sums(seed, share):
    random = torch.Generator().manual_seed(seed)
    keep = {site: torch.rand(width, generator=random) < share for site, width in WIDTHS.items()}
    for mask in keep.values(): mask[0] = True
    images = torch.randn(3, 3, 8, 8, generator=random)
    with torch.no_grad(): full, small = ANATOMY.masked(keep)(images), ANATOMY.extract(keep)(images)
    assert (full - small).abs().max() <= 1e-4 * full.abs().max().clamp(min=1)
    kernels = ANATOMY.extract(keep).features.block2.body.conv2.out_channels
    assert kernels <= int(keep["features.block2.body.norm2"].sum())


@pytest.mark.parametrize("branches", [True, False])
def test_modules_are_exact_with_and_without_branches(branches):
    model, split = residual_network(), some_images()
    masks = decompose_by_contribution(model, split, 0.5, branches=branches)
    assert isinstance(masks, ModuleMasks) and (set(masks.masks) >= set(sum_sites(model, normalised(split)))) == branches
    for name in masks.classes:
        keep = masks.keep([name])
        with torch.no_grad():
            full, small = (make(keep)(normalised(split)) for make in (ANATOMY.masked, ANATOMY.extract))
        assert (full - small).abs().max() <= 1e-4 * full.abs().max().clamp(min=1)
    assert masks == decompose_by_contribution(model, split, 0.5, branches=branches), "the same at every call"


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**20))
def test_sums_stay_alive_and_nothing_is_taken(seed):
    random = torch.Generator().manual_seed(seed)
    masks = {site: torch.rand(3, width, generator=random) < 0.25 for site, width in WIDTHS.items()}
    for site in masks: masks[site][:, int(torch.randint(WIDTHS[site], (1,), generator=random))] = True
    before = ModuleMasks(masks, ["a", "b", "c"])
    example = torch.zeros(2, 3, 8, 8)
    after = keep_sums_alive(ANATOMY.model, before, example)
    terms = sum_sites(ANATOMY.model, example)
    assert all((before.masks[s] <= after.masks[s]).all() for s in WIDTHS)
    assert all(torch.equal(before.masks[s], after.masks[s]) for s in WIDTHS if s not in terms)
    for term in terms:
        behind = after.masks[".".join(term.split(".")[:2]) + ".activation"]
        assert (after.masks[term] & behind).any(1).all()
        touched = (after.masks[term] != before.masks[term]).any(1)
        assert not (before.masks[term] & behind).any(1)[touched].any(), "only where nothing was in common"
    for classes in (["a"], ["b", "c"]): ANATOMY.plan(after.keep(classes))


def test_stricter_shares_keep_less():
    model, split = residual_network(), some_images()
    kept = [decompose_by_contribution(model, split, share, "none").flat() for share in (0.05, 0.3, 1.0)]
    for mild, strict in zip(kept, kept[1:]): assert (strict <= mild).all() and strict.sum() < mild.sum()


def test_the_strictest_level_stops_before_the_loss():
    model, split = residual_network(), some_images(40)
    everything = ModuleMasks({s: torch.ones(4, k, dtype=torch.bool) for s, k in WIDTHS.items()}, split.classes)
    with torch.no_grad(): answers = model(normalised(split)).argmax(1)
    split = Split(split.images, answers, split.classes, split.mean, split.std)  # the whole network is always right
    present = answers.unique().tolist()
    if len(present) < 2: pytest.skip("this network gives one answer to all images")
    asked = []

    def make(level):
        asked.append(level)
        if level < 3: return everything
        return ModuleMasks({s: (torch.arange(k) == 0).expand(4, k) for s, k in WIDTHS.items()}, split.classes)

    level, tried = strictest_level(model, make, [1, 2, 3, 4], split, [present], 0.0)
    assert level == 2 and asked == [1, 2, 3] and [row["level"] for row in tried] == [1, 2, 3]
    assert tried[0]["accuracy"] == tried[1]["composed_accuracy"] == 1 > tried[2]["composed_accuracy"]
    assert strictest_level(model, make, [3, 4], split, [present], 0.0)[0] == 3, "nothing is good enough: the mildest"
    assert strictest_level(model, make, [1, 2, 3], split, [present], 1.0)[0] == 3


def test_bad_input():
    model, split = residual_network(), some_images()
    with pytest.raises(ValueError, match="no images of c1"): contributions(model, split.select(split.labels != 1))
    with pytest.raises(ValueError, match="no site 'features.relu9'"): contributions(model, split, ["features.relu9"])
    with pytest.raises(ValueError, match="share must lie"): decompose_by_contribution(model, split, 0.0)
    everything = decompose_by_contribution(model, split)
    assert everything.network == outline(model) # which it knows, so that another one refuses it
    make = lambda level: everything
    with pytest.raises(ValueError, match="must not be empty"): strictest_level(model, make, [], split, [[0, 1]])
    with pytest.raises(ValueError, match="must not be empty"): strictest_level(model, make, [0.1], split, [])
    with pytest.raises(ValueError, match="no image to choose with"):
        strictest_level(model, make, [0.1], split.select([]), [[0, 1]])


def test_the_experiment_writes_rows_of_all_forms(tmp_path):
    network, out = tmp_path / "network", tmp_path / "out"
    small = {"model": "resnet18", "width": 0.125, "image_size": 8, "train_limit": 200, "test_limit": 100, "epochs": 2}
    run_notebook(EXPERIMENTS / "train.ipynb", network / "train.ipynb",
                 small | {"system": "moda", "valid": 0.1, "out": str(network)})
    settings = {"run": str(network), "out": str(out), "study": "mine", "sizes": "2,4", "shares": "0.05,0.2",
                "thresholds": "0.9,1.0", "choice_subtasks": 1}
    run_notebook(EXPERIMENTS / "moda_residual.ipynb", out / "moda_residual.ipynb", settings)
    rows = read_rows(out / "rows.csv")
    forms = rows.config.map(lambda text: json.loads(text)["masks_by"])
    assert set(forms) == {"published", "published_chosen", "published_branches", "contribution"}
    tested = rows[rows.metric == "composed_accuracy"].classes.groupby(forms).agg(" ".join)
    assert tested.nunique() == 1, "the same sub-tasks for all forms"
    size = rows[rows.metric == "module_size"].set_index(forms[rows.metric == "module_size"]).value
    assert size["published_branches"] <= size["published"] + 1e-9
    for form in set(forms):
        assert len(ModuleMasks.load(out / f"masks-{form}.safetensors").classes) == 10
