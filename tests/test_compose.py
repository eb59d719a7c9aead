"Composed models: which classes, how large, the same logits, files, ONNX."

import copy
import functools
import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from modnb.compat import MissingExtra
from modnb.compose import Composer, ParallelModules, compose, load_module, save_module, save_onnx
from modnb.data import Split
from modnb.extract import masked
from modnb.files import UnreadableFile
from modnb.masks import ModuleMasks
from modnb.moda.decompose import decompose
from modnb.moda.residual import contributions
from modnb.models import create_model
from modnb.prediction import evaluate
from modnb.units import unit_sites

CLASSES = [f"class {c}" for c in range(10)]


@functools.cache
def parts(name: str):
    "A network with random modules that keep about a third of the units each"
    torch.manual_seed(0)
    model = create_model(name, width=0.125).eval()
    x = torch.randn(3, 3, model.config.get("image_size") or 32, model.config.get("image_size") or 32)
    masks = {}
    for site, units in unit_sites(model, x).items():
        masks[site] = torch.rand(10, units) < 0.35
        masks[site][:, 0] = True
    return model, ModuleMasks(masks, CLASSES), x


MODELS = ["vgg16_4096", "resnet18", "mobilenet", "rescnn"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_oracle_in_the_order_asked_for(name, tmp_path):
    model, masks, x = parts(name)
    composed = compose(model, masks, ["class 7", 2, 5], x)
    assert composed.classes == ["class 7", "class 2", "class 5"]
    expected = masked(model, masks.keep([2, 5, 7]), x)(x)[:, [7, 2, 5]]
    assert torch.allclose(composed(x), expected, rtol=1e-4, atol=1e-5)
    save_module(composed, tmp_path / "m.safetensors")
    again = load_module(tmp_path / "m.safetensors")
    assert again.classes == composed.classes and torch.equal(again(x), composed(x))
    assert torch.equal(copy.deepcopy(again)(x), composed(x))


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_classes_is_that_of_the_outputs_and_nothing_else(name):
    model, masks, x = parts(name)
    composer = Composer(model, masks, x)
    sorted_outputs = composer([1, 4, 8])(x)
    for order in itertools.permutations([1, 4, 8]):
        found = composer(order)
        assert found.classes == [CLASSES[c] for c in order]
        assert torch.equal(found(x), sorted_outputs[:, [[1, 4, 8].index(c) for c in order]])


def test_answers_go_by_names_in_any_order():
    "A network for 7 and 3, asked about images of 3 and 7: nobody has to know an order"
    model, masks, x = parts("resnet18")
    images = torch.randint(256, [60, 3, *x.shape[2:]], dtype=torch.uint8)
    split = Split(images, torch.arange(60) % 10, CLASSES, (0.5,) * 3, (0.25,) * 3)
    found = {order: evaluate(compose(model, masks, order, x), split.subtask(order), precision="float32")
             for order in itertools.permutations([3, 7, 8])}
    assert len({*found.values()}) == 1
    with pytest.raises(ValueError, match="no output for the class 'class 1'"):
        evaluate(compose(model, masks, [3, 7], x), split.subtask([1, 3]))


def test_outputs_are_named_or_refused():
    "Masks of two classes for a network with ten outputs: which two?"
    model, masks, x = parts("resnet18")
    pair = ModuleMasks({site: mask[[3, 7]] for site, mask in masks.masks.items()}, ["three", "seven"])
    with pytest.raises(ValueError, match="10 outputs for the 2 classes .three, seven."):
        compose(model, pair, ["seven"], x)
    expected = compose(model, masks, [7, 3], x)(x)
    for outputs in ({"seven": 7, "three": 3, "nine": 9}, [3, 7], [str(c) if c not in (3, 7) else
                    {3: "three", 7: "seven"}[c] for c in range(10)]):
        assert torch.equal(compose(model, pair, ["seven", "three"], x, outputs=outputs)(x), expected)
    for wrong, message in [({"seven": 7}, "no output for the class 'three'"), ([3, 10], "output of seven must be"),
                           ([3, 3], "different numbers"), (["three", "seven"], "2 names for the 10 outputs")]:
        with pytest.raises(ValueError, match=message): compose(model, pair, ["seven"], x, outputs=wrong)


class Answers(nn.Module):
    "A network that returns its logits among other things"
    def __init__(self, net, answer):
        super().__init__()
        self.net, self.answer = net, answer

    def forward(self, x): return self.answer(self.net(x))


@pytest.mark.parametrize("answer", [lambda y: (y,), lambda y: {"logits": y, "hidden": 2 * y}, lambda y: (y, None)])
def test_logits_among_other_things_are_found(answer):
    model, masks, x = parts("rescnn")
    split = Split(torch.randint(256, [20, 3, *x.shape[2:]], dtype=torch.uint8), torch.arange(20) % 10, CLASSES,
                  (0.5,) * 3, (0.25,) * 3)
    found = Answers(model, answer)
    assert evaluate(found, split) == evaluate(model, split)
    inner = decompose(found, split)
    assert inner.flat().equal(decompose(model, split).flat())
    small = compose(found, inner, [7, 3], split)
    assert torch.equal(small(x), compose(model, decompose(model, split), [7, 3], split)(x))
    assert [*contributions(found, split).values()][0].shape[0] == 10
    both = Answers(model, lambda y: (y, 2 * y))
    for what in (evaluate, contributions, lambda net, data: compose(net, inner, [7], data)):
        with pytest.raises(ValueError, match="layer that returns the logits alone"): what(both, split)


def test_what_pixels_were_normalised_with_travels(tmp_path):
    model, masks, x = parts("resnet18")
    images = torch.randint(256, [20, 3, *x.shape[2:]], dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 10, CLASSES, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), resize=40)
    composed = compose(model, masks, [7, 3], split)
    assert composed.preparation == split.preparation() and composed.preparation["resize"] == 40
    beside = ParallelModules([compose(model, masks, [7], split), compose(model, masks, [3], split)])
    for number, module in enumerate((composed, beside, copy.deepcopy(composed))):
        save_module(module, tmp_path / f"{number}.safetensors")
        again = load_module(tmp_path / f"{number}.safetensors")
        assert again.preparation == split.preparation()
        evaluate(again, split.subtask([3, 7]))
        with pytest.raises(ValueError, match="made for images with mean"):
            evaluate(again, replace(split, mean=(0.5, 0.5, 0.5)).subtask([3, 7]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_numbers_keep_their_format(dtype, tmp_path):
    model, masks, x = parts("rescnn")
    model = copy.deepcopy(model).to(dtype)
    composed = compose(model, masks, [7, 3], x)
    assert composed(x.to(dtype)).dtype == dtype
    save_module(composed, tmp_path / "m")
    again = load_module(tmp_path / "m", model)
    assert torch.equal(again(x.to(dtype)), composed(x.to(dtype)))


@pytest.mark.parametrize("name", MODELS)
def test_more_classes_are_never_smaller(name):
    model, masks, x = parts(name)
    composer = Composer(model, masks, x)
    sizes = [sum(p.numel() for p in composer(range(n)).parameters()) for n in range(1, 11)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_knows_what_the_original_knows(name, tmp_path):
    model, masks, x = parts(name)
    composed = compose(model, masks, [4, 7], x)
    twin = copy.deepcopy(copy.deepcopy(composed))
    assert twin.classes == composed.classes == ["class 4", "class 7"] and twin.recipe == composed.recipe
    assert repr(twin) == repr(composed) and twin.keep.keys() == composed.keep.keys()
    assert twin.state_dict().keys() == composed.state_dict().keys() and torch.equal(twin(x), composed(x))
    save_module(twin, tmp_path / "m.safetensors")
    assert torch.equal(load_module(tmp_path / "m.safetensors")(x), composed(x))
    for parameter in twin.parameters(): nn.init.zeros_(parameter)
    assert not torch.equal(twin(x), composed(x)), "nothing is shared"


def test_composing_leaves_evaluation_mode():
    model, masks, x = parts("resnet18")
    training = copy.deepcopy(model).train()
    composed = compose(training, masks, [4, 7], x)
    assert training.training and not any(layer.training for layer in composed.modules())
    assert torch.equal(composed(x), compose(model, masks, [4, 7], x)(x))


def test_a_composed_model_is_printed_in_a_line():
    model, masks, x = parts("resnet18")
    composed = compose(model, masks, [4, 7], x)
    weights = sum(p.numel() for p in composed.parameters())
    about = f"{type(model).__name__} for class 4, class 7, extracted: {weights:,} weights"
    assert str(composed) == repr(composed) == about
    assert "def forward" in composed.code, "the code is still there for whoever wants it"


def test_full_masks_and_all_classes_give_the_model():
    model, masks, x = parts("resnet18")
    full = ModuleMasks({s: torch.ones_like(m) for s, m in masks.masks.items()}, CLASSES)
    assert torch.equal(compose(model, full, CLASSES, x)(x), model(x))


def test_a_module_has_one_output():
    model, masks, x = parts("vgg16_4096")
    assert compose(model, masks, ["class 3"], x)(x).shape == (3, 1)


@pytest.mark.parametrize("name", MODELS)
def test_file_round_trip(name, tmp_path):
    model, masks, x = parts(name)
    composed = compose(model, masks, [0, 9], x)
    save_module(composed, tmp_path / "m.safetensors")
    again = load_module(tmp_path / "m.safetensors")
    assert torch.equal(again(x), composed(x)) and again.classes == composed.classes
    save_module(again, tmp_path / "n.safetensors")  # what was loaded can be saved again
    assert torch.equal(load_module(tmp_path / "n.safetensors")(x), composed(x))


def test_files_of_networks_outside_the_registry(tmp_path):
    def build(): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())

    model, x = build().eval(), torch.randn(2, 3, 1, 1)
    masks = ModuleMasks({"1": torch.tensor([[True, False, True, False], [False, True, False, True]])}, ["a", "b"])
    composed = compose(model, masks, ["a"], x)
    save_module(composed, tmp_path / "m")
    with pytest.raises(ValueError, match="not in the registry"): load_module(tmp_path / "m")
    assert torch.equal(load_module(tmp_path / "m", build())(x), composed(x))
    other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten())
    with pytest.raises(UnreadableFile, match="another architecture"): load_module(tmp_path / "m", other)
    masks.save(tmp_path / "masks")
    with pytest.raises(UnreadableFile, match="holds masks, not module"): load_module(tmp_path / "masks")
    with pytest.raises(ValueError, match="what compose returns"): save_module(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bad_classes():
    model, masks, x = parts("resnet18")
    for classes, match in [(["class 10"], "class 10"), ([10], "10"), ([], "no class"), ([1, "class 1"], "class 1"),
                           (None, "no class chosen. There is: class 0")]:
        with pytest.raises(ValueError, match=match): compose(model, masks, classes, x)


def test_masks_of_another_model():
    _, masks, x = parts("resnet18")
    with pytest.raises(ValueError, match="this network has no site"): compose(parts("rescnn")[0], masks, [0, 1], x)
    wider = create_model("resnet18", width=0.25).eval()
    with pytest.raises(ValueError, match="entries, but the site has"): compose(wider, masks, [0, 1], x)


def test_onnx_export(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, masks, x = parts("resnet18")
    composed = compose(model, masks, [0, 4], x).train()
    save_onnx(composed, x[:1], tmp_path / "m.onnx", {"mean": [0.5]})
    assert composed.training and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert about == {"classes": ["class 0", "class 4"], "mean": [0.5]}
    composed.eval()
    for images in (x[:1], torch.randn(5, *x.shape[1:])):
        found = torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
        assert torch.allclose(found, composed(images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg16_4096", "resnet18"])
def test_units_in_multiples(name, tmp_path):
    "Filled up, still the oracle's logits, and files know which units were added"
    model, masks, x = parts(name)
    small, round8 = compose(model, masks, [0, 4], x), compose(model, masks, [0, 4], x, multiple=8)
    keep = masks.keep([0, 4], multiple=8)
    for site in masks.sites:
        before = masks.keep([0, 4])[site]
        assert (keep[site] | ~before).all() and (keep[site].sum() % 8 == 0 or keep[site].all())
        assert keep[site].sum() - before.sum() < 8
    assert any((keep[site] & ~mask).any() for site, mask in masks.keep([0, 4]).items())
    expected = masked(model, keep, x)(x)[:, [0, 4]]
    assert torch.allclose(round8(x), expected, rtol=1e-3, atol=1e-5)
    assert sum(p.numel() for p in round8.parameters()) > sum(p.numel() for p in small.parameters())
    save_module(round8, tmp_path / "m")
    assert torch.equal(load_module(tmp_path / "m", model)(x), round8(x))


def test_onnx_export_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r"pip install 'modnb\[onnx\]'"):
        save_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "m.onnx")
    assert not [*tmp_path.iterdir()]
