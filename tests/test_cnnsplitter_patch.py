"CNNSplitter's using part: modules side by side, metrics of one class, patching, weak networks and their data."

import copy
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from modnb.cnnsplitter.patch import Patched, load_patched, logit_range, min_max, patch, save_patched, translation
from modnb.cnnsplitter.weak import (
    CIFAR100_NINE,
    SVHN_STRONG,
    SVHN_WEAK,
    best_and_half,
    form_of_simple,
    nine_classes,
    svhn_weak,
    train_keeping,
    weak_cifar,
    weak_data,
    weak_models,
    weak_settings,
)
from modnb.compose import Composer, ParallelModules, compose, compose_parallel, load_module, save_module
from modnb.data import ImageData, MissingDataset, Split, load_dataset, normalise
from modnb.extract import masked
from modnb.files import UnreadableFile
from modnb.lab.results import read_rows
from modnb.lab.running import run_notebook
from modnb.masks import ModuleMasks
from modnb.metrics import count_flops, other_accuracy, precision_recall
from modnb.models import create_model
from modnb.prediction import predict
from modnb.settings import Settings
from modnb.training import fit
from modnb.units import unit_sites

EXPERIMENT = Path(__file__).parents[1] / "nbs/experiments/cnnsplitter_patch.ipynb"
CLASSES = [f"class {c}" for c in range(10)]
MODELS = ["vgg12", "resnet18", "rescnn"]


@functools.cache
def parts(name: str):
    "A network with random modules that keep about a third of the units each"
    torch.manual_seed(0)
    size = {"width": 2, "image_size": 16} if name == "lenet5" else {"width": 0.125}
    model = create_model(name, **size).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d): nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    x = torch.randn(4, 3, *[model.config["image_size"]] * 2)
    masks = {site: torch.rand(10, units) < 0.35 for site, units in unit_sites(model, x).items()}
    for mask in masks.values(): mask[:, 0] = True
    return model, ModuleMasks(masks, CLASSES), x


def numbered(classes: str | list[str], of_each: int, tests: int) -> ImageData:
    "Images that can be told apart: the first two pixels count them, over all splits"
    def split(start, count):
        images = torch.zeros(count * len(classes), 3, 4, 4, dtype=torch.uint8)
        index = torch.arange(start, start + len(images))
        images[:, 0, 0, 0], images[:, 0, 0, 1] = (index // 256).byte(), (index % 256).byte()
        return Split(images, torch.arange(len(classes)).repeat(count), list(classes), (0.4,) * 3, (0.3,) * 3)
    return ImageData("numbered", list(classes), split(0, of_each), split(0, 0), split(of_each * len(classes), tests))


def numbers(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].int() * 256 + split.images[:, 0, 0, 1]).tolist()


def counts(split: Split) -> list[int]: return torch.bincount(split.labels, minlength=len(split.classes)).tolist()


# Modules side by side


@pytest.mark.parametrize("name", MODELS)
def test_each_column_is_the_masked_oracle_of_its_module(name):
    model, masks, x = parts(name)
    beside = compose_parallel(model, masks, ["class 7", 2, 5], x)
    assert beside.classes == ["class 7", "class 2", "class 5"]
    found = beside(x)
    for column, c in enumerate([7, 2, 5]):
        assert torch.allclose(found[:, column], masked(model, masks.keep([c]), x)(x)[:, c], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, compose(model, masks, [7, 2, 5], x)(x), atol=1e-3), "a union is another network"


def test_modules_of_different_networks_and_of_several_classes():
    composers = [Composer(*parts(name)[:2], torch.zeros(1, 3, 32, 32)) for name in ("resnet18", "rescnn")]
    pieces = [composers[0]([1, 4]), composers[1]([9])]
    beside, x = ParallelModules(pieces), torch.randn(2, 3, 32, 32)
    assert beside.classes == ["class 1", "class 4", "class 9"]
    assert torch.equal(beside(x), torch.cat([piece(x) for piece in pieces], 1))


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_multiply_adds_are_the_sums(name):
    model, masks, x = parts(name)
    beside = compose_parallel(model, masks, [0, 3], x)
    weights = lambda network: sum(p.numel() for p in network.parameters())
    assert weights(beside) == sum(weights(part) for part in beside.parts) < 2 * weights(model)
    for mode in ("train", "eval"):
        assert count_flops(beside, x, mode) == sum(count_flops(part, x, mode) for part in beside.parts)


