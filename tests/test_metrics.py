"""Metrics against loops over sets, closed formulas and extracted networks."""

import copy
import itertools
import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from references import set_jaccard
from torch import nn

from modnb.extract import Anatomy, EmptyModule, extract
from modnb.masks import ModuleMasks, threshold_masks
from modnb.metrics import (
    accuracy,
    class_retentions,
    cohesion,
    costs,
    count_flops,
    count_weights,
    coupling,
    jaccard,
    kernel_retention,
    kernel_totals,
    latency,
    mean_overlap,
    mean_pair_jaccard,
    module_size,
    overlap,
)
from modnb.models import create_model
from modnb.units import unit_sites

EXAMPLE = torch.zeros(2, 3, 32, 32)
logging.getLogger("fvcore").setLevel(logging.ERROR)


def draw_bits(seed, *shape, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def draw_masks(sites, classes, seed, share=0.5):
    masks = {site: draw_bits(seed + number, classes, units, share=share)
             for number, (site, units) in enumerate(sites.items())}
    for mask in masks.values(): mask[:, 0] |= ~mask.any(1) # no empty layer
    return ModuleMasks(masks, [f"class {c}" for c in range(classes)])


bits = st.builds(draw_bits, st.integers(0, 2**20), st.integers(2, 9), st.integers(1, 6),
                 share=st.sampled_from((0.1, 0.5, 0.9)))


@settings(max_examples=50, deadline=None)
@given(bits)
def test_jaccard_equals_sets_is_symmetric_and_one_with_itself(masks):
    found = jaccard(masks)
    for i, j in itertools.product(range(len(masks)), repeat=2):
        assert abs(found[i, j] - set_jaccard(masks[i], masks[j])) < 1e-12
    assert torch.equal(found, found.T) and found.diagonal().eq(1).all()
    torch.testing.assert_close(jaccard(masks[:1], masks), found[:1])


@settings(max_examples=50, deadline=None)
@given(bits, st.integers(1, 10))
def test_pairs_are_averaged_exactly_in_blocks_of_any_size(masks, block):
    slow = [set_jaccard(a, b) for a, b in itertools.combinations(masks, 2)]
    assert abs(mean_pair_jaccard(masks, block) - sum(slow) / len(slow)) < 1e-12
    assert abs(coupling(masks) - sum(slow) / len(slow)) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**20), st.lists(st.integers(0, 3), min_size=2, max_size=12), st.booleans(), st.integers(1, 5))
def test_cohesion_equals_a_loop(seed, labels, with_modules, block):
    samples, modules = draw_bits(seed, len(labels), 7), draw_bits(seed + 1, 4, 7)
    classes = {}
    for c in set(labels):
        members = [sample for sample, label in zip(samples, labels) if label == c]
        if with_modules: members = [sample & modules[c] for sample in members]
        pairs = [set_jaccard(a, b) for a, b in itertools.combinations(members, 2)]
        if pairs: classes[c] = sum(pairs) / len(pairs)
    arguments = samples, torch.tensor(labels), modules if with_modules else None
    if not classes:
        with pytest.raises(ValueError, match="no class has two images"): cohesion(*arguments)
        return
    assert abs(cohesion(*arguments, block=block) - sum(classes.values()) / len(classes)) < 1e-12
    assert cohesion(*arguments, per_class=True) == pytest.approx(classes)


def test_extremes():
    same, apart, labels = torch.ones(3, 6, dtype=torch.bool), torch.eye(3, dtype=torch.bool), torch.zeros(3).long()
    assert coupling(same) == 1 and coupling(apart) == 0
    assert cohesion(same, labels) == 1 and cohesion(apart, labels) == 0
    assert cohesion(~same, labels) == 1 # empty masks are the same mask, not NaN
    masks = ModuleMasks({"a": apart, "b": same}, ["x", "y", "z"])
    assert coupling(masks) == coupling(masks.flat()) == pytest.approx(6 / 8)


