"""MwT's generators, losses, modularizing and reuse against slow forms, and through short training runs."""

import copy
import itertools
import math
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import CountOperations, LastChannels, Tokens, set_jaccard, slow_mean_cosines
from torch import nn
from torch.nn import functional as F

from modnb.compat import import_torchvision
from modnb.compose import compose
from modnb.data import Split, batches, load_dataset
from modnb.extract import masked
from modnb.lab.matrix import read_matrix, study_cells
from modnb.lab.published import read_published
from modnb.lab.running import notebook_parameters
from modnb.masks import ModuleMasks
from modnb.models import create_model
from modnb.mwt.generators import (
    MaskGenerator,
    add_mask_generators,
    fuse_scaling,
    generator_parameters,
    mask_generators,
    maskable_sites,
    observe_masks,
    remove_mask_generators,
)
from modnb.mwt.losses import (
    PUBLISHED_WEIGHTS,
    CollapseWarning,
    MwT,
    cohesion_loss,
    coupling_loss,
    find_collapse,
    mask_health,
    published_weights,
)
from modnb.mwt.modularize import (
    Recording,
    batch_modularity,
    mask_statistics,
    measure,
    modularize,
    sample_masks,
    stack_batches,
)
from modnb.mwt.reuse import (
    Reuser,
    compare_reuse,
    fine_tune,
    fine_tune_selected_on_test,
    fold_masks,
    mean_masks,
    renormalise,
    tune,
    tuning_settings,
)
from modnb.objectives import CrossEntropy
from modnb.prediction import evaluate
from modnb.similarity import AVERAGES
from modnb.training import fit
from modnb.units import unit_sites

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"

ARCHITECTURES = {"vgg12": ({}, 16), "resnet18": ({}, 32), "simcnn": ({"batch_norm": True}, 32),
                 "rescnn": ({"batch_norm": True}, 32), "mobilenet": ({}, 32), "lenet5": ({}, 32)}
each_network = pytest.mark.parametrize("name", ARCHITECTURES)


def network(name, seed=0):
    options, size = ARCHITECTURES[name]
    model = create_model(name, width=0.125, seed=seed, **options)
    return model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=0):
    "Normalisations with statistics, scales and shifts that are not those of a new network"
    random = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, nn.BatchNorm2d): continue
        for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return model


# Generators


@pytest.mark.parametrize("name, options, total, generators, sites, kernels", [
    ("vgg16", {}, 16_982_154, 1_728_576, 12, 4160), ("resnet18", {}, 12_759_754, 1_585_792, 19, 4736),
    ("simcnn", {"batch_norm": True}, 16_982_026, 1_728_576, 12, 4160),
    ("rescnn", {"batch_norm": True}, 17_886_474, 1_867_904, 11, 4224)])
def test_sizes_at_full_width(name, options, total, generators, sites, kernels):
    with torch.device("meta"): model = create_model(name, **options)
    modular = add_mask_generators(model.to_empty(device="cpu"), torch.zeros(1, 3, 32, 32))
    assert generator_parameters(modular) == generators
    assert sum(p.numel() for p in modular.parameters()) == total
    made = mask_generators(modular)
    assert len(made) == sites and sum(g.kernels.out_features for g in made.values()) == kernels


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 3, 127, 128, 131]), st.sampled_from(["released", "paper"]),
       st.integers(0, 3))