@pytest.mark.parametrize("name", MODELS)
def test_files_of_modules_side_by_side(name, tmp_path):
    model, masks, x = parts(name)
    beside = compose_parallel(model, masks, [0, 3, 9], x)
    for saved in (beside, copy.deepcopy(beside)):
        save_module(saved, tmp_path / "m.safetensors")
        again = load_module(tmp_path / "m.safetensors")
        assert torch.equal(again(x), beside(x)) and again.classes == beside.classes and not again.training
        save_module(again, tmp_path / "n.safetensors")
        assert torch.equal(load_module(tmp_path / "n.safetensors")(x), beside(x))


def test_a_copy_is_independent():
    model, masks, x = parts("vgg12")
    module = compose(model, masks, [3], x)
    before, twin = module(x), copy.deepcopy(module)
    for parameter in twin.parameters(): nn.init.zeros_(parameter)
    assert torch.equal(module(x), before) and twin.classes == ["class 3"] and twin.recipe == module.recipe


def test_modules_that_cannot_stand_side_by_side():
    model, masks, x = parts("vgg12")
    module, larger = compose(model, masks, [3], x), compose(*parts("resnet18")[:2], [1], torch.zeros(1, 3, 32, 32))
    for modules, match in [([], "no module"), ([module, module], "more than one module answers for class 3"),
                           ([module, model], "module 1 does not say"), ([module, larger], "different sizes")]:
        with pytest.raises(ValueError, match=match): ParallelModules(modules)


# One class and the others


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_precision_recall_and_f1_are_those_of_scikit_learn(classes, images, seed):
    random = torch.Generator().manual_seed(seed)
    scores, labels = torch.rand(images, classes, generator=random), torch.randint(classes, [images], generator=random)
    column = int(labels[0])
    found = precision_recall(scores, labels, column)
    expected = precision_recall_fscore_support(labels, scores.argmax(1), labels=[column], zero_division=0)
    assert list(found.values()) == pytest.approx([float(value[0]) for value in expected[:3]])
    others = [i for i in range(images) if labels[i] != column]
    if not others: return
    right = [bool(scores[i].argmax() == labels[i]) for i in others]
    assert other_accuracy(scores, labels, column) == pytest.approx(sum(right) / len(right))
    by_class = {int(labels[i]): [r for j, r in zip(others, right) if labels[j] == labels[i]] for i in others}
    expected = sum(sum(r) / len(r) for r in by_class.values()) / len(by_class)
    assert other_accuracy(scores, labels, column, "classes") == pytest.approx(expected)


def test_a_class_that_is_not_there():
    scores, labels = torch.eye(3), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="no image of class 2"): precision_recall(scores, labels, 2)
    with pytest.raises(ValueError, match="no column 3"): precision_recall(scores, labels, 3)
    with pytest.raises(ValueError, match="no other class"): other_accuracy(scores, torch.ones(3), 1)
    assert precision_recall(torch.eye(3)[[0, 0]], torch.tensor([1, 0]), 1) == {"precision": 0, "recall": 0, "f1": 0}


# The range


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=30).filter(lambda values: max(values) > min(values)))
def test_ranges_against_sorted_lists(values):
    logits = torch.tensor(values)
    assert logit_range(logits) == (min(values), max(values))
    inner, outer = logit_range(logits, "quantile", tail=0.0), (min(values), max(values))
    assert inner == pytest.approx(outer)
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    if spread > 1e-3: # below that, rounding decides
        assert logit_range(logits, "deviation", deviations=3) == pytest.approx((mean - 3 * spread, mean + 3 * spread))


def test_no_range():
    for values in ([1, 1, 1], [3], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="no range to scale by"): logit_range(torch.tensor(values).float())
    with pytest.raises(ValueError, match=r"\[N\] with N > 0"): logit_range(torch.zeros(0))
    with pytest.raises(ValueError, match="kind of range"): logit_range(torch.rand(3), "min")
    for options, name in [({"tail": 0.5}, "tail"), ({"tail": -0.1}, "tail"), ({"deviations": 0}, "deviations")]:
        with pytest.raises(ValueError, match=name): logit_range(torch.rand(3), **options)


def test_scores_are_clipped_only_where_asked():
    logits, low, high = torch.tensor([[1.0, 5.0], [9.0, 3.0]]), torch.tensor([2.0, 1.0]), torch.tensor([6.0, 5.0])
    assert min_max(logits, low, high).tolist() == [[-0.25, 1.0], [1.75, 0.5]]
    assert min_max(logits, low, high, clip=True).tolist() == [[0.0, 1.0], [1.0, 0.5]]