def test_accuracy():
    logits = torch.tensor([[1., 0, 0], [0, 2, 1], [0, 3, 1], [5, 5, 6]])
    assert accuracy(logits, torch.tensor([0, 1, 2, 2])) == 0.75
    for labels in (torch.tensor([0]), torch.zeros(0, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"\[N, C\]"): accuracy(logits, labels)
    with pytest.raises(ValueError, match="N > 0"): accuracy(logits[:0], torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("name, paper, network, masked", [
    ("vgg16", 4224, 4224, 4160), ("simcnn", 4224, 4224, 4160), ("rescnn", 4288, 4288, 4224),
    ("resnet18", 3904, 4800, 4736)])
def test_kernel_counts_are_the_published_ones(name, paper, network, masked):
    model = create_model(name)
    assert kernel_totals(model, EXAMPLE) == {"paper": paper, "network": network}
    assert sum(list(unit_sites(model, EXAMPLE, kind="norm").values())[1:]) == masked # without the first convolution


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_retention_counts_unmasked_kernels_as_kept(name):
    model = create_model(name, width=0.125, seed=0)
    sites = unit_sites(model, EXAMPLE, kind="norm")
    masks = draw_masks(dict(list(sites.items())[1:]), 3, seed=1)
    kept, units = masks.flat().sum(1).double(), masks.flat().shape[1]
    assert kernel_retention(masks) == pytest.approx((kept / units).mean().item())
    found = {kind: kernel_retention(masks, None, kind, model, EXAMPLE) for kind in ("paper", "network")}
    assert found["network"] == pytest.approx(((kept + 8) / (units + 8)).mean().item())
    counted = masks.only(site for site in masks.masks if "shortcut" not in site).flat().sum(1).double()
    assert found["paper"] == pytest.approx(((counted + 8) / kernel_totals(model, EXAMPLE)["paper"]).mean().item())
    union = torch.cat(list(masks.keep([0, 2]).values()))
    assert kernel_retention(masks, ["class 2", "class 0"]) == pytest.approx(union.double().mean().item())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.floats(0.01, 1), st.floats(0.01, 1))
def test_retention_falls_as_the_threshold_grows(seed, first, second):
    rates = {"a": torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))}
    low, high = (kernel_retention(threshold_masks(rates, ["x", "y", "z"], threshold, empty="none"))
                 for threshold in sorted((first, second)))
    assert low >= high


def test_all_ones_keep_everything():
    model = create_model("resnet18", width=0.125, num_classes=3)
    sites = unit_sites(model, EXAMPLE)
    masks = ModuleMasks({site: torch.ones(3, units, dtype=torch.bool) for site, units in sites.items()}, list("abc"))
    for denominator in ("masked", "paper", "network"):
        assert kernel_retention(masks, None, denominator, model, EXAMPLE) == 1
        assert kernel_retention(masks, "b", denominator, model, EXAMPLE) == 1
    head = model.classifier.linear1
    without = 1 - (2 * head.in_features + 2) / sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(module_size(model, masks, EXAMPLE), torch.full([3], without, dtype=torch.float64))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.side, self.relu, self.last = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ReLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = self.relu(self.norm(self.first(x)))
        return self.head(self.last(self.second(y) + self.side(x)).mean((2, 3)))


NETWORKS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(),
                                   nn.Flatten(), nn.Linear(80, 6), nn.ReLU(), nn.Linear(6, 3)),
    "residual": Residual,
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(),
                                     nn.Conv2d(9, 9, 3, groups=9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(9, 3)),
}


