"""MODA's losses and decomposition against slow forms, and through a short training run."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import CountOperations, LastChannels, Tokens, slow_mean_cosines
from torch import nn

from modnb.compose import compose
from modnb.data import Split, Stream, batches, load_dataset
from modnb.moda.decompose import activation_rates, decompose
from modnb.moda.losses import (
    FORMS,
    MODA,
    affinity_loss,
    compactness,
    dispersion_loss,
    image_weights,
    observe_activations,
    unit_activations,
)
from modnb.moda.residual import contributions, lead
from modnb.models import create_model
from modnb.objectives import CrossEntropy
from modnb.prediction import evaluate
from modnb.similarity import AVERAGES
from modnb.training import fit
from modnb.units import observe, site_axes, unit_sites

batch = st.fixed_dictionaries({
    "seed": st.integers(0, 2**20), "widths": st.lists(st.integers(1, 6), min_size=1, max_size=4),
    "labels": st.lists(st.integers(0, 3), min_size=1, max_size=10).map(torch.tensor)})


def draw(batch, dtype=torch.float64):
    random = torch.Generator().manual_seed(batch["seed"])
    return [torch.randn(len(batch["labels"]), width, generator=random, dtype=dtype) for width in batch["widths"]]


def slow_compactness(rows, labels, form):
    if form == "mean": return sum(row.abs().sum() / row.numel() for row in rows) / len(rows)
    layers = []
    for row in rows:
        classes = [torch.stack([image.abs().sum() for image, label in zip(row, labels) if label == c]).mean()
                   for c in set(labels.tolist())]
        layers.append(torch.stack(classes).mean())
    return torch.stack(layers).mean()


@settings(max_examples=50, deadline=None)
@given(batch, st.sampled_from(FORMS))
def test_compactness_equals_a_loop(batch, form):
    rows = [row.requires_grad_() for row in draw(batch)]
    fast, slow = compactness(rows, batch["labels"], form), slow_compactness(rows, batch["labels"], form)
    assert abs(fast - slow) < 1e-12
    for a, b in zip(torch.autograd.grad(fast, rows), torch.autograd.grad(slow, rows)): torch.testing.assert_close(a, b)


@settings(max_examples=30, deadline=None)
@given(batch, st.sampled_from(FORMS), st.floats(0.1, 10), st.integers(0, 99))
def test_compactness_knows_no_order_but_scale(batch, form, scale, seed):
    rows, labels = draw(batch), batch["labels"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    expected = compactness(rows, labels, form)
    torch.testing.assert_close(compactness([row[order] for row in rows], labels[order], form), expected)
    torch.testing.assert_close(compactness([scale * row for row in rows], labels, form), scale * expected)


@settings(max_examples=30, deadline=None)
@given(batch, st.sampled_from(AVERAGES))
def test_affinity_and_dispersion_are_means_of_cosines(batch, average):
    rows, labels = draw(batch), batch["labels"]
    within, between = slow_mean_cosines(rows, labels, average)
    some = any(labels.tolist().count(label) > 1 for label in labels.tolist())
    assert abs(affinity_loss(rows, labels, average) - (1 - within if some else 0)) < 1e-10
    assert abs(dispersion_loss(rows, labels, average) - between) < 1e-10


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
def test_bounds_without_negative_activations(labels):
    rows, labels = [torch.rand(4, 6), torch.rand(4, 3)], torch.tensor(labels)
    for loss in (affinity_loss, dispersion_loss): assert 0 <= loss(rows, labels) <= 1 + 1e-6


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).map(torch.tensor))
@settings(max_examples=30, deadline=None)
def test_image_weights_add_up_to_one_in_all_and_equally_by_class(labels):
    weights = image_weights(labels, 5, torch.float64)
    present = labels.unique()
    assert abs(weights.sum() - 1) < 1e-12
    for c in present: assert abs(weights[labels == c].sum() - 1 / len(present)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unit_activations(dtype):
    maps = torch.randn(3, 4, 5, 6).to(dtype)
    found = unit_activations(maps)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), maps.double().abs().mean((2, 3)), atol=1e-6, rtol=1e-6)
    positive = maps.relu()
    torch.testing.assert_close(unit_activations(positive, signed=False), unit_activations(positive))
    neurons = torch.randn(3, 4).to(dtype)
    assert unit_activations(neurons) is neurons
    for wrong in (torch.rand(3), torch.rand(3, 4, 5), torch.rand(2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match="B, K, H, W"): unit_activations(wrong)


def test_gradient_reaches_every_pixel_that_is_not_zero():
    maps = torch.randn(4, 3, 2, 2).relu().requires_grad_()
    compactness([unit_activations(maps)]).backward()
    torch.testing.assert_close(maps.grad, (maps > 0) / maps.numel())


def test_leaving_the_absolute_value_out_behind_a_relu_changes_no_gradient():
    model, labels = create_model("lenet5", num_classes=3, width=0.5, seed=0).double(), torch.arange(8) % 3
    images, gradients = torch.randn(8, 3, 32, 32, dtype=torch.float64), []
    sites, objective = list(unit_sites(model, images[:2])), MODA()
    network = objective.prepare(model, images[:2])
    assert objective._unsigned == set(sites)
    for view in (network, observe_activations(model, sites), observe(model, sites)):
        logits, observed = view(images)
        gradients.append(torch.autograd.grad(objective(logits, labels, observed)[0], list(model.parameters())))
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other): torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_negative_activations_keep_their_absolute_value():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(144, 2))
    objective = MODA()
    network = objective.prepare(model, torch.zeros(2, 3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    maps = model[:2](images)
    assert maps.min() < 0
    _, terms = objective(*network(images)[:1], torch.tensor([0, 1, 0, 1]), network(images)[1])
    torch.testing.assert_close(terms["compactness"], maps.abs().mean())


@pytest.mark.parametrize("name, number", [("vgg16_4096", 15), ("resnet18", 17), ("mobilenet", 27), ("lenet5", 4)])
def test_it_looks_behind_every_activation_but_not_at_the_logits(name, number):
    model = create_model(name, width=0.125, seed=0)
    network = MODA().prepare(model.train(), torch.zeros(2, 3, 32, 32))
    logits, observed = network(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10) and len(observed) == number
    assert all(activation.ge(0).all() for activation in observed.values())
    assert {*network.parameters()} == {*model.parameters()}


def test_loss_is_the_weighted_sum_of_its_terms_and_terms_stay_tensors():
    objective = MODA(affinity=2.0, dispersion=3.0, compactness=0.5)
    observed = {"a": torch.rand(8, 4, 3, 3), "b": torch.rand(8, 5)}
    logits, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 4
    loss, terms = objective(logits, labels, observed)
    assert list(terms) == ["cross_entropy", "affinity", "dispersion", "compactness"]
    assert all(isinstance(term, torch.Tensor) and term.ndim == 0 for term in terms.values())
    expected = terms["cross_entropy"] + 2 * terms["affinity"] + 3 * terms["dispersion"] + 0.5 * terms["compactness"]
    torch.testing.assert_close(loss, expected)
    rows = [unit_activations(activation) for activation in observed.values()]
    torch.testing.assert_close(terms["affinity"], affinity_loss(rows, labels))
    torch.testing.assert_close(terms["dispersion"], dispersion_loss(rows, labels))
    torch.testing.assert_close(terms["compactness"], compactness(rows))


def test_as_published_the_loss_is_the_plain_sum_bit_for_bit():
    observed, logits = {"a": torch.rand(8, 4).relu()}, torch.randn(8, 4)
    labels, objective = torch.arange(8) % 4, MODA(0.7, 1.3, 0.3)
    objective.start_epoch(1, 10)
    loss, terms = objective(logits, labels, observed)
    assert torch.equal(terms["cross_entropy"], nn.functional.cross_entropy(logits, labels))
    by_hand = terms["cross_entropy"] + 0.7 * terms["affinity"] + 1.3 * terms["dispersion"] + 0.3 * terms["compactness"]
    assert torch.equal(loss, by_hand)


@pytest.mark.parametrize("epoch, share", [(1, 0), (3, 0.5), (5, 1), (8, 1)])
def test_the_weights_rise_in_a_warm_up_and_labels_are_smoothed(epoch, share):
    observed, logits, labels = {"a": torch.rand(8, 4)}, torch.randn(8, 4), torch.arange(8) % 4
    objective = MODA(warmup=0.5, label_smoothing=0.2)
    objective.start_epoch(epoch, 8)
    loss, terms = objective(logits, labels, observed)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    expected = expected + share * (terms["affinity"] + terms["dispersion"] + 0.3 * terms["compactness"])
    torch.testing.assert_close(loss, expected)


def test_zero_weights_are_standard_training():
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    loss, _ = MODA(0.0, 0.0, 0.0)(logits, labels, {"a": torch.rand(8, 4, 3, 3)})
    torch.testing.assert_close(loss, CrossEntropy()(logits, labels, {})[0])


def test_the_loss_does_not_wait_for_the_device():
    observed = {str(k): torch.rand(64, k, 4, 4) for k in (8, 16, 32, 64)}
    logits, labels = torch.randn(64, 10), torch.arange(64) % 10
    MODA()(logits, labels, observed)
    with CountOperations() as count: MODA()(logits, labels, observed)
    waiting = ("nonzero", "masked_select", "index.", "_local_scalar_dense", "item")
    assert not [name for name in count.names if name.startswith(waiting)]


@pytest.mark.parametrize("options, message", [
    ({"affinity": -1}, "affinity"), ({"dispersion": math.nan}, "dispersion"),
    ({"compactness": math.inf}, "compactness"),
    ({"average": "batch"}, "pairs, classes"), ({"compactness_form": "L1"}, "mean, l1"),
    ({"warmup": 2}, "warmup must be between 0 and 1"), ({"label_smoothing": -1}, "label_smoothing")])
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message): MODA(**options)


def test_unknown_sites_and_networks_without_activations():
    example = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match="features.relu1"):
        MODA(sites=["features.relu"]).prepare(create_model("lenet5"), example)
    with pytest.raises(ValueError, match="no activation function"):
        MODA().prepare(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), example)
    with pytest.raises(ValueError, match="labels"): compactness([torch.rand(2, 3)], form="l1")


def test_repr_names_all_settings():
    text = repr(MODA(dispersion=2.0, sites=["relu1"]))
    for part in ("affinity=1.0", "dispersion=2.0", "compactness=0.3", "'pairs'", "'mean'", "relu1"): assert part in text
    assert repr(MODA()) != repr(MODA(compactness_form="l1"))
    plain = "MODA(affinity=1.0, average='pairs', compactness=0.3, compactness_form='mean', dispersion=1.0, sites=None)"
    assert repr(MODA()) == plain, "what came later is not said as long as it is not used: older checkpoints still fit"
    assert "warmup=0.5" in repr(MODA(warmup=0.5))


def small_split(n=40, classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Split(torch.randint(256, [n, 3, 16, 16], generator=random, dtype=torch.uint8), torch.arange(n) % classes,
                 [f"class {c}" for c in range(classes)], mean=(0.5,) * 3, std=(0.25,) * 3, crop_padding=2, flip=True)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 5, stride=4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(63, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4))


def slow_rates(model, loader, sites, num_classes):
    "Class after class, image after image."
    counts, sizes = {site: None for site in sites}, torch.zeros(num_classes)
    network = observe(model.eval(), sites)
    for images, labels in loader:
        for image, label in zip(images, labels):
            sizes[label] += 1
            for site, activation in network(image[None])[1].items():
                used = activation[0].flatten(1).ne(0).any(1) if activation.ndim == 4 else activation[0].ne(0)
                if counts[site] is None: counts[site] = torch.zeros(num_classes, len(used))
                counts[site][label] += used
    return {site: count / sizes[:, None] for site, count in counts.items()}


@pytest.mark.parametrize("augment", [False, True])
def test_rates_equal_a_loop(tiny, augment):
    split, sites = small_split(), ["2", "4", "7"]
    generator = lambda: torch.Generator().manual_seed(3) if augment else None
    found = activation_rates(tiny, split, batch_size=7, augment=augment, generator=generator())
    assert list(found) == sites
    slow = slow_rates(tiny, batches(split, 7, augment=augment, generator=generator()), sites, 4)
    for site in sites: torch.testing.assert_close(found[site], slow[site])
    rates = torch.cat(list(found.values()), 1)
    assert 0 < rates.mean() < 1 and rates.min() >= 0 and rates.max() <= 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 50), st.integers(0, 99))
def test_neither_batch_size_nor_order_matters(tiny, batch_size, seed):
    split = small_split()
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    expected = activation_rates(tiny, split)
    for site, rates in activation_rates(tiny, split.select(order), batch_size=batch_size).items():
        torch.testing.assert_close(rates, expected[site])


def test_rates_need_no_state_and_leave_none(tiny):
    split = small_split()
    tiny.train()
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    first = activation_rates(tiny, split)
    assert all(layer.training for layer in tiny.modules())
    for name, tensor in tiny.state_dict().items(): assert torch.equal(tensor, before[name])
    with torch.autocast("cpu", torch.bfloat16): second = activation_rates(tiny.eval(), split)
    for site in first: torch.testing.assert_close(first[site], second[site], rtol=0, atol=0)
    assert not any(rates.requires_grad for rates in first.values())


def test_chosen_sites(tiny):
    split = small_split()
    assert list(activation_rates(tiny, split, sites=["4"], example=torch.zeros(1, 3, 16, 16))) == ["4"]
    with pytest.raises(ValueError, match="no site"): activation_rates(tiny, split, sites=["nothing"])


def test_absent_classes_are_named(tiny):
    split = small_split()
    with pytest.raises(ValueError, match="class 1, class 3"):
        activation_rates(tiny, split.select(split.labels % 2 == 0))
    with pytest.raises(ValueError, match="no images of more"):
        activation_rates(tiny, replace(split, classes=[*split.classes, "more"]))


def test_augmentation_needs_a_generator(tiny):
    with pytest.raises(ValueError, match="generator"): activation_rates(tiny, small_split(), augment=True)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 1), st.floats(0.05, 1))
def test_modules_shrink_as_the_threshold_grows(tiny, first, second):
    low, high = sorted((first, second))
    split = small_split()
    larger = decompose(tiny, split, low, empty="none").flat()
    smaller = decompose(tiny, split, high, empty="none").flat()
    assert not (smaller & ~larger).any()


def test_decompose_is_rates_and_threshold(tiny):
    split = small_split()
    masks, rates = decompose(tiny, split, 0.7, empty="none"), activation_rates(tiny, split)
    assert masks.classes == split.classes
    for site, mask in masks.masks.items(): assert torch.equal(mask, rates[site] >= 0.7 - 1e-6)
    assert decompose(tiny, split, 0.7).flat().any(1).all()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_networks_of_other_numbers_are_taken_apart(tiny, dtype):
    split, model = small_split(), copy.deepcopy(tiny).eval().to(dtype)
    masks = decompose(model, split, 0.7)
    agree = (masks.flat() == decompose(tiny.eval(), split, 0.7).flat()).double().mean()
    assert agree == 1 if dtype == torch.double else agree > 0.9
    assert {tuple(found.shape) for found in contributions(model, split).values()} == {(4, 5), (4, 7), (4, 6)}
    small = compose(model, masks, split.classes[:2], split)
    assert {p.dtype for p in small.parameters()} == {dtype} and 0 <= evaluate(small, split.subtask([0, 1])) <= 1


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_counted(channels):
    images = torch.randint(256, [12, channels, 6, 6], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(12) % 2, ["a", "b"], (0.5,) * channels, (0.25,) * channels)
    model = nn.Sequential(nn.Conv2d(channels, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    assert decompose(model, split).sites == {"1": 5} and contributions(model, split)["1"].shape == (2, 5)


def test_loaders_are_counted_or_told_what_they_lack(tiny):
    split = small_split()
    found = [(images, labels) for images, labels in batches(split, 7)]
    assert decompose(tiny, Stream(found, split.classes)) == decompose(tiny, split)
    for what in (decompose, contributions):
        with pytest.raises(ValueError, match=r"say Stream\(data, classes"): what(tiny, found)


@pytest.mark.parametrize("layer", [nn.SiLU, nn.GELU])
def test_where_nothing_is_ever_zero_it_is_said(layer):
    split = small_split()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), layer(), nn.Flatten(), nn.LazyLinear(4))
    model(next(batches(split, 2))[0])
    with pytest.warns(UserWarning, match=f"{layer.__name__}: never exactly zero.*level=0.1"):
        full = decompose(model, split)
    assert full.flat().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not decompose(model, split, level=0.99).flat().all()


def test_a_short_run_draws_classes_apart():
    data = load_dataset("digits")
    options = {"epochs": 4, "batch_size": 64, "lr": 0.1, "schedule": "onecycle", "device": "cpu"}
    shared = {}
    for name, objective in {"standard": CrossEntropy(), "moda": MODA(dispersion=2.0)}.items():
        model = create_model("vgg12", width=0.125, seed=0)
        history = fit(model, data, objective, **options)
        images, labels = next(batches(data.test, 360))
        network = observe(model, list(unit_sites(model, images[:2])))
        with torch.no_grad(): rows = [unit_activations(activation) for activation in network(images)[1].values()]
        kept = decompose(model, data.train).flat().float().mean().item()
        shared[name] = dispersion_loss(rows, labels).item(), compactness(rows).item(), kept
    assert all(moda < standard for moda, standard in zip(shared["moda"], shared["standard"]))
    assert history.rows[-1]["dispersion"] < history.rows[0]["dispersion"]
    assert {"cross_entropy", "affinity", "dispersion", "compactness"} <= {*history.rows[0]}


# Units in the last dimension: linear layers at every token of a sequence, and at every pixel of a map

positioned = pytest.mark.parametrize("kind", [Tokens, LastChannels])


def hooked(model, images):
    "What the activations give, units last, without our code"
    seen = {}
    hooks = [
        model.get_submodule(site).register_forward_hook(lambda layer, args, out, site=site: seen.update({site: out}))
        for site in model.sites]
    logits = model(images)
    for hook in hooks: hook.remove()
    return logits, seen


@positioned
def test_units_of_positions_are_found_observed_and_averaged(kind):
    torch.manual_seed(0)
    model, images = kind(), torch.randn(6, 3, 16, 16)
    assert unit_sites(model, images) == model.sites
    _, expected = hooked(model, images)
    _, raw = observe(model, model.sites)(images)
    _, turned = observe(model, model.sites, images)(images)
    _, rows = MODA().prepare(model, images)(images)
    for site, units in model.sites.items():
        assert raw[site].shape[-1] == units and turned[site].shape[:2] == (6, units)
        positions = expected[site].flatten(1, -2)
        assert torch.equal(turned[site].flatten(2).transpose(1, 2), positions)
        by_hand = positions.abs().mean(1)
        torch.testing.assert_close(rows[site], by_hand)
        torch.testing.assert_close(unit_activations(raw[site], axis=raw[site].ndim - 1), by_hand)


@positioned
def test_losses_on_positions_equal_pairs_and_reach_every_weight(kind):
    torch.manual_seed(1)
    model, labels, objective = kind().double(), torch.tensor([0, 1, 1, 2, 0, 1]), MODA()
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for slow in (False, True):
        if slow:
            logits, seen = hooked(model, images)
            rows = [out.abs().flatten(1, -2).mean(1) for out in seen.values()]
            within, between = slow_mean_cosines(rows, labels)
            loss = nn.functional.cross_entropy(logits, labels) + 1 - within + between
            loss = loss + 0.3 * sum(row.mean() for row in rows) / len(rows)
        else: loss, _ = objective(*(found := objective.prepare(model, images)(images))[:1], labels, found[1])
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for fast, reference in zip(*gradients): torch.testing.assert_close(fast, reference, atol=1e-10, rtol=1e-7)


@positioned
def test_rates_and_contributions_of_positions_equal_a_loop(kind):
    torch.manual_seed(2)
    model, split = kind().eval(), small_split(20)
    rates, found = activation_rates(model, split, batch_size=7), contributions(model, split, batch_size=7)
    slow = {site: torch.zeros(4, units) for site, units in model.sites.items()}
    useful = {site: torch.zeros(4, units) for site, units in model.sites.items()}
    for image, label in zip(*next(batches(split, 20))):
        logits, seen = hooked(model, image[None])
        slopes = torch.autograd.grad(lead(logits, label[None]).sum(), list(seen.values()))
        for (site, out), slope in zip(seen.items(), slopes):
            slow[site][label] += out.flatten(0, -2).ne(0).any(0) / 5
            useful[site][label] += (out * slope).flatten(0, -2).sum(0).abs() / 5
    for site in model.sites:
        torch.testing.assert_close(rates[site], slow[site])
        torch.testing.assert_close(found[site], useful[site], atol=1e-6, rtol=1e-4)


@positioned
def test_networks_composed_of_positions_equal_masks_in_hooks(kind):
    torch.manual_seed(3)
    model, split = kind().eval(), small_split(40)
    masks = decompose(model, split, 0.6)
    kept = masks.keep([1, 3])
    assert 0 < torch.cat(list(kept.values())).float().mean() < 1, "otherwise nothing is shown"
    images, _ = next(batches(split, 8))
    small = compose(model, masks, [1, 3], images)
    hooks = [model.get_submodule(site).register_forward_hook(lambda layer, args, out, mask=mask: out * mask)
             for site, mask in kept.items()]
    with torch.no_grad(): expected, found = model(images)[:, [1, 3]], small(images)
    for hook in hooks: hook.remove()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, number", [("vit_small", 2), ("convnext_tiny", 5)])
def test_it_looks_at_the_units_of_transformers(name, number):
    model = create_model(name, width=0.05, image_size=16, depth=2, seed=0)
    network = MODA().prepare(model.train(), torch.zeros(2, 3, 16, 16))
    _, observed = network(torch.randn(4, 3, 16, 16))
    assert len(observed) == number
    assert {site: row.shape[1] for site, row in observed.items()} == unit_sites(model, torch.zeros(2, 3, 16, 16))


def test_what_cannot_be_looked_at_image_by_image_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(0, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"'2' cannot be looked at image by image: for 2 images it gives \[8, 5, 5\]"):
        site_axes(model, ["2"], torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="sequence .* axis=2"): unit_activations(torch.rand(2, 5, 4))