def test_a_generator_gives_values_from_zero_to_below_one(inputs, kernels, form, dims):
    generator = MaskGenerator(inputs, kernels, form)
    x = torch.randn(4, inputs, *[5] * (dims + 1))
    soft = generator(x)
    assert soft.shape == (4, kernels) and soft.min() >= 0 and soft.max() <= 1
    hidden = (kernels if kernels < 128 else kernels // 2) if form == "released" else None
    expected = inputs * kernels + kernels if hidden is None else inputs * hidden + hidden * kernels + kernels
    assert sum(p.numel() for p in generator.parameters()) == expected
    mean = x.flatten(2).mean(2)
    if form == "released": mean = (mean @ generator.hidden.weight.T).clamp(min=0)
    by_hand = (mean @ generator.kernels.weight.T + generator.kernels.bias).tanh().clamp(min=0)
    torch.testing.assert_close(soft, by_hand, atol=1e-6, rtol=1e-5)
    assert (generator.kernels.bias == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.floats(0.01, 1), st.integers(0, 99))
def test_a_floor_keeps_kernels_on(kernels, floor, seed):
    torch.manual_seed(seed)
    generator = MaskGenerator(3, kernels, floor=floor)
    with torch.no_grad(): generator.kernels.bias.fill_(-20)
    soft = generator(torch.randn(6, 3, 4, 4))
    assert ((soft > 0).sum(1) >= math.ceil(floor * kernels)).all()
    with torch.no_grad(): generator.kernels.bias.fill_(20)
    assert (generator(torch.randn(6, 3, 4, 4)) > 0).all()


def test_three_kernels_by_hand():
    "Masks scale the normalised output, before the ReLU and before the sum; the shortcut is not masked"
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
            self.linear = nn.Linear(3, 3, bias=False)

        def forward(self, x): return self.linear(self.relu(self.norm(self.conv(x)) + x).mean((2, 3)))

    model = shaken(Block()).eval()
    nn.init.zeros_(model.norm.running_mean), nn.init.constant_(model.norm.running_var, 1 - 1e-5)
    with torch.no_grad():
        model.conv.weight.copy_(torch.eye(3)[:, :, None, None]), model.linear.weight.copy_(torch.eye(3))
        model.norm.weight.copy_(torch.tensor([2.0, 1, 1])), model.norm.bias.copy_(torch.tensor([0.0, 1, -9]))
    modular = add_mask_generators(model, torch.zeros(1, 3, 2, 2), first=True, form="paper")
    with torch.no_grad():
        generator = mask_generators(modular)["norm"]
        generator.kernels.weight.copy_(torch.diag(torch.tensor([1.0, 0.5, -1])))
        generator.kernels.bias.copy_(torch.tensor([0.0, 0, 1]))
    x = torch.tensor([1.0, 2, 3])[None, :, None, None].expand(1, 3, 2, 2)
    # means 1, 2, 3 -> 1, 1, -2 -> masks tanh 1, tanh 1, 0; normalised 2, 3, -6; plus the shortcut 1, 2, 3
    on = math.tanh(1)
    torch.testing.assert_close(modular(x), torch.tensor([[on * 2 + 1, on * 3 + 2, 3.0]]))
    torch.testing.assert_close(model(x), torch.tensor([[3.0, 5, 0]]))


@each_network
@pytest.mark.parametrize("training", [True, False])
def test_masks_of_one_change_nothing(name, training):
    model, x = network(name)
    shaken(model).train(training)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout): layer.p = 0.0
    modular = add_mask_generators(model, x, first=True)
    assert modular.training == training
    for generator in mask_generators(modular).values(): nn.init.constant_(generator.kernels.bias, 1e4)
    torch.testing.assert_close(modular(x), model(x), atol=1e-4, rtol=1e-4)
    for layer in mask_generators(modular).values(): nn.init.constant_(layer.kernels.bias, -1e4)
    _, soft = observe_masks(modular)(x)
    assert not any(mask.any() for mask in soft.values())


@each_network
def test_sites_watching_and_the_way_back(name):
    model, x = network(name)
    before = {key: tensor.clone() for key, tensor in shaken(model).state_dict().items()}
    modular = add_mask_generators(model, x, seed=1).eval()
    assert list(mask_generators(modular)) == list(unit_sites(model, x, "norm"))[1:]
    assert list(unit_sites(modular, x, "norm")) == list(unit_sites(model, x, "norm"))
    logits, soft = observe_masks(modular)(x)
    torch.testing.assert_close(logits, modular(x))
    assert {site: mask.shape[1] for site, mask in soft.items()} == maskable_sites(model, x)
    with torch.no_grad():
        for parameter in modular.parameters(): parameter.add_(0.01)
    for key, tensor in model.state_dict().items(): assert torch.equal(tensor, before[key]), "the original changed"
    plain = remove_mask_generators(modular)
    assert plain.state_dict().keys() == before.keys() and not mask_generators(plain)
    assert all(torch.equal(tensor, modular.state_dict()[key]) for key, tensor in plain.state_dict().items())
    again = remove_mask_generators(modular, into=network(name, seed=3)[0]).eval()
    torch.testing.assert_close(plain.eval()(x), again(x))
    fresh = add_mask_generators(network(name, seed=4)[0], x, seed=5).eval()
    fresh.load_state_dict(modular.state_dict())
    torch.testing.assert_close(fresh(x), modular(x))
    torch.testing.assert_close(copy.deepcopy(modular)(x), modular(x))