def number_weights(model):
    "Give every parameter entry a number of its own, from 1."
    start = 1
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape))
            start += parameter.numel()
    return start - 1


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from((0.5, 0.7, 0.9)))
def test_size_and_overlap_equal_sets_of_numbered_weights(name, seed, share):
    model, example = NETWORKS[name](), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    total = number_weights(model)
    masks = draw_masks(unit_sites(model, example), 3, seed, share)
    try: modules = [extract(model, masks.keep([c]), example, outputs=[c]) for c in range(3)]
    except EmptyModule: reject() # masks of successive layers that leave nothing
    numbers = [torch.cat([weights.flatten() for weights in module.parameters()]).tolist() for module in modules]
    owned = [{*map(int, found)} - {0} for found in numbers] # 0 fills up unequal groups
    shared = torch.tensor([[len(a & b) for b in owned] for a in owned]).double() / total
    found = overlap(model, masks, example)
    torch.testing.assert_close(found, shared, atol=1e-12, rtol=0)
    torch.testing.assert_close(module_size(model, masks, example), found.diagonal())
    assert mean_overlap(found) == pytest.approx((found.sum() - found.trace()).item() / 6)


def test_overlap_is_symmetric_and_no_larger_than_either_module():
    model = create_model("mobilenet", width=0.125, num_classes=4, seed=0)
    masks = draw_masks(unit_sites(model, EXAMPLE), 4, seed=5, share=0.8)
    found, sizes = overlap(model, masks, EXAMPLE), module_size(model, masks, EXAMPLE)
    assert torch.equal(found, found.T) and 0 < found.min() and found.max() < 1
    assert (found <= torch.minimum(sizes[:, None], sizes) + 1e-12).all()


@pytest.mark.parametrize("name, published", [("vgg16", 315.11), ("resnet18", 558.50)])
def test_flops_are_the_published_ones(name, published):
    assert round(count_flops(create_model(name), EXAMPLE) / 1e6, 2) == published


def test_flops_by_closed_formula():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Flatten(), nn.Linear(8 * 7 * 7, 5))
    dense = 16 * 16 * 8 * 3 * 9 + 7 * 7 * 8 * 2 * 9 + 8 * 7 * 7 * 5
    for size in (1, 2, 7):
        example = torch.zeros(size, 3, 16, 16)
        assert count_flops(model, example, "train") == dense + 5 * 8 * 16 * 16
        assert count_flops(model, example, "eval") == dense + 2 * 8 * 16 * 16


def test_counting_flops_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Flatten())
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    count_flops(model, torch.zeros(1, 3, 8, 8))
    assert torch.equal(random, torch.random.get_rng_state())
    assert [layer.training for layer in model] == [True, False, True, True, True]
    for name, tensor in model.state_dict().items(): assert torch.equal(tensor, before[name])
    assert not any(parameter.grad is not None for parameter in model.parameters())


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**20))
def test_a_module_needs_no_more_flops_than_its_model(seed):
    model = create_model("vgg12", width=0.125, num_classes=3, seed=0)
    example = torch.zeros(1, 3, 16, 16)
    masks = draw_masks(unit_sites(model, example), 3, seed, share=0.7)
    one, two = (count_flops(extract(model, masks.keep(range(n)), example, outputs=range(n)), example) for n in (1, 2))
    assert one <= two <= count_flops(model, example)


def by_fvcore(model: nn.Module, example: torch.Tensor, mode: str) -> int:
    "The counter of the papers."
    model = copy.deepcopy(model).train(mode == "train")
    with torch.no_grad():
        analysis = FlopCountAnalysis(model, torch.zeros(2, *example.shape[1:]))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return round(analysis.total() / 2)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["simcnn", "rescnn", "resnet18", "mobilenet", "convnext_tiny", "vit_small", "mixed"])
def test_flops_are_those_of_fvcore(name, mode):
    mixed = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True),
        nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.AdaptiveAvgPool2d(3),
        nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(100, 5), nn.LayerNorm(5), nn.BatchNorm1d(5))
    model = mixed if name == "mixed" else create_model(name, width=0.0625, seed=0)
    example = torch.zeros(1, 3, 32, 32) if name != "mixed" else torch.zeros(1, 3, 16, 16)
    assert count_flops(model, example, mode) == by_fvcore(model, example, mode) > 0


