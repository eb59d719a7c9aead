"""CNNSplitter's kernels: which layers belong together, importance, groups, the outputs of modules, sensitivity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modnb.cnnsplitter.importance import count_genes, find_segments, group_kernels, group_sizes, kernel_importance
from modnb.cnnsplitter.outputs import ModuleRunner, composed_logits, fold_norms
from modnb.cnnsplitter.sensitivity import sensitive_segments, sensitivity, top_kernels
from modnb.data import Split, load_dataset, normalise
from modnb.extract import masked
from modnb.masks import ModuleMasks
from modnb.models import create_model
from modnb.prediction import predict
from modnb.units import observe, unit_sites

EXAMPLE = torch.zeros(1, 3, 32, 32)


def shared(name: str, **options) -> set[tuple[str, ...]]:
    segments = find_segments(create_model(name, width=0.125, **options), EXAMPLE)
    return {segment.sites for segment in segments if len(segment.sites) > 1}


def lively(model: nn.Module, size: int = 16) -> nn.Module:
    "With BatchNorm statistics and parameters that are not the initial ones"
    random = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if not isinstance(layer, nn.BatchNorm2d): continue
        layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=random) / 4)
        layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=random) + 0.5)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=random) + 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_dataset("digits").train.select(range(60))


# Segments


def test_partners_of_rescnn():
    pairs = {("features.conv2", "features.skip1.body.conv4"), ("features.conv6", "features.skip2.body.conv8"),
             ("features.conv10", "features.skip3.body.conv12")}
    assert shared("rescnn") == pairs == shared("rescnn", batch_norm=True)
    assert len(find_segments(create_model("rescnn", width=0.125), EXAMPLE)) == 9


def test_partners_of_resnet18():
    block = lambda n, part: f"features.block{n}.{part}"
    found = shared("resnet18")
    assert ("features.conv1", block(1, "body.conv2"), block(2, "body.conv2")) in found
    for first in (3, 5, 7):
        stage = {block(first, "body.conv2"), block(first, "shortcut.conv"), block(first + 1, "body.conv2")}
        assert any(set(sites) == stage for sites in found), f"stage of block {first}"
    assert len(found) == 4


def test_chains_have_no_partners_and_depthwise_follows_its_input():
    assert shared("simcnn") == shared("vgg16") == shared("lenet5") == set()
    mobile = shared("mobilenet")
    assert ("features.conv1", "features.block1.conv1") in mobile and len(mobile) == 13


def test_sums_are_watched_behind_their_activation():
    segments = find_segments(create_model("resnet18", width=0.125), EXAMPLE)
    first = next(segment for segment in segments if len(segment.sites) > 1)
    assert first.watched == ("features.block1.activation", "features.block2.activation")
    plain = find_segments(create_model("vgg12", width=0.125), torch.zeros(1, 3, 16, 16))
    assert [segment.watched for segment in plain] == [(f"features.relu{n}",) for n in range(1, 10)]


def test_segments_of_chosen_sites():
    model = create_model("rescnn", width=0.125)
    segments = find_segments(model, EXAMPLE, ["features.conv1", "features.skip1.body.conv4"])
    assert [(*s.sites, *s.places) for s in segments] == [("features.conv1", 0), ("features.skip1.body.conv4", 1)]
    with pytest.raises(ValueError, match="conv9000"): find_segments(model, EXAMPLE, ["features.conv9000"])
    with pytest.raises(ValueError, match="is no convolution"): find_segments(model, EXAMPLE, ["classifier.linear1"])
    with pytest.raises(ValueError, match="no convolution whose"): find_segments(model, EXAMPLE, [])


def test_published_numbers_of_genes():
    with torch.device("meta"): models = {name: create_model(name) for name in ("simcnn", "rescnn")}
    found = {name: find_segments(model.to_empty(device="cpu"), EXAMPLE) for name, model in models.items()}
    assert {name: count_genes(segments) for name, segments in found.items()} == {"simcnn": 940, "rescnn": 630}
    assert sum(s.kernels * len(s.sites) for s in found["rescnn"]) == 4288
    assert sum(s.kernels for s in found["simcnn"]) == 4224


# Importance


@pytest.mark.parametrize("name", ["vgg12", "rescnn"])
def test_importance_equals_a_loop_over_images(name):
    size = 16 if name == "vgg12" else 32
    split = load_dataset("digits", image_size=size).train.select(range(40))
    model = lively(create_model(name, width=0.125, image_size=size, seed=0))
    sure = predict(model, split).softmax(1).gather(1, split.labels[:, None])[:, 0]
    limit = min(sure[split.labels == c].max().item() for c in range(10)) - 1e-5
    assert (sure < limit).any(), "some images are left out"
    found = kernel_importance(model, split, min_confidence=limit, batch_size=7)
    for segment, values in found.items():
        network, sums = observe(model, segment.watched), {c: [] for c in range(10)}
        for image, label in zip(split.images, split.labels.tolist()):
            with torch.no_grad(): logits, maps = network(normalise(image[None], split.mean, split.std))
            if logits.softmax(1)[0, label] < limit: continue
            sums[label].append(sum(m[0].sum((1, 2)).double() for m in maps.values()))
        slow = torch.stack([sum(rows) / len(rows) for rows in sums.values()])
        torch.testing.assert_close(values, slow, rtol=1e-4, atol=1e-4)


@settings(max_examples=8)
@given(st.integers(1, 60), st.sampled_from([0.05, 0.1, 0.15, 1.0]))
def test_the_surest_images_stay(digits, fewest, limit):
    model = lively(create_model("vgg12", width=0.125, seed=0))
    sure = predict(model, digits).softmax(1).gather(1, digits.labels[:, None])[:, 0]
    stays = []
    for label in range(10):
        ranked = sorted((digits.labels == label).nonzero().flatten().tolist(), key=lambda at: -sure[at])
        stays += [at for rank, at in enumerate(ranked) if rank < fewest or sure[at] >= limit]
    slow = kernel_importance(model, digits.select(sorted(stays)), min_confidence=0)
    for a, b in zip(kernel_importance(model, digits, min_confidence=limit, fewest=fewest).values(), slow.values()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_unsure_images_are_left_out(digits):
    model = lively(create_model("vgg12", width=0.125, seed=0))
    sure = predict(model, digits).softmax(1).gather(1, digits.labels[:, None])[:, 0]
    limit = min(sure[digits.labels == c].max().item() for c in range(10)) - 1e-6 # each class has an image above it
    chosen = digits.select(sure >= limit)
    assert len(chosen) < len(digits)
    few = kernel_importance(model, digits, min_confidence=limit)
    all_of_few = kernel_importance(model, chosen, min_confidence=0)
    for a, b in zip(few.values(), all_of_few.values()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="min_confidence"): kernel_importance(model, digits, min_confidence=1.0)
    with pytest.raises(ValueError, match="outputs"): kernel_importance(model, digits.subtask([0, 1]), fewest=1)
    with pytest.raises(ValueError, match="no images of 4"): kernel_importance(model, digits.select(digits.labels != 4))
    with pytest.raises(ValueError, match="outputs"): kernel_importance(model, digits.subtask([0, 1]), min_confidence=0)


# Groups


@given(st.integers(1, 600), st.none() | st.integers(1, 120))
def test_group_sizes_are_those_of_array_split(kernels, groups):
    import numpy

    sizes = group_sizes(kernels, groups)
    wanted = min(kernels, groups or (10 if kernels < 256 else 100))
    assert sizes == [len(part) for part in numpy.array_split(range(kernels), wanted)]
    assert min(sizes) >= 1 and sum(sizes) == kernels


@pytest.mark.parametrize("kind", ["importance", "random", "none"])
def test_decoding_equals_sets_of_kernels(kind):
    random = torch.Generator().manual_seed(0)
    segments = find_segments(create_model("rescnn", width=0.25), EXAMPLE)
    importance = {segment: torch.rand(3, segment.kernels, generator=random).double() for segment in segments}
    grouping = group_kernels(importance, ["a", "b", "c"], kind)
    bits = torch.rand(3, 4, grouping.genes, generator=random) < 0.5
    bits[0, 0] = False # nothing at all
    kernels = grouping.decode(bits)
    for c in range(3):
        for i in range(4):
            parts = dict(zip(grouping.sites, kernels[c, i].split(list(grouping.sites.values()))))
            for segment, genes in zip(segments, bits[c, i].split(grouping.sizes)):
                kept = [set(parts[site].nonzero().flatten().tolist()) for site in segment.sites]
                assert all(other == kept[0] for other in kept), "partners keep the same kernels"
                if not genes.any(): assert kept[0] == {0}
                elif kind != "random":
                    order = range(segment.kernels)
                    if kind == "importance": order = importance[segment][c].argsort(descending=True).tolist()
                    groups, at = [], 0
                    for size in [1] * segment.kernels if kind == "none" else group_sizes(segment.kernels):
                        groups.append(set(list(order)[at:at + size]))
                        at += size
                    assert kept[0] == set().union(*(group for group, on in zip(groups, genes) if on))
    masks = grouping.masks(kernels[:, 1])
    assert masks.sites == unit_sites(create_model("rescnn", width=0.25), EXAMPLE, kind="conv")
    assert torch.equal(masks.flat(), kernels[:, 1])


def test_random_groups_follow_the_seed():
    segments = find_segments(create_model("vgg12", width=0.25), torch.zeros(1, 3, 16, 16))
    importance = {segment: torch.rand(2, segment.kernels).double() for segment in segments}
    genes = lambda seed: group_kernels(importance, ["a", "b"], "random", seed=seed).gene_of
    assert torch.equal(genes(0), genes(0)) and not torch.equal(genes(0), genes(1))
    with pytest.raises(ValueError, match="groups"): group_kernels(importance, ["a", "b"], groups=0)
    with pytest.raises(ValueError, match="nothing"): group_kernels({}, ["a", "b"])
    broken = importance | {segments[0]: torch.full((2, segments[0].kernels), torch.nan)}
    with pytest.raises(ValueError, match="finite"): group_kernels(broken, ["a", "b"])


# Outputs of modules


class Branching(nn.Module):
    "A tensor without masks meets one with masks, and pieces are put side by side"
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(10 * 16 * 16, 10)

    def forward(self, x):
        y = torch.relu(self.stem(x))
        z = torch.relu(self.a(y) + y)
        return self.head(torch.cat([z, self.b(z)], 1).flatten(1))


@pytest.mark.parametrize("name", ["vgg12", "rescnn", "resnet18", "mobilenet", "branching"])
def test_outputs_equal_the_masked_oracle(name, digits):
    size = 32 if name == "rescnn" else 16
    torch.manual_seed(0)
    model = Branching() if name == "branching" else create_model(name, width=0.125, image_size=size, seed=0)
    model, split = lively(model), load_dataset("digits", image_size=size).train.select(range(20))
    example = normalise(split.images, split.mean, split.std)
    segments = find_segments(model, example)
    grouping = group_kernels({s: torch.rand(10, s.kernels).double() for s in segments}, split.classes)
    if name == "branching": # only what lies behind the first layer
        segments = find_segments(model, example, ["a", "b"])
        grouping = group_kernels({s: torch.rand(10, s.kernels).double() for s in segments}, split.classes)
    bits = torch.rand(10, 2, grouping.genes) < 0.6
    kernels, classes = grouping.decode(bits).flatten(0, 1), [c for c in range(10) for _ in range(2)]
    slow = []
    for row, own in zip(kernels, classes):
        keep = dict(zip(grouping.sites, row.split(list(grouping.sites.values()))))
        with torch.no_grad(): slow.append(masked(model, keep, example)(example)[:, own])
    for how in ("masked", "extracted"):
        runner = ModuleRunner(model, split, grouping.sites, how, rows=64)
        assert runner.how == how
        torch.testing.assert_close(runner(kernels, classes), torch.stack(slow), rtol=1e-3, atol=1e-4)


def test_networks_that_make_something_of_nothing_are_extracted(digits):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 10)).eval()
    lively(model)
    runner, row = ModuleRunner(model, digits, {"0": 4}), torch.tensor([[True, False, True, False]])
    assert runner.how == "extracted"
    x = normalise(digits.images, digits.mean, digits.std)
    with torch.no_grad(): slow = masked(model, {"0": row[0]}, x)(x)[:, 3]
    torch.testing.assert_close(runner(row, [3])[0], slow, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="extracted"): ModuleRunner(model, digits, {"0": 4}, "masked")
    with pytest.raises(ValueError, match="kernels must be"): runner(row[:, 1:], [3])
    with pytest.raises(ValueError, match="classes must lie"): runner(row, [10])


def test_folding_leaves_the_model_alone(digits):
    model = lively(create_model("resnet18", width=0.125, seed=0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 3, 16, 16)
    folded = fold_norms(model)
    with torch.no_grad(): torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-4)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Sensitivity


def test_sensitivity_equals_composing_by_hand(digits):
    model = lively(create_model("rescnn", width=0.125, image_size=32, seed=0))
    split = load_dataset("digits", image_size=32).train.select(range(24))
    segments = [s for s in find_segments(model, EXAMPLE) if len(s.sites) > 1][:2]
    importance = {s: torch.rand(10, s.kernels).double() for s in segments}
    shares = (0.3, 1.0)
    found = sensitivity(model, split, importance, shares)
    for segment, row in zip(segments, found):
        for share, value in zip(shares, row):
            masks = ModuleMasks(dict.fromkeys(segment.sites, top_kernels(importance[segment], share)), split.classes)
            answers = composed_logits(model, masks, split, "extracted").argmax(1)
            assert value.item() == pytest.approx((answers == split.labels).double().mean().item())
    whole = (predict(model, split, precision="float32").argmax(1) == split.labels).double().mean()
    assert torch.allclose(found[:, -1], whole)


@settings(max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([0.05, 0.3]))
def test_the_rule(seed, allowed):
    random = torch.Generator().manual_seed(seed)
    segments = find_segments(create_model("lenet5"), EXAMPLE)
    accuracies = torch.rand(len(segments), 3, generator=random).double()
    found = sensitive_segments(accuracies, segments, (0.1, 0.5, 1.0), max_loss=allowed)
    assert found == [s.sites[0] for s, row in zip(segments, accuracies) if row[2] - row[0] > allowed]