def test_everything_gets_a_gradient():
    model, x = network("resnet18")
    modular = add_mask_generators(model, x, seed=0).train()
    logits, soft = observe_masks(modular)(x)
    (logits.square().sum() + sum(mask.sum() for mask in soft.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in modular.parameters())
    assert all(g.hidden.weight.grad.any() for g in mask_generators(modular).values())


def test_a_layer_called_twice_has_a_generator_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            for _ in range(2): x = torch.relu(self.norm(self.conv(x)))
            return self.linear(x.mean((2, 3)))

    x = torch.randn(2, 3, 6, 6)
    modular = add_mask_generators(Twice(), x, first=True)
    assert list(mask_generators(modular)) == ["norm", "norm@2"]
    _, soft = observe_masks(modular)(x)
    assert not torch.equal(soft["norm"], soft["norm@2"])
    assert sum(p.numel() for p in remove_mask_generators(modular).parameters()) == 3 * 27 + 3 + 6 + 8
    with pytest.raises(ValueError, match="more than once"): fold_masks(remove_mask_generators(modular), {
        "norm": torch.ones(3), "norm@2": torch.ones(3)})


def test_seeds_leave_the_global_generator_alone():
    model, x = network("vgg12")
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = (add_mask_generators(model, x, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_networks_that_cannot_be_masked():
    x = torch.zeros(2, 3, 8, 8)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match="no convolution"): add_mask_generators(nn.Sequential(nn.Flatten()), x)
    with pytest.raises(ValueError, match="first convolution '0'"): add_mask_generators(one, x)
    modular = add_mask_generators(one, x, first=True)
    with pytest.raises(ValueError, match="already"): add_mask_generators(modular, x)
    with pytest.raises(ValueError, match="no mask generators"): remove_mask_generators(one)
    with pytest.raises(ValueError, match="absent"): remove_mask_generators(modular, into=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two layers"): add_mask_generators(one, x, first=True, form="two layers")
    with pytest.raises(ValueError, match="floor"): add_mask_generators(one, x, first=True, floor=2.0)

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.linear = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(nn.functional.dropout(self.second(self.first(x)), 0.5, self.training).mean((2, 3)))

    with pytest.raises(ValueError, match="dropout"): add_mask_generators(Moody(), x)


# Losses


batch = st.fixed_dictionaries({
    "seed": st.integers(0, 2**20), "widths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
    "labels": st.lists(st.integers(0, 3), min_size=2, max_size=10).map(torch.tensor)})


def draw(batch):
    random = torch.Generator().manual_seed(batch["seed"])
    return [torch.randn(len(batch["labels"]), width, generator=random, dtype=torch.float64).relu()
            for width in batch["widths"]]


@settings(max_examples=40, deadline=None)
@given(batch, st.sampled_from(AVERAGES))
def test_losses_equal_a_loop_over_pairs(batch, average):
    rows, labels = [row.requires_grad_() for row in draw(batch)], batch["labels"]
    within, between = slow_mean_cosines(rows, labels, average)
    paired = len(labels.unique()) < len(labels)
    together, apart = cohesion_loss(rows, labels, average), coupling_loss(rows, labels, average)
    assert abs(together - (1 - within if paired else 0)) < 1e-10 and abs(apart - between) < 1e-10
    assert -1e-9 <= together <= 1 + 1e-9 and -1e-9 <= apart <= 1 + 1e-9
    fast = torch.autograd.grad(apart - together, rows)
    slow = torch.autograd.grad(between + (within if paired else 0 * within), rows)
    for a, b in zip(fast, slow): torch.testing.assert_close(a, b)


@settings(max_examples=20, deadline=None)
@given(batch, st.floats(0.1, 10), st.integers(0, 99))
def test_losses_know_neither_order_nor_scale(batch, scale, seed):
    rows, labels = draw(batch), batch["labels"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    for loss in (cohesion_loss, coupling_loss):
        changed = loss([scale * row[order] for row in rows], labels[order])
        torch.testing.assert_close(changed, loss(rows, labels), atol=1e-9, rtol=1e-9)


def test_a_batch_without_pairs_of_one_class():
    rows, logits = [torch.rand(4, 5, requires_grad=True)], torch.randn(4, 4)
    loss, terms = MwT()(logits, torch.arange(4), {"a": rows[0]})
    assert terms["cohesion_loss"] == 0 and terms["coupling_loss"] > 0
    loss.backward()
    assert rows[0].grad.isfinite().all()
    assert MwT()(logits, torch.zeros(4, dtype=torch.long), {"a": rows[0]})[1]["coupling_loss"] == 0


def test_the_loss_is_the_weighted_sum():
    observed, logits, labels = {"a": torch.rand(8, 4), "b": torch.rand(8, 5)}, torch.randn(8, 4), torch.arange(8) % 4
    loss, terms = MwT(2.0, 3.0)(logits, labels, observed)
    expected = terms["cross_entropy"] + 2 * terms["cohesion_loss"] + 3 * terms["coupling_loss"]
    torch.testing.assert_close(loss, expected)
    assert all(isinstance(term, torch.Tensor) and term.ndim == 0 for term in terms.values())
    torch.testing.assert_close(MwT(0, 0)(logits, labels, observed)[0], CrossEntropy()(logits, labels, {})[0])
    by_hand = F.cross_entropy(logits, labels) + 2.0 * terms["cohesion_loss"] + 3.0 * terms["coupling_loss"]
    assert torch.equal(loss, by_hand), "bit for bit"
    smoothed = MwT(0, 0, label_smoothing=0.3)(logits, labels, observed)[0]
    torch.testing.assert_close(smoothed, CrossEntropy(0.3)(logits, labels, {})[0])


def test_the_loss_does_not_wait_for_the_device():
    observed = {str(k): torch.rand(64, k) for k in (8, 16, 32, 64)}
    objective, logits, labels = Recording(MwT()), torch.randn(64, 10), torch.arange(64) % 10
    objective(logits, labels, observed)
    with CountOperations() as count: objective(logits, labels, observed)
    waiting = ("nonzero", "masked_select", "index.", "_local_scalar_dense", "item")
    assert not [name for name in count.names if name.startswith(waiting)]


def test_a_collapse_is_found_and_told():
    logits, labels, on = torch.eye(4)[torch.zeros(8, dtype=torch.long)], torch.arange(8) % 4, torch.rand(8, 4) + 0.1
    off = torch.zeros(8, 4)
    health = mask_health([on, off], logits)
    assert [health[n].item() for n in ("kernels_on", "empty_masks", "dead_layers", "top_prediction")] == [.5, .5, .5, 1]
    assert [text.split(":")[0] for text in find_collapse(health)] == [
        "dead layers", "all-zero masks", "constant predictions"]
    one_row = torch.cat([off[:1], on[1:]])
    assert [text.split(":")[0] for text in find_collapse(mask_health([one_row], torch.eye(4)[labels]))] == [
        "all-zero masks"]
    rows = {name: {term: value.item() for term, value in MwT()(answers, labels, {"a": masks})[1].items()}
            for name, answers, masks in (("bad", logits, off), ("good", torch.eye(4)[labels], on))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in (1, 2, 4): MwT(watch=3).end_epoch({"epoch": epoch} | rows["bad"])
        with pytest.raises(CollapseWarning, match="dead layers"): MwT(watch=3).end_epoch({"epoch": 3} | rows["bad"])
        MwT().end_epoch({"epoch": 1} | rows["good"])
        MwT(watch=0).end_epoch({"epoch": 1} | rows["bad"])


def test_a_run_that_collapses_says_so():
    data = load_dataset("digits", image_size=16, device="cpu")
    few = replace(data, train=data.train.select(range(64)))
    model = add_mask_generators(network("vgg12")[0], data.example(), seed=0)
    for generator in mask_generators(model).values(): nn.init.constant_(generator.kernels.bias, -50)
    with pytest.warns(CollapseWarning, match="dead layers"): fit(model, few, Recording(MwT()), epochs=1, device="cpu")


def test_weights_and_settings():
    assert published_weights("resnet18", "svhn") == {"w_cohesion": 1.3, "w_coupling": 1.5}
    assert len(PUBLISHED_WEIGHTS) == 8
    with pytest.raises(ValueError, match="mobilenet"): published_weights("mobilenet", "svhn")
    for options in ({"w_cohesion": -1}, {"w_coupling": math.nan}, {"watch": -1}, {"average": "batch"},
                    {"warmup": 1.5}, {"label_smoothing": 2}):
        with pytest.raises(ValueError, match=next(iter(options))): MwT(**options)
    with pytest.raises(ValueError, match="add_mask_generators"): MwT().prepare(*network("lenet5"))
    assert repr(MwT(watch=5)) == repr(MwT()) and "w_coupling=2.0" in repr(MwT(w_coupling=2.0))
    assert repr(MwT()) == "MwT(average='pairs', w_cohesion=0.5, w_coupling=1.5)" and "warmup" in repr(MwT(warmup=0.1))


def test_published_weights_are_said_once():
    "The printed table and the study that trains by it follow `PUBLISHED_WEIGHTS`"
    printed = {}
    for row in read_published("mwt_table1").itertuples():
        printed.setdefault((row.model, row.dataset), {})["w_" + row.metric.removesuffix("_weight")] = row.value
    assert printed == {pair: published_weights(*pair) for pair in PUBLISHED_WEIGHTS}
    matrix, usual = read_matrix(EXPERIMENTS / "matrix.yaml"), notebook_parameters(EXPERIMENTS / "train.ipynb")
    trained = {}
    for train in (usual | cell.train for cell in study_cells(matrix, "mwt_published", usual)):
        weights = {name: train[name] for name in ("w_cohesion", "w_coupling")}
        if train["system"] == "mwt": trained.setdefault((train["model"], train["dataset"]), []).append(weights)
    assert trained.keys() == PUBLISHED_WEIGHTS.keys()
    for pair, found in trained.items(): assert found == [published_weights(*pair)] * 3, pair


# Modularizing


def small_split(n=40, classes=4, seed=0, size=8):
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, [n, 3, size, size], generator=random, dtype=torch.uint8)
    labels = torch.arange(n) % classes
    images //= (1 + labels)[:, None, None, None] # so that classes differ in brightness
    return Split(images, labels, [f"class {c}" for c in range(classes)], (0.3,) * 3, (0.2,) * 3, 1, True)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
    modular = add_mask_generators(shaken(model), torch.zeros(1, 3, 8, 8), first=True)
    with torch.no_grad():
        for generator in mask_generators(modular).values():
            generator.kernels.weight.mul_(3), generator.kernels.bias.copy_(torch.randn(generator.kernels.bias.shape))
    return modular


def one_by_one(modular, split):
    "Masks of all images, each image alone"
    watched, mean, std = observe_masks(modular.eval()), split.mean[0], split.std[0]
    return [{site: mask[0].detach() for site, mask in watched((image[None] / 255 - mean) / std)[1].items()}
            for image in split.images]


def test_statistics_equal_a_loop(tiny):
    split = small_split()
    rates, soft = mask_statistics(tiny, split, batch_size=7)
    masks = one_by_one(tiny, split)
    for site, c in itertools.product(rates, range(4)):
        of_class = torch.stack([mask[site] for mask, label in zip(masks, split.labels) if label == c])
        torch.testing.assert_close(rates[site][c], (of_class > 0).float().mean(0))
        torch.testing.assert_close(soft[site][c], of_class.mean(0), atol=1e-6, rtol=1e-5)
    spread = torch.cat([rate.flatten() for rate in rates.values()])
    assert ((spread > 0) & (spread < 1)).any()


def test_cohesion_coupling_and_retention_equal_a_loop(tiny):
    split = small_split()
    masks, samples = modularize(tiny, split, 0.8), one_by_one(tiny, split)
    modules = [torch.cat([masks.masks[site][c] for site in masks.masks]) for c in range(4)]
    used = [torch.cat([mask[site] > 0 for site in masks.masks]) for mask in samples]
    cohesions = []
    for c in range(4):
        members = [u & modules[c] for u, label in zip(used, split.labels) if label == c]
        pairs = [set_jaccard(a, b) for a, b in itertools.combinations(members, 2)]
        cohesions.append(sum(pairs) / len(pairs))
    couplings = [set_jaccard(a, b) for a, b in itertools.combinations(modules, 2)]
    found = measure(tiny, split, masks)
    assert found["cohesion"] == pytest.approx(sum(cohesions) / 4) and found["cohesion"] < 1
    assert found["coupling"] == pytest.approx(sum(couplings) / 6)
    assert found["kernel_retention"] == pytest.approx(sum(m.double().mean().item() for m in modules) / 4)
    joined = torch.cat(list(sample_masks(tiny, split, batch_size=7).values()), 1)
    assert torch.equal(joined, torch.stack(used))


def test_batches_are_not_held_beside_what_is_made_of_them():
    made = []
    def parts():
        for start in range(0, 7, 2):
            rows = torch.arange(start, min(start + 2, 7))[:, None].expand(-1, 3).clone()
            made.append(weakref.ref(rows))
            yield {"a": rows}
            del rows
            assert sum(part() is not None for part in made) == 1 # the last one, which the caller still names
    assert stack_batches(parts(), 7)["a"].tolist() == [[n] * 3 for n in range(7)]


def test_augmented_counting_repeats_under_its_generator(tiny):
    split = small_split()
    source = lambda seed: torch.Generator().manual_seed(seed)
    count = lambda seed: mask_statistics(tiny, split, augment=True, generator=source(seed))[1]["3"]
    assert torch.equal(count(1), count(1)) and not torch.equal(count(1), count(2))
    with pytest.raises(ValueError, match="generator"): modularize(tiny, split, augment=True)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.05, 1), st.floats(0.05, 1))
def test_modules_shrink_as_the_threshold_grows(tiny, first, second):
    low, high = sorted((first, second))
    larger, smaller = (modularize(tiny, small_split(), t, empty="none").flat() for t in (low, high))
    assert not (smaller & ~larger).any()


def test_modularizing_leaves_no_trace_and_names_what_is_wrong(tiny):
    split = small_split()
    tiny.train()
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    modularize(tiny, split)
    assert tiny.training and all(torch.equal(t, before[n]) for n, t in tiny.state_dict().items())
    for threshold in (0, 1.1, -1):
        with pytest.raises(ValueError, match="keep_threshold"): modularize(tiny, split, threshold)
    with pytest.raises(ValueError, match="class 1, class 3"): modularize(tiny, split.select(split.labels % 2 == 0))
    masks = modularize(tiny, split)
    other = ModuleMasks({"9": masks.masks["1"]}, masks.classes)
    with pytest.raises(ValueError, match="'9'"): measure(tiny, split, other)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8).map(torch.tensor), st.integers(0, 99))