def test_latency_reports_milliseconds_and_keeps_modes():
    calls = []

    class Layer(nn.Module):
        def forward(self, x):
            calls.append((self.training, torch.is_grad_enabled()))
            return x

    model = nn.Sequential(Layer(), nn.Linear(3, 3))
    found = latency(model, torch.zeros(2, 3), warmup=2, repeats=4)
    assert list(found) == ["median_ms", "p95_ms"] and 0 < found["median_ms"] <= found["p95_ms"]
    assert calls == [(False, False)] * 6 and model.training and model[0].training


def test_costs_times_networks_in_turns():
    calls = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.layer, self.tied = name, nn.Linear(3, 4), None

        def forward(self, x):
            calls.append(self.name)
            return self.layer(x)

    a, b = Named("a"), Named("b")
    b.tied = b.layer
    found = costs({"first": a, "second": b}, torch.zeros(2, 3), rounds=3, repeats=2)
    assert calls[:24] == (["a"] * 4 + ["b"] * 4) * 3, "two runs to warm up, two that are timed"
    assert [(row["weights"], row["multiply_adds"]) for row in found.values()] == [(16, 12)] * 2
    assert count_weights(b) == 16 and all(row["median_ms"] > 0 for row in found.values()) and a.training


@pytest.mark.parametrize("call, message", [
    (lambda: jaccard(torch.rand(2, 3)), "must be bool"),
    (lambda: jaccard(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)), r"bool \[N, 3\]"),
    (lambda: coupling(torch.ones(1, 3, dtype=torch.bool)), "at least two"),
    (lambda: coupling(torch.rand(3, 3)), "must be bool"),
    (lambda: cohesion(torch.rand(2, 3), torch.tensor([0, 0])), "sample_masks must be bool"),
    (lambda: cohesion(draw_bits(0, 2, 3), torch.tensor([0, 5]), draw_bits(0, 2, 3)), r"each of the labels \[0, 5\]"),
    (lambda: cohesion(draw_bits(0, 2, 3), torch.tensor([0, 0]), draw_bits(0, 2, 4)), r"\[C, 3\]"),
    (lambda: mean_pair_jaccard(draw_bits(0, 1, 3)), "only 1"),
    (lambda: kernel_retention(ModuleMasks({"a": draw_bits(0, 2, 3)}, ["x", "y"]), denominator="paper"), "needs model"),
    (lambda: kernel_retention(ModuleMasks({"a": draw_bits(0, 2, 3)}, ["x", "y"]), denominator="mask"), "masked"),
    (lambda: kernel_retention(ModuleMasks({"a": draw_bits(0, 2, 3)}, ["x", "y"]), ["z"]), "x, y"),
    (lambda: count_flops(nn.Linear(2, 2), torch.zeros(1, 2), "test"), "train, eval"),
    (lambda: latency(nn.Linear(2, 2), torch.zeros(1, 2), repeats=0), "repeats >= 1"),
    (lambda: costs({"a": nn.Linear(2, 2)}, torch.zeros(1, 2), rounds=0), "rounds must be >= 1"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message): call()


@pytest.mark.parametrize("denominator", ["masked", "paper", "network"])
def test_kernels_of_all_classes_are_counted_with_one_trace(denominator, monkeypatch):
    model, traced = create_model("lenet5", width=1.0, image_size=32), []
    bits = {site: draw_bits(7, 4, units) for site, units in unit_sites(model, EXAMPLE).items()}
    for mask in bits.values(): mask[:, 0] = True
    masks = ModuleMasks(bits, list("abcd"))
    single = [kernel_retention(masks, [name], denominator, model, EXAMPLE) for name in masks.classes]
    monkeypatch.setattr("modnb.metrics.Anatomy", lambda *given: traced.append(given) or Anatomy(*given))
    assert class_retentions(masks, denominator, model, EXAMPLE) == single
    assert len(set(single)) > 1 and len(traced) == (denominator != "masked")