# Patching


@functools.cache
def pieces():
    "A strong network of ten classes with random modules; a weak one of four; images of the strong one's classes"
    model, masks, _ = parts("lenet5")
    torch.manual_seed(1)
    weak = create_model("lenet5", 4, image_size=16, seed=1).eval()
    weak.classes = ["class 8", "other", "class 2", "another"]
    split = Split(torch.randint(256, [60, 3, 16, 16], dtype=torch.uint8), torch.arange(10).repeat(6), CLASSES,
                  (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return model, masks, weak, split


def module_of(*classes):
    model, masks, _, split = pieces()
    return compose(model, masks, classes, normalise(split.images[:1], split.mean, split.std))


def by_loop(weak, module, split, images, targets, column_of, range_from="target", clip=False):
    "Sec. 4 of the paper, image after image"
    rows = []
    seen = normalise(split.images, split.mean, split.std)
    for image in images:
        row = weak(image[None])[0].softmax(0).tolist()
        for name in targets:
            known = [module(seen[i:i + 1])[0, module.classes.index(name)].item() for i in range(len(seen))
                     if range_from == "all" or split.classes[split.labels[i]] == name]
            value = module(image[None])[0, module.classes.index(name)].item()
            score = (value - min(known)) / (max(known) - min(known))
            row[column_of[name]] = min(1.0, max(0.0, score)) if clip else score
        rows.append(row)
    return torch.tensor(rows)


def test_three_images_by_hand():
    weak, module = nn.Linear(4, 3, bias=False), nn.Linear(4, 1, bias=False)
    with torch.no_grad(): weak.weight.copy_(torch.eye(4)[:3]), module.weight.copy_(torch.eye(4)[3:])
    module.classes = ["cow"]
    patched = Patched(weak, module, ["cat", "cow", "dog"], ["cow"], torch.tensor([2.0]), torch.tensor([6.0]))
    scores = patched(torch.tensor([[0.0, 3, 0, 1], [1, 1, 0, 5], [2, 0, 0, 9]]))
    sums = [2 + 20.085537, 2 * 2.718282 + 1, 7.389056 + 2]  # e^3, e and e^2
    expected = [[1 / sums[0], -0.25, 1 / sums[0]], [2.718282 / sums[1], 0.75, 1 / sums[1]],
                [7.389056 / sums[2], 1.75, 1 / sums[2]]]
    assert torch.allclose(scores, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("range_from", ["target", "all"])
@pytest.mark.parametrize("clip", [False, True])
def test_patching_against_a_loop(range_from, clip):
    _, _, weak, split = pieces()
    module, images = module_of("class 2", "class 8"), torch.randn(6, 3, 16, 16)
    for targets in (["class 8"], ["class 8", "class 2"]):
        patched = patch(weak, module, split, targets, range_from=range_from, clip=clip)
        expected = by_loop(weak, module, split, images, targets, {"class 8": 0, "class 2": 2}, range_from, clip)
        assert torch.allclose(patched(images), expected, rtol=1e-4, atol=1e-4)
        assert patched.classes == weak.classes and patched.targets == targets


def test_several_modules_are_several_patches():
    model, masks, weak, split = pieces()
    beside = compose_parallel(model, masks, ["class 2", "class 8"], torch.zeros(1, 3, 16, 16))
    x = torch.randn(5, 3, 16, 16)
    both = patch(weak, beside, split, ["class 2", "class 8"])(x)
    for name, column in (("class 2", 2), ("class 8", 0)):
        alone = patch(weak, module_of(name), split, name)(x)
        assert torch.allclose(both[:, column], alone[:, column], atol=1e-5)
    assert torch.equal(both[:, [1, 3]], weak(x).softmax(1)[:, [1, 3]])


def test_the_order_of_classes_does_not_matter():
    "Names decide, wherever the weak network, the module and the split have the class"
    _, _, weak, split = pieces()
    x, module = torch.randn(5, 3, 16, 16), module_of("class 2")
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = Split(split.images, order.argsort()[split.labels], [CLASSES[i] for i in order], split.mean, split.std)
    assert torch.equal(patch(weak, module, moved, "class 2")(x), patch(weak, module, split, "class 2")(x))
    turned = nn.Sequential(weak, nn.Linear(4, 4, bias=False))
    with torch.no_grad(): turned[1].weight.copy_(torch.eye(4).flip(0))
    again = patch(turned, module, split, "class 2", classes=weak.classes[::-1])(x)
    assert torch.allclose(again.flip(1), patch(weak, module, split, "class 2")(x), atol=1e-6)


def test_images_with_another_normalisation():
    _, _, weak, split = pieces()
    module = module_of("class 2")
    other = Split(split.images, split.labels, split.classes, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    direct, translated = patch(weak, module, split, "class 2"), patch(weak, module, split, "class 2", images_like=other)
    column = lambda network, s: network(normalise(s.images[:9], s.mean, s.std))[:, 2]
    assert torch.allclose(column(translated, other), column(direct, split), atol=1e-4)
    assert not torch.allclose(column(direct, other), column(direct, split), atol=1e-2), "that is the trap"
    assert translation(split, split) is None and patch(weak, module, split, "class 2", images_like=split).factor is None


def test_a_patched_network_is_frozen_and_a_copy():
    _, _, weak, split = pieces()
    module, x = module_of("class 2"), torch.randn(4, 3, 16, 16)
    before = {name: t.clone() for name, t in weak.state_dict().items()}
    weak.train()
    patched = patch(weak, module, split, "class 2")
    assert weak.training and all(p.requires_grad for p in weak.parameters()), "the weak network is left alone"
    weak.eval()
    found = patched.train()(x)
    assert not any(p.requires_grad for p in patched.parameters()) and not any(m.training for m in patched.modules())
    for parameter in patched.parameters(): nn.init.zeros_(parameter)
    assert all(torch.equal(t, before[name]) for name, t in weak.state_dict().items())
    assert torch.equal(patch(weak, module, split, "class 2")(x), found)
    mode = "eval"
    assert count_flops(patched, x, mode) == count_flops(weak, x, mode) + count_flops(module, x, mode)


@pytest.mark.parametrize("several", [False, True])
def test_file_of_a_patched_network(several, tmp_path):
    model, masks, weak, split = pieces()
    targets = ["class 8", "class 2"] if several else ["class 8"]
    module = compose_parallel(model, masks, [2, 8], torch.zeros(1, 3, 16, 16)) if several else module_of(8)
    other = Split(split.images, split.labels, split.classes, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for options in ({"clip": True}, {"images_like": other}):
        patched, x = patch(weak, module, split, targets, **options), torch.randn(4, 3, 16, 16)
        save_patched(patched, tmp_path / "p")
        again = load_patched(tmp_path / "p")
        assert torch.equal(again(x), patched(x)) and not again.training
        assert (again.classes, again.targets, again.clip) == (patched.classes, targets, patched.clip)
        save_patched(again, tmp_path / "q")
        assert torch.equal(load_patched(tmp_path / "q")(x), patched(x))
    save_module(module, tmp_path / "m")
    with pytest.raises(UnreadableFile, match="holds module, not patched network"): load_patched(tmp_path / "m")


def test_file_of_networks_outside_the_registry(tmp_path):
    def build(outputs): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, outputs))

    torch.manual_seed(0)
    strong, weak, images = build(2).eval(), build(3).eval(), torch.randint(256, [9, 3, 1, 1], dtype=torch.uint8)
    split = Split(images, torch.arange(9) % 2, ["a", "b"], (0.5,) * 3, (0.2,) * 3)
    masks = ModuleMasks({"1": torch.tensor([[True, True, True, False], [False, True, True, True]])}, ["a", "b"])
    module = compose(strong, masks, ["a"], torch.zeros(1, 3, 1, 1))
    patched, x = patch(weak, module, split, "a", classes=["x", "y", "a"]), torch.randn(4, 3, 1, 1)
    save_patched(patched, tmp_path / "p")
    assert torch.equal(load_patched(tmp_path / "p", build(3), build(2))(x), patched(x))
    with pytest.raises(ValueError, match=r"registry; give load_patched\(path, weak"): load_patched(tmp_path / "p")
    with pytest.raises(ValueError, match=r"registry; give load_patched\(path, strong"):
        load_patched(tmp_path / "p", build(3))
    with pytest.raises(UnreadableFile, match="another architecture"): load_patched(tmp_path / "p", build(4), build(2))


def test_onnx_export(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, _, weak, split = pieces()
    patched, x = patch(weak, module_of("class 2"), split, "class 2"), torch.randn(2, 3, 16, 16)
    torch.onnx.export(patched, (x,), tmp_path / "p.onnx", dynamo=True, input_names=["images"], verbose=False,
                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    session, images = onnxruntime.InferenceSession(tmp_path / "p.onnx"), torch.randn(5, 3, 16, 16)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    assert torch.allclose(found, patched(images), rtol=1e-3, atol=1e-5)


def test_what_cannot_be_patched():
    _, _, weak, split = pieces()
    module, small = module_of("class 2"), create_model("lenet5", 4, image_size=32)
    silent = copy.deepcopy(module)
    for parameter in silent.parameters(): nn.init.zeros_(parameter)
    without = split.select(split.labels != 2)
    large = Split(torch.zeros(10, 3, 20, 20, dtype=torch.uint8), torch.arange(10), CLASSES, split.mean, split.std)
    for arguments, options, match in [
        ((weak, module, split, "class 3"), {}, "weak network has no class 'class 3'; it has: class 8, other"),
        ((weak, module, split, "class 8"), {}, "module has no class 'class 8'; it has: class 2"),
        ((weak, module, split.subtask([1, 3]), "class 2"), {}, "split has no class 'class 2'; it has: class 1, cl"),
        ((weak, module, without, "class 2"), {}, "no image of 'class 2'"),
        ((weak, module, large, "class 2"), {}, "images of 20 pixels, it was built for 16"),
        ((nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), module, large, "class 2"),
         {"classes": weak.classes}, "module is for images of 16 pixels, the split has images of 20"),
        ((small, module, split, "class 2"), {}, "does not name its classes"),
        ((small, module, split, "class 2"), {"classes": weak.classes}, "images of 16 pixels, it was built for 32"),
        ((weak, module, split, "class 2"), {"classes": ["class 2"]}, "4 outputs, but 1 classes"),
        ((weak, nn.Linear(2, 2), split, "class 2"), {}, "module does not name its classes"),
        ((weak, silent, split, "class 2"), {}, "no range to scale by"),
        ((weak, module, split, ["class 2", "class 2"]), {}, "given twice"),
        ((weak, module, split, []), {}, "no target class"),
        ((weak, module, split, "class 2"), {"range_from": "everything"}, "source of the range"),
    ]:
        with pytest.raises(ValueError, match=match): patch(*arguments, **options)


# Data of weak networks


@given(st.data())
def test_weak_data_has_the_classes_and_counts_asked_for_and_shares_no_image(draw):
    of_each, tests = draw.draw(st.integers(4, 20)), draw.draw(st.integers(1, 3))
    data = numbered("abcdef", of_each, tests)
    target = draw.draw(st.sampled_from("abcdef"))
    others = draw.draw(st.lists(st.sampled_from([c for c in "abcdef" if c != target]), min_size=1, unique=True))
    share, target_share = draw.draw(st.sampled_from([0.5, 0.75, 1])), draw.draw(st.sampled_from([None, 0.5, 1.0]))
    seed = draw.draw(st.integers(0, 1000))
    weak = weak_data(data, others, target, share, target_share, valid=0.25, seed=seed)
    assert weak.classes == [*sorted(others), target] == weak.train.classes == weak.valid.classes == weak.test.classes
    drawn = [max(1, round(of_each * share))] * len(others) + [max(1, round(of_each * (target_share or share)))]
    held = [max(1, round(n * 0.25)) for n in drawn]
    assert counts(weak.valid) == held and counts(weak.train) == [n - h for n, h in zip(drawn, held)]
    assert counts(weak.test) == [tests] * len(weak.classes), "no test image is left out"
    seen = [numbers(split) for split in (weak.train, weak.valid, weak.test)]
    assert len({*sum(seen, [])}) == len(sum(seen, [])), "no image in two splits"
    assert {*seen[0], *seen[1]} <= {*numbers(data.train)} and {*seen[2]} <= {*numbers(data.test)}
    named = {n: label for split in (data.train, data.test) for n, label in zip(numbers(split), split.labels.tolist())}
    for split, found in zip((weak.train, weak.valid, weak.test), seen):
        assert [weak.classes[label] for label in split.labels] == [data.classes[named[number]] for number in found]


def test_weak_data_repeats_under_a_seed():
    data = numbered("abcd", 20, 2)
    draws = [numbers(weak_data(data, [1, 2], "a", 0.5, seed=seed).train) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_weak_data_keeps_validation_images_that_there_are():
    data = numbered("abcd", 8, 2)
    data.valid, data.train = data.train.select(range(8)), data.train.select(range(8, 32))
    weak = weak_data(data, ["b", "c"], "a", 0.5)
    assert counts(weak.valid) == [2, 2, 2] and counts(weak.train) == [3, 3, 3]


def test_bad_weak_data():
    data = numbered("abcd", 8, 2)
    for arguments, options, match in [
        ((["a", "b"], "a"), {}, "'a' is among the other classes"), ((["b", "x"], "a"), {}, "no class 'x'"),
        ((["b"], "x"), {}, "no class 'x'"), (([], "a"), {}, "no class chosen"),
        ((["b"], "a"), {"share": 0}, "share must"),
        ((["b"], "a"), {"target_share": 1.5}, "target_share must"), ((["b"], "a"), {"share": True}, "share must"),
        ((["b"], "a"), {"target_share": 0.1}, "too few to hold out"),
    ]:
        with pytest.raises(ValueError, match=match): weak_data(data, *arguments, **options)
    data.train = data.train.select(data.train.labels != 0)
    with pytest.raises(ValueError, match="no training image of 'a'"): weak_data(data, ["b"], "a")


@pytest.mark.parametrize("division, expected", [((4, 2, 3), (4, 2, 3)), ("released", (400, 100, 100)),
                                                ("paper", (440, 55, 55))])
def test_weak_cifar(division, expected):
    of_each, tests = (8, 5) if division == (4, 2, 3) else (500, 100)
    ten = numbered("xyz", of_each + 3, tests + 4)
    nine = numbered(list(CIFAR100_NINE), of_each, tests)
    for data, mark in ((ten, 1), (nine, 2)):
        for split in (data.train, data.test): split.images[:, 1, 0, 0] = mark
    data = weak_cifar("y", division=division, seed=3, nine=nine, ten=ten, device="cpu")
    assert data.classes == [*CIFAR100_NINE, "y"]
    splits = [data.train, data.valid, data.test]
    assert [counts(split) for split in splits] == [[n] * 10 for n in expected]
    for mark, source, wanted in ((1, ten, [9]), (2, nine, range(9))):
        found = []
        for split in splits:
            mine = split.select(split.images[:, 1, 0, 0] == mark)
            assert sorted(mine.labels.unique().tolist()) == list(wanted)
            found.append(numbers(mine))
        assert len({*sum(found, [])}) == len(sum(found, [])), "no image in two splits"
        assert {*found[0], *found[1]} <= {*numbers(source.train)} and {*found[2]} <= {*numbers(source.test)}
    assert [n for n in numbers(data.test.select(data.test.labels == 9))] == numbers(ten.test.subtask("y"))[:expected[2]]
    again = weak_cifar("y", division=division, seed=3, nine=nine, ten=ten, device="cpu")
    assert torch.equal(again.train.images, data.train.images)
    other = weak_cifar("y", division=division, seed=4, nine=nine, ten=ten, device="cpu")
    assert not torch.equal(other.train.images, data.train.images) and torch.equal(other.test.images, data.test.images)
    assert (data.train.mean, data.train.flip) == (ten.train.mean, ten.train.flip)


def test_nine_classes_from_a_folder_of_images(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for i, name in enumerate(CIFAR100_NINE):
            (tmp_path / "cifar100_nine" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "cifar100_nine" / part / name / "1.png")
    nine = nine_classes(tmp_path, 32, "cpu")
    assert nine.classes == list(CIFAR100_NINE) and nine.train.images[:, 0, 0, 0].tolist() == list(range(9))
    with pytest.raises(MissingDataset, match="cifar100_nine with train/"): nine_classes(tmp_path / "no", 32, "cpu")


def test_svhn():
    data = numbered([str(d) for d in range(10)], 10, 2)
    weak = svhn_weak("4", data=data)
    assert weak.classes == [*SVHN_WEAK, "4"] and counts(weak.train) == [8] * 5 and counts(weak.valid) == [2] * 5
    for target in SVHN_STRONG: assert svhn_weak(int(target), data=data).classes[-1] == target
    mirrored = data.map(lambda split: replace(split, flip=True)) # as it is loaded for a strong network
    assert not svhn_weak("4", data=mirrored).train.flip
    for target in (5, 6, "9", "x"):
        with pytest.raises(ValueError, match="target in SVHN-S"): svhn_weak(target, data=data)


# Training of weak networks


@functools.cache
def few_digits() -> ImageData: return weak_data(load_dataset("digits", device="cpu"), [5, 6, 7], 3, 0.3, 0.1)


def states(model): return {name: t.clone() for name, t in model.state_dict().items()}


def test_best_and_half():
    assert best_and_half([0.1, 0.5, 0.2, 0.5]) == (2, 1) and best_and_half([0.5]) == (1, 1)
    assert best_and_half([0, 0, 0, 0, 0, 0, 1]) == (7, 3)


def test_underfitting_is_the_run_stopped_at_half():
    "Without a schedule, a run of half the epochs ends with the same weights"
    data = few_digits()
    networks = weak_models(data, "vgg12", ["overfitting", "underfitting"], width=0.125, epochs=7, batch_size=32,
                           momentum=0.9, lr=0.05, device="cpu")
    accuracies = networks["overfitting"].history.column("valid_accuracy")
    assert len(accuracies) == 7, "the run goes on behind its best epoch"
    assert (networks["overfitting"].epoch, networks["underfitting"].epoch) == best_and_half(accuracies)
    assert list(networks) == ["overfitting", "underfitting"] and networks["underfitting"].classes == data.classes
    for network in networks.values():
        again = create_model("vgg12", 4, width=0.125, seed=0)
        fit(again, data, epochs=network.epoch, batch_size=32, lr=0.05, momentum=0.9, nesterov=False,
            schedule="constant", augment=False, device="cpu")
        assert all(torch.equal(t, network.state_dict()[name]) for name, t in again.state_dict().items())
        found = (predict(network, data.valid).argmax(1) == data.valid.labels).double().mean().item()
        assert found == accuracies[network.epoch - 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.booleans())
def test_the_right_weights_are_kept_whatever_the_accuracies(accuracies, half):
    "With made-up accuracies: after epoch n the only weight is n"
    from modnb.cnnsplitter import weak

    def run(model, data, objective, optimizer, settings, history, progress):
        for epoch, accuracy in enumerate(accuracies, 1):
            with torch.no_grad(): model.weight.fill_(epoch)
            history.rows.append({"epoch": epoch, "loss": 0.0, "valid_accuracy": accuracy})
            yield history.last

    model, settings = nn.Conv2d(1, 1, 1), weak_settings("overfitting", device="cpu", epochs=len(accuracies))
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(weak, "run_epochs", run)
        history, kept = train_keeping(model, few_digits(), settings, half)
    best, middle = best_and_half(accuracies)
    assert {*kept} == ({best, middle} if half else {best}) and model.weight.item() == best
    assert all(state["weight"].item() == epoch for epoch, state in kept.items()) and len(history) == len(accuracies)


def test_test_images_do_not_matter():
    data = few_digits()
    other = ImageData(data.name, data.classes, data.train, data.valid, data.test.select([]))
    knobs = {"kinds": ["simple", "underfitting"], "width": 0.25, "epochs": 2, "device": "cpu", "batch_size": 64}
    first, second = weak_models(data, "vgg12", **knobs), weak_models(other, "vgg12", **knobs)
    for kind, network in first.items():
        assert all(torch.equal(t, second[kind].state_dict()[name]) for name, t in network.state_dict().items())
    simple = first["simple"].config
    assert (simple["name"], simple["width"], simple["image_size"]) == ("simple_simcnn", 0.25, 16)


def test_poor_fits_have_no_dropout_and_recipes_differ():
    assert isinstance(weak_settings("simple"), Settings)
    poor, paper = weak_settings("overfitting", device="cpu"), weak_settings("overfitting", "paper", device="cpu")
    assert (poor.momentum, poor.schedule, poor.weight_decay, poor.augment) == (0.0, "constant", 0.0, False)
    assert (paper.momentum, paper.nesterov, paper.schedule, paper.weight_decay) == (0.9, True, "steps", 0.0)
    assert weak_settings("simple", device="cpu").augment and weak_settings("simple", device="cpu").weight_decay == 1e-4
    data = weak_data(load_dataset("digits", image_size=32, device="cpu"), [5], 3, 0.1)
    network = weak_models(data, "rescnn", ["overfitting"], width=0.05, epochs=1, device="cpu")["overfitting"]
    assert not any(isinstance(part, nn.Dropout) for part in network.modules())
    simple = weak_models(data, "rescnn", ["simple"], width=0.1, epochs=1, device="cpu")["simple"]
    assert simple.config["name"] == "simple_rescnn"


@pytest.mark.parametrize("name, options, size, parameters", [
    ("simple_simcnn", {}, 32, 3 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 64 + 2570),
    ("simple_simcnn", {"convolutions": 2}, 32, 3 * 64 * 9 + 64 * 64 * 9 + 2 * 64 + 64 * 64 * 10 + 10),
    ("simple_simcnn", {"convolutions": 2, "kernels": 8, "kernel_size": 5, "padding": 0}, 32, 2216 + 2010),
    ("simple_rescnn", {}, 32, 3 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 64 + 40970),
    ("simple_rescnn", {"convolutions": 3, "kernels": 8, "kernel_size": 5}, 32, 600 + 2 * 1600 + 24 + 5130)])
def test_parameters_of_simple_networks(name, options, size, parameters):
    model = create_model(name, image_size=size, **options)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_simple_network_can_be_patched_and_filed(tmp_path):
    model, masks, _, split = pieces()
    weak = create_model("simple_rescnn", 3, width=0.1, image_size=16, seed=0).eval()
    patched = patch(weak, module_of("class 2"), split, "class 2", classes=["x", "y", "class 2"])
    save_patched(patched, tmp_path / "p")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_patched(tmp_path / "p")(x), patched(x))


def test_bad_training():
    data = few_digits()
    for options, match in [({"kinds": ["lazy"]}, "kind of weak network"), ({"lernrate": 1}, "knob of the training"),
                           ({"recipe": "mine"}, "recipe"), ({"epochs": 0}, "at least 1"),
                           ({"model": "vgg13"}, "no model")]:
        with pytest.raises(ValueError, match=match): weak_models(data, **{"model": "vgg12", "device": "cpu"} | options)
    without = ImageData(data.name, data.classes, data.train, data.valid.select([]), data.test)
    with pytest.raises(ValueError, match="no validation images"): weak_models(without, "vgg12", device="cpu")
    for name, options, match in [("simple_simcnn", {"image_size": 8}, "leave nothing"),
                                 ("simple_rescnn", {"convolutions": 2}, "3 or 4"),
                                 ("simple_rescnn", {"kernel_size": 4}, "odd")]:
        with pytest.raises(ValueError, match=match): create_model(name, **options)


@pytest.mark.parametrize("model, dataset, form, kernels", [
    ("simcnn", "svhn", "released", [(8, 5)] * 2), ("rescnn", "svhn", "released", [(8, 5)] * 3),
    ("simcnn", "cifar", "released", [(64, 3)] * 4), ("rescnn", "cifar", "released", [(64, 3)] * 4),
    ("simcnn", "cifar", "paper", [(64, 3)] * 2), ("simcnn", "svhn", "paper", [(64, 3)] * 2)])
def test_simple_networks_have_the_form_of_their_data(model, dataset, form, kernels):
    network = create_model(f"simple_{model}", 5, **form_of_simple(model, dataset, form))
    layers = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert [(layer.out_channels, layer.kernel_size[0]) for layer in layers] == kernels


# The experiment


def test_the_experiment_leaves_rows_that_its_files_repeat(tmp_path):
    small = {"strong_epochs": 2, "strong_limit": 300, "weak_epochs": 2, "targets": "1,4", "range_by": "quantile",
             "kinds": "simple,underfitting", "seed": 2}
    run_notebook(EXPERIMENT, tmp_path / "run.ipynb", small | {"out": str(tmp_path)})
    rows = read_rows(tmp_path / "rows.csv")
    table = rows.set_index(["run", "classes", "metric"])["value"]
    names = [prefix + n for prefix in ("weak_", "patched_") for n in ("precision", "recall", "f1", "other_accuracy")]
    for kind in ("simple", "underfitting"):
        run = f"trial/{tmp_path.name}-seed2/{kind}"
        for target in ("1", "4"):
            assert {*table[run][target].index} == {*names, "module_size"}
            patched = load_patched(tmp_path / f"patched-{target}-{kind}.safetensors")
            test = weak_data(load_dataset("digits", device="cpu"), ["5", "6", "7", "8", "9"], target, 0.1, seed=2).test
            again = precision_recall(predict(patched, test), test.labels, 5)
            assert again["recall"] == pytest.approx(table[run][target]["patched_recall"])
    assert len(ModuleMasks.load(tmp_path / "masks.safetensors").classes) == 5
    with pytest.raises(ValueError, match="no parameter 'target'. Did you mean 'targets'"):
        run_notebook(EXPERIMENT, tmp_path / "bad.ipynb", {"target": "1"})