def test_batch_modularity_equals_a_loop(labels, seed):
    used = torch.rand(len(labels), 6, generator=torch.Generator().manual_seed(seed)) > 0.5
    pairs = {True: [], False: []}
    for i, j in itertools.combinations(range(len(labels)), 2):
        pairs[bool(labels[i] == labels[j])].append(set_jaccard(used[i], used[j]))
    found = batch_modularity(used, labels)
    for name, same in (("sample_cohesion", True), ("sample_coupling", False)):
        assert found[name].item() == pytest.approx(sum(pairs[same]) / max(1, len(pairs[same])))


def test_recording_passes_on_which_epoch_begins():
    class Listening(CrossEntropy):
        def start_epoch(self, epoch, epochs): self._heard = (epoch, epochs)

    objective = Listening()
    Recording(objective).start_epoch(3, 8)
    assert objective._heard == (3, 8)


# Reuse


def random_masks(sites, classes, seed=0):
    random = torch.Generator().manual_seed(seed)
    masks = {site: torch.rand(classes, kernels, generator=random) < 0.4 for site, kernels in sites.items()}
    for mask in masks.values(): mask[:, 0] = True
    return ModuleMasks(masks, [str(c) for c in range(classes)])


@pytest.mark.parametrize("name, floor", [*((name, 0.0) for name in ARCHITECTURES), ("vgg12", 0.3)])
def test_modules_equal_the_masked_oracle(name, floor):
    model, x = network(name)
    modular = add_mask_generators(shaken(model), x, seed=2, floor=floor).eval()
    masks = random_masks(maskable_sites(model, x), 10)
    reuser, columns = Reuser(modular, masks, x), [1, 4, 7]
    keep = masks.keep(columns)
    module = reuser(columns)
    oracle = masked(remove_mask_generators(modular).eval(), keep, x)
    torch.testing.assert_close(module(x), oracle(x)[:, columns], atol=1e-4, rtol=1e-4)
    with_generators = reuser.with_generators(columns)
    torch.testing.assert_close(with_generators(x), masked(modular, keep, x)(x)[:, columns], atol=1e-4, rtol=1e-4)
    size = lambda network: sum(p.numel() for p in network.parameters())
    assert size(module) < size(with_generators) < size(modular)
    soft = {site: torch.rand(mask.shape) for site, mask in masks.masks.items()}
    folded = reuser.folded(columns, (soft, soft), when_on=False)
    factors = {site: values[columns].mean(0) for site, values in soft.items()}
    scaled = masked(fold_masks(remove_mask_generators(modular).eval(), factors), keep, x)
    torch.testing.assert_close(folded(x), scaled(x)[:, columns], atol=1e-4, rtol=1e-4)


def test_generators_that_say_always_the_same_can_be_folded_away():
    model, x = network("rescnn")
    modular = add_mask_generators(shaken(model), x, seed=0).eval()
    with torch.no_grad():
        for generator in mask_generators(modular).values():
            generator.kernels.weight.zero_()
            generator.kernels.bias.copy_(torch.rand(generator.kernels.bias.shape) + 0.1)
    _, soft = observe_masks(modular)(x)
    factors = mean_masks(({site: (mask > 0).float() for site, mask in soft.items()}, soft), [0, 1, 2])
    folded = fold_masks(remove_mask_generators(modular), factors)
    torch.testing.assert_close(folded.eval()(x), modular(x), atol=1e-4, rtol=1e-4)


def test_renormalising_measures_what_training_would_see():
    split, model = small_split(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(),
                                                nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 4))
    x = (split.images / 255 - 0.3) / 0.2
    weights = {name: p.clone() for name, p in model.named_parameters()}
    renormalise(model.train(), split)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model[1].running_var, model[0](x).var((0, 2, 3)), atol=1e-5, rtol=1e-4)
    seen = model[4](torch.relu(nn.functional.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, True)))
    torch.testing.assert_close(model[5].running_mean, seen.mean((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(layer.training for layer in model.modules()) and model[1].momentum == 0.1
    renormalise(model, split, batch_size=13) # 40 images: 10 at a time, never one alone
    assert model[1].num_batches_tracked == 4
    with pytest.raises(ValueError, match="1 image"): renormalise(model, split.select([0]))
    with pytest.raises(ValueError, match="no normalisation"): renormalise(nn.Flatten(), split)


@pytest.fixture(scope="module")
def trained():
    data = load_dataset("digits", valid=0.1)
    options = {"epochs": 5, "batch_size": 64, "lr": 0.1, "schedule": "onecycle", "device": "cpu"}
    standard = create_model("vgg12", width=0.125, seed=0)
    modular = add_mask_generators(standard, data.example(), seed=0)
    histories = [fit(standard, data, Recording(), **options), fit(modular, data, Recording(MwT(0.5, 4.0)), **options)]
    return data, standard, modular, histories


def test_a_short_run_draws_classes_apart(trained):
    data, standard, modular, histories = trained
    found = [measure(model, data.train, modularize(model, data.train)) for model in (standard, modular)]
    for name in ("kernel_retention", "coupling"): assert found[1][name] < found[0][name] - 0.05
    assert evaluate(modular, data.test) > 0.7 and not find_collapse(histories[1].last)
    rows = [history.rows for history in histories]
    assert rows[1][-1]["sample_coupling"] < rows[1][0]["sample_coupling"]
    assert rows[1][-1]["used_kernels"] < rows[0][-1]["used_kernels"]
    assert {"coupling_loss", "kernels_on", "sample_cohesion", "valid_accuracy"} <= {*rows[1][-1]}


def test_all_ways_of_reuse(trained):
    data, standard, modular, _ = trained
    masks, statistics = modularize(modular, data.train), mask_statistics(modular, data.train)
    reuser = Reuser(modular, masks, data.example())
    before = {name: tensor.clone() for name, tensor in modular.state_dict().items()}
    found = compare_reuse(reuser, statistics, data, ["3", "0"], standard, epochs=3, batch_size=32)
    assert found["tuned"] > 0.9 and found["modular"] > 0.8 and all(0 <= value <= 1 for value in found.values())
    assert found["kernel_retention"] < 1
    assert all(torch.equal(t, before[n]) for n, t in modular.state_dict().items()), "reuse changed the modular model"
    fewer = compare_reuse(reuser, statistics, data, ["3", "0"], variants=["untuned"])
    assert fewer.keys() == {"untuned", "kernel_retention"}


@pytest.mark.parametrize("head", ["rows", "paper", "released"])
def test_heads_and_tuning_choose_by_validation_alone(trained, head):
    data, _, modular, _ = trained
    reuser = Reuser(modular, modularize(modular, data.train), data.example())
    module, part = reuser([1, 7], head), data.subtask([1, 7])
    assert module.classes == ["1", "7"] and module(data.example(5)).shape == (5, 2)
    blind = replace(part, test=part.test.select([]))
    history = fine_tune(module, blind, epochs=3, batch_size=32)
    chosen = [row for row in history.rows if row["selected"]]
    assert len(history) == 3 and len(chosen) == 1 and not module.training
    assert chosen[0]["valid_accuracy"] == max(history.column("valid_accuracy"))
    assert evaluate(module, part.valid) == pytest.approx(chosen[0]["valid_accuracy"])


def test_tuning_without_validation_images_takes_the_last_epoch(trained):
    data, _, modular, _ = trained
    module = Reuser(modular, modularize(modular, data.train), data.example())([1, 7])
    part = data.subtask([1, 7])
    history = fine_tune(module, replace(part, valid=part.valid.select([])), epochs=2)
    assert [row["selected"] for row in history.rows] == [False, True]


def test_the_released_protocol_chooses_by_test_images_and_stops_half_way(trained):
    data, _, modular, _ = trained
    reuser, part = Reuser(modular, modularize(modular, data.train), data.example()), data.subtask([1, 7])
    module = reuser([1, 7], "released")
    history = fine_tune_selected_on_test(module, part, epochs=4)
    assert len(history) == 4 and history.rows[0]["lr"] == 0.05
    assert history.rows[-1]["lr"] == pytest.approx(0.05 * (1 + math.cos(math.pi * 3 / 8)) / 2)
    assert evaluate(module, part.test) == pytest.approx(max(history.column("test_accuracy")))


def test_one_training_is_judged_by_every_rule(trained):
    data, _, modular, _ = trained
    reuser, part = Reuser(modular, modularize(modular, data.train), data.example()), data.subtask([1, 7])
    settings = tuning_settings(4, 0.05, "to half", batch_size=32)
    module = reuser([1, 7])
    history, states = tune(module, part, settings, 4, ["last", "test", "valid"])
    assert len(history) == 4 and [row["selected"] for row in history.rows] == [False] * 3 + [True]
    assert all(torch.equal(states["last"][name], value) for name, value in module.state_dict().items())
    best = {"test": max(history.column("test_accuracy")), "valid": max(history.column("valid_accuracy"))}
    for rule, accuracy in best.items():
        module.load_state_dict(states[rule])
        assert evaluate(module, getattr(part, rule)) == pytest.approx(accuracy)
    alone = fine_tune(again := reuser([1, 7]), part, 4, 0.05, 32, select="last", falls="to half", precision="float32")
    assert "test_accuracy" not in alone.last, "looked at by the rule that asks for it alone"
    assert all(torch.equal(states["last"][name], value) for name, value in again.state_dict().items())
    with pytest.raises(ValueError, match="no selection 'best'"): tune(module, part, settings, 4, ["best"])


def test_recorded_test_accuracy_changes_nothing(trained):
    data, _, _, _ = trained
    runs, options = {}, {"epochs": 2, "batch_size": 64, "lr": 0.1, "device": "cpu"}
    for name, test in (("with", data.test), ("without", None)):
        model = create_model("vgg12", width=0.125, seed=0)
        runs[name] = model, fit(model, data, Recording(test=test), **options)
    (model, told), (other, untold) = runs.values()
    assert told.last["test_accuracy"] == pytest.approx(evaluate(model, data.test))
    assert told.column("loss") == untold.column("loss") and "test_accuracy" not in untold.last
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_bad_subtasks_and_masks(trained):
    data, standard, modular, _ = trained
    masks = modularize(modular, data.train)
    reuser = Reuser(modular, masks, data.example())
    bad = ((["3"], "two classes"), (["three"], "three"), ([3, 3], "more than once"), ([], "no class"))
    for classes, message in bad:
        with pytest.raises(ValueError, match=message): reuser(classes)
    with pytest.raises(ValueError, match="rows, paper, released"): reuser([1, 2], "new")
    with pytest.raises(ValueError, match="no mask generators"): Reuser(standard, masks, data.example())
    wide = create_model("vgg12", width=0.25)
    with pytest.raises(ValueError, match="another model"):
        Reuser(add_mask_generators(wide, data.example()), masks, data.example())
    for own in (remove_mask_generators(modular), standard): compose(own, masks, ["3", "7"], data.example())
    with pytest.raises(ValueError, match="masks are of another network"):
        compose(wide, masks, ["3", "7"], data.example())
    with pytest.raises(ValueError, match="masks are of another network"):
        compose(wide, modularize(standard, data.train), ["3", "7"], data.example())


# Linear layers at every position of a sequence or a map, and layers that know their mode

def small_transformer(): return create_model("vit_small", width=0.05, image_size=16, depth=2, seed=0)


def small_convnext(): return create_model("convnext_tiny", width=0.05, image_size=16, depth=3, dropout=0.4, seed=0)


def small_swin():
    torch.manual_seed(0)
    swin = import_torchvision().models.SwinTransformer
    return swin([2, 2], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.4, num_classes=10)


positioned = pytest.mark.parametrize("build", [Tokens, LastChannels, small_transformer, small_convnext, small_swin])


def with_random_head(model):
    "A transformer's last layer begins with zeros, which would hide all mistakes before it"
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.normal_(last.weight)
    return model


def positions(images=5): return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_which_layers_over_positions_have_a_generator():
    assert maskable_sites(Tokens(), positions()) == {"up": 9, "down": 6, "wide": 7}, "the head sees but one token"
    assert maskable_sites(LastChannels(), positions()) == {"depthwise": 6, "up": 9, "down": 6, "wide": 7}
    assert list(maskable_sites(Tokens(), positions(), first=True)) == ["patches", "up", "down", "wide"]


@positioned
def test_open_masks_over_positions_change_nothing_and_the_way_back_neither(build):
    model = with_random_head(build()).eval()
    modular = add_mask_generators(model, positions(), seed=0)
    for generator in mask_generators(modular).values(): nn.init.constant_(generator.kernels.bias, 1000)
    with torch.no_grad():
        torch.testing.assert_close(modular(positions()), model(positions()), atol=1e-5, rtol=1e-5)
        assert torch.equal(remove_mask_generators(modular).eval()(positions()), model(positions()))


@pytest.mark.parametrize("kind", [Tokens, LastChannels])
def test_masks_over_positions_by_hand(kind):
    "The generator looks at the mean over positions of what the layer reads, and scales what the layer gives"
    torch.manual_seed(0)
    model = kind().eval()
    modular, images, seen = add_mask_generators(model, positions(), seed=0).eval(), positions(), {}
    generators = mask_generators(modular)
    for generator in generators.values(): nn.init.zeros_(generator.kernels.bias) # so that some kernels are off
    _, soft = observe_masks(modular)(images)
    def scale(layer, args, out, site):
        spread = args[0].flatten(2).mean(2) if isinstance(layer, nn.Conv2d) else args[0].flatten(1, -2).mean(1)
        generator = generators[site]
        hidden = (spread @ generator.hidden.weight.T).clamp(min=0)
        seen[site] = (hidden @ generator.kernels.weight.T + generator.kernels.bias).tanh().clamp(min=0)
        if isinstance(layer, nn.Conv2d): return out * seen[site][:, :, None, None]
        return out * seen[site].view(len(out), *[1] * (out.ndim - 2), -1)
    for site in generators:
        model.get_submodule(site).register_forward_hook(lambda *call, site=site: scale(*call, site=site))
    with torch.no_grad(): torch.testing.assert_close(modular(images), model(images), atol=1e-5, rtol=1e-5)
    for site, mask in soft.items(): torch.testing.assert_close(mask, seen[site], atol=1e-6, rtol=1e-5)
    assert any((mask == 0).any() for mask in soft.values()) and all((mask > 0).any() for mask in soft.values())


@positioned
def test_losses_over_positions_reach_every_generator_and_a_shorter_step_is_the_same(build):
    model, labels = build(), torch.tensor([0, 1, 1, 0, 1])
    modular = add_mask_generators(model, positions(), seed=0).eval()
    with torch.no_grad():
        views = observe_masks(modular), fuse_scaling(observe_masks(modular))
        (logits, soft), (same, _) = (view(positions()) for view in views)
    torch.testing.assert_close(logits, same)
    objective = MwT()
    _, terms = objective(logits, labels, soft)
    within, between = slow_mean_cosines([mask.double() for mask in soft.values()], labels)
    assert abs(terms["cohesion_loss"] - (1 - within)) < 1e-5 and abs(terms["coupling_loss"] - between) < 1e-5
    trained, soft = objective.prepare(modular.train(), positions())(positions())
    objective(trained, labels, soft)[0].backward()
    assert all(p.grad is not None for generator in mask_generators(modular).values() for p in generator.parameters())


@positioned
@pytest.mark.parametrize("seed", [0, 1])
def test_modules_of_positions_equal_the_masked_network(build, seed):
    model = with_random_head(build()).eval()
    modular = add_mask_generators(model, positions(), seed=seed).eval()
    masks, classes = random_masks(maskable_sites(model, positions()), 4), [2, 0]
    reuser = Reuser(modular, masks, positions())
    with torch.no_grad():
        for made, whole in ((reuser(classes), reuser.plain), (reuser.with_generators(classes), modular)):
            expected = masked(whole, masks.keep(classes), positions())(positions())[:, sorted(classes)]
            torch.testing.assert_close(made(positions()), expected, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in reuser(classes).parameters()) < sum(p.numel() for p in model.parameters())


def test_modules_of_a_transformer_are_what_its_generators_say():
    torch.manual_seed(0)
    split = Split(torch.randint(256, [20, 3, 16, 16], dtype=torch.uint8), torch.arange(20) % 2, ["a", "b"],
                  mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=2, flip=True)
    modular = add_mask_generators(small_transformer(), positions(), seed=0).eval()
    used, (images, labels) = sample_masks(modular, split), next(batches(split, 20))
    with torch.no_grad(): _, soft = observe_masks(modular)(images)
    found = modularize(modular, split, 0.7, empty="none")
    for site, mask in soft.items():
        assert torch.equal(used[site], mask > 0)
        rates = torch.stack([(mask > 0)[labels == c].float().mean(0) for c in range(2)])
        assert torch.equal(found.masks[site], rates >= 0.7 - 1e-6)
    plain = sample_masks(remove_mask_generators(modular), split)
    assert {site: on.shape[1] for site, on in plain.items()} == found.sites, "units, not tokens"


def test_a_branch_that_images_skip_in_training_stays_one():
    model = small_convnext()
    modular = add_mask_generators(model, positions(), seed=0)
    twins = positions(1).expand(64, -1, -1, -1)
    apart = lambda mode: (logits := modular.train(mode)(twins)).sub(logits[:1]).abs().amax().item()
    with torch.random.fork_rng(), torch.no_grad():
        nn.init.normal_(modular.get_submodule("classifier.2").weight)
        torch.manual_seed(0)
        assert apart(True) > 1e-3 and apart(False) < 1e-4


def test_a_layer_that_computes_otherwise_in_training_is_named():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x): return self.down(F.dropout(self.up(x).relu(), 0.5, self.training))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mlp, self.head = nn.Conv2d(3, 6, 4, stride=4), Dropping(), nn.Linear(6, 4)

        def forward(self, x): return self.head(self.mlp(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    with pytest.raises(ValueError, match="'mlp' .Dropping. computes 'dropout = .*True.*nn.Dropout"):
        add_mask_generators(Outer(), positions())
