"""The networks: published counts, structure, first weights, and what `create_model` refuses."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from modnb.models import RECIPES, create_model, list_models, model_options, register_model, scaled

logging.getLogger("fvcore").setLevel(logging.ERROR)
ACTIVATIONS = {"vgg16": 15, "vgg16_4096": 15, "vgg12": 11, "simcnn": 15, "rescnn": 12, "resnet18": 17, "mobilenet": 27,
               "lenet5": 4}
every_model = pytest.mark.parametrize("name", list(ACTIVATIONS))


def shapes(name, *sizes, **options):
    "Build without drawing weights."
    with torch.device("meta"): return create_model(name, *sizes, **options)


def parameters(model):
    return sum(weights.numel() for weights in model.parameters())


def convolutions(model):
    return [part for part in model.modules() if isinstance(part, nn.Conv2d)]


def images(model, count=2):
    return torch.randn(count, 3, *[model.config["image_size"]] * 2, generator=torch.Generator().manual_seed(0))


def test_the_list():
    assert set(ACTIVATIONS) <= set(list_models())


@pytest.mark.parametrize("name, classes, expected", [
    ("vgg16", 10, 15_253_578), ("resnet18", 10, 11_173_962), ("simcnn", 10, 15_245_130), ("rescnn", 10, 16_010_122),
    ("vgg16_4096", 10, 33_646_666), ("vgg16_4096", 100, 34_015_396), ("resnet18", 100, 11_220_132),
    ("mobilenet", 10, 3_217_226), ("mobilenet", 100, 3_309_476), ("lenet5", 6, 61_666)])
def test_published_parameters(name, classes, expected):
    assert parameters(shapes(name, classes)) == expected


@pytest.mark.parametrize("name, modular, generators", [
    ("simcnn", 16_982_026, 1_728_576), ("rescnn", 17_886_474, 1_867_904)])
def test_parameters_of_modular_versions_without_their_generators(name, modular, generators):
    assert parameters(shapes(name, batch_norm=True)) == modular - generators


@pytest.mark.parametrize("name, expected", [
    ("vgg16", "315.11"), ("resnet18", "558.50"), ("simcnn", "313.73"), ("rescnn", "431.17")])
def test_published_multiply_adds_in_training_mode(name, expected):
    model = create_model(name).train()
    count = FlopCountAnalysis(model, images(model, 1)).unsupported_ops_warnings(False).total()
    assert f"{count / 1e6:.2f}" == expected


@pytest.mark.parametrize("name, count, kernels", [
    ("vgg16", 13, 4224), ("simcnn", 13, 4224), ("rescnn", 12, 4288), ("resnet18", 20, 4800), ("vgg12", 9, 2432)])
def test_kernels(name, count, kernels):
    parts = convolutions(shapes(name))
    assert (len(parts), sum(part.out_channels for part in parts)) == (count, kernels)


def test_short_vgg_for_small_runs():
    model = shapes("vgg12", width=0.25)
    assert [part.out_channels for part in convolutions(model)] == [16, 16, 32, 32, 64, 64, 128, 128, 128]
    linears = [(part.in_features, part.out_features) for part in model.modules() if isinstance(part, nn.Linear)]
    assert linears == [(128, 128), (128, 128), (128, 10)]


@every_model
def test_trace_has_every_activation_once_and_the_same_output(name):
    model = create_model(name, num_classes=4, width=0.05, seed=0).eval()
    traced = fx.symbolic_trace(model)
    parts = dict(model.named_modules())
    called = [node.target for node in traced.graph.nodes
              if node.op == "call_module" and isinstance(parts[node.target], nn.ReLU)]
    assert len(called) == len(set(called)) == ACTIVATIONS[name]
    assert not any(parts[target].inplace for target in called)
    functions = {node.target for node in traced.graph.nodes if node.op in ("call_function", "call_method")}
    assert {function.__name__ for function in functions} <= {"add"}
    with torch.no_grad():
        logits = model(images(model))
        assert logits.shape == (2, 4)
        assert torch.equal(logits, traced(images(model)))


@every_model
def test_trains(name):
    model = create_model(name, width=0.05, seed=0).train()
    F.cross_entropy(model(images(model, 4)), torch.arange(4)).backward()
    assert all(weights.grad is not None and weights.grad.isfinite().all() for weights in model.parameters())


def test_simple_networks_are_their_plans():
    parts = [type(part) for part in shapes("vgg16").features]
    norms = [type(part) for part in shapes("simcnn").features]
    assert parts == [kind for size in (2, 2, 3, 3, 3)
                     for kind in [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * size + [nn.MaxPool2d]]
    assert norms == [kind for kind in parts if kind is not nn.BatchNorm2d]


def test_rescnn_against_its_description():
    "The output of 4, 8 and 12, behind its ReLU, is added to the input of 3, 7 and 11; no ReLU behind the sum."
    model = create_model("rescnn", width=0.05, seed=0).eval()
    layers = [lambda x, part=part: F.conv2d(x, part.weight, part.bias, padding=1) for part in convolutions(model)]
    x = images(model)
    pooled, added = {2, 5, 6, 9, 10}, {4, 8, 12}
    for number, layer in enumerate(layers, start=1):
        if number + 1 in added: kept = x
        x = layer(x).relu()
        if number in pooled: x = F.max_pool2d(x, 2)
        if number in added: x = x + kept
    linear = model.classifier.linear1
    expected = F.linear(x.flatten(1), linear.weight, linear.bias)
    with torch.no_grad(): torch.testing.assert_close(model(images(model)), expected)


def test_resnet_blocks_activate_the_sum():
    model = shapes("resnet18", width=0.1)
    nodes = fx.symbolic_trace(model).graph.nodes
    behind = [node for node in nodes if str(node.target).endswith("activation")]
    assert len(behind) == 8 and all(node.args[0].op == "call_function" for node in behind)
    shortcuts = [part for part in convolutions(model) if part.kernel_size == (1, 1)]
    assert len(shortcuts) == 3 and all(part.stride == (2, 2) for part in shortcuts)
    assert not any(part.bias is not None for part in convolutions(model))


def test_mobilenet_alternates_depthwise_and_pointwise():
    stem, *rest = convolutions(shapes("mobilenet"))
    assert stem.stride == (1, 1) and len(rest) == 26
    for depthwise, pointwise in zip(rest[::2], rest[1::2], strict=True):
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == pointwise.in_channels
        assert (pointwise.kernel_size, pointwise.groups) == ((1, 1), 1)
    assert sum(part.stride == (2, 2) for part in rest) == 4


@pytest.mark.parametrize("name", ["simcnn", "rescnn"])
def test_modular_versions_normalise_all_but_the_first(name):
    parts = [type(part) for part in shapes(name, batch_norm=True).modules()
             if isinstance(part, nn.Conv2d | nn.BatchNorm2d)]
    assert parts[0] is nn.Conv2d and parts[1:] == [nn.Conv2d, nn.BatchNorm2d] * (len(parts) // 2)
    assert nn.BatchNorm2d not in [type(part) for part in shapes(name).modules()]


@pytest.mark.parametrize("name, default, count", [
    ("vgg16", 0.5, 2), ("vgg16_4096", 0.0, 2), ("vgg12", 0.0, 2), ("simcnn", 0.5, 2), ("rescnn", 0.5, 1),
    ("resnet18", 0.0, 1), ("mobilenet", 0.0, 1), ("lenet5", 0.0, 2)])
def test_dropout(name, default, count):
    rates = lambda model: [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    assert rates(shapes(name)) == ([default] * count if default else [])
    assert rates(shapes(name, dropout=0.4)) == [0.4] * count
    assert rates(shapes(name, dropout=0.0)) == []
    order = [type(part) for part in shapes(name, dropout=0.4).classifier]
    assert order.index(nn.Dropout) < order.index(nn.Linear) or name.startswith(("vgg", "lenet"))
    with pytest.raises(ValueError, match="dropout probability"): shapes(name, dropout=1.5)


@every_model
def test_first_weights(name):
    model = create_model(name, width=0.5, seed=0)
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 2000:
            expected = math.sqrt(2 / (part.out_channels * part.kernel_size[0] ** 2))
            assert abs(part.weight.std().item() / expected - 1) < 0.1
            assert abs(part.weight.mean().item()) < 0.1 * expected
        if isinstance(part, nn.Conv2d) and part.bias is not None: assert not part.bias.any()
        if isinstance(part, nn.BatchNorm2d): assert part.weight.eq(1).all() and not part.bias.any()
        if isinstance(part, nn.Linear): check_scaled(part)


def check_scaled(linear):
    "Torch's own draw: uniform within 1 / sqrt(inputs)"
    limit = 1 / math.sqrt(linear.in_features)
    assert 0.9 * limit < linear.weight.abs().max().item() <= limit and linear.bias.any()


def linears(model):
    return [part for part in model.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("name", ["vgg16", "mobilenet"])
def test_the_width_decides_how_a_head_begins_unless_it_is_said(name):
    same = lambda one, other: all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    full, narrow = (create_model(name, width=width, seed=1) for width in (1, 0.25))
    assert [full.config["head"], narrow.config["head"]] == ["published", "scaled"]
    assert same(full, create_model(name, head="published", seed=1)), "the published network is what it was"
    assert same(narrow, create_model(name, width=0.25, head="scaled", seed=1))
    published = create_model(name, width=0.25, head="published", seed=1)
    assert not same(narrow, published) and published.config["head"] == "published"
    for part in linears(full) + linears(published):
        assert abs(part.weight.std().item() / 0.01 - 1) < 0.1 and not part.bias.any()
    for part in linears(narrow) + linears(create_model(name, head="scaled", seed=1)): check_scaled(part)
    convolved = zip(convolutions(narrow), convolutions(published), strict=True)
    assert all(torch.equal(one.weight, other.weight) for one, other in convolved), "the head alone is drawn anew"


def test_options_of_a_model():
    assert model_options("mobilenet") == {"dropout": 0.0, "head": None}
    assert [name for name in ACTIVATIONS if "head" in model_options(name)] == ["vgg16", "vgg16_4096", "mobilenet"]
    with pytest.raises(ValueError, match="Did you mean 'mobilenet'"): model_options("mobilnet")


@every_model
def test_config_builds_the_same_again(name):
    options = {"dropout": 0.25} if "dropout" in create_model(name, width=0.05).config else {}
    model = create_model(name, num_classes=3, width=0.05, seed=3, **options)
    again = create_model(**model.config, seed=3)
    assert again.config == model.config == {"name": name, "num_classes": 3, "width": 0.05,
                                            "image_size": RECIPES[name].image_size} | model.config | options
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    other = create_model(**model.config, seed=4)
    assert not torch.equal(next(model.parameters()), next(other.parameters()))


def test_seed_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    create_model("lenet5", seed=0)
    assert torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng():
        create_model("lenet5")
        assert not torch.equal(before, torch.get_rng_state())


@every_model
def test_smallest_image(name):
    minimum = RECIPES[name].minimum
    model = create_model(name, width=0.05, image_size=minimum).eval()
    assert model(images(model)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"at least {minimum}"): create_model(name, image_size=minimum - 1)


@every_model
@pytest.mark.parametrize("image_size", [33, 48, 64])
def test_other_image_sizes(name, image_size):
    model = shapes(name, width=0.05, image_size=image_size).eval()
    assert model(torch.empty(2, 3, image_size, image_size, device="meta")).shape == (2, 10)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 4096), st.floats(0.001, 4), st.floats(0.001, 4))
def test_scaled_grows_with_width(channels, one, other):
    narrow, wide = sorted([one, other])
    assert 1 <= scaled(channels, narrow) <= scaled(channels, wide)
    assert scaled(channels, 1) == channels


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(list(ACTIVATIONS)), st.floats(0.02, 1.5))
def test_every_layer_is_scaled(name, width):
    full, narrow = shapes(name), shapes(name, width=width)
    for big, small in zip(convolutions(full), convolutions(narrow), strict=True):
        assert small.out_channels == max(1, round(big.out_channels * width))


@pytest.mark.parametrize("arguments, words", [
    ({"name": "resnet81"}, "Did you mean 'resnet18'.*vgg16.*lenet5"),
    ({"name": "resnet18", "batch_norm": True}, "no option of resnet18 'batch_norm'.*There is: dropout"),
    ({"name": "resnet18", "head": "scaled"}, "no option of resnet18 'head'.*There is: dropout"),
    ({"name": "vgg16", "head": "scale"}, "no head 'scale'. Did you mean 'scaled'. There is: published, scaled"),
    ({"name": "simcnn", "batchnorm": True}, "Did you mean 'batch_norm'.*dropout, batch_norm"),
    ({"name": "lenet5", "num_classes": 0}, "num_classes must be a whole number of at least 1"),
    ({"name": "lenet5", "num_classes": 2.5}, "num_classes"),
    ({"name": "lenet5", "num_classes": True}, "num_classes"),
    ({"name": "lenet5", "width": 0}, "width must be a number above 0"),
    ({"name": "lenet5", "width": math.nan}, "width"),
    ({"name": "lenet5", "width": "half"}, "width"),
    ({"name": "lenet5", "image_size": 31.5}, "image_size of lenet5"),
])
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words): create_model(**arguments)


def test_a_model_of_ones_own(monkeypatch):
    monkeypatch.setattr("modnb.models.RECIPES", dict(RECIPES))

    @register_model(image_size=8, minimum=2)
    def tiny(num_classes, width, image_size, *, hidden=4):
        layers = nn.Linear(3 * image_size**2, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        return nn.Sequential(nn.Flatten(), *layers)

    model = create_model("tiny", num_classes=2, hidden=5)
    assert model.config == {"name": "tiny", "num_classes": 2, "width": 1.0, "image_size": 8, "hidden": 5}
    assert "tiny" in list_models() and model(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


every_transformer = pytest.mark.parametrize("name", ["vit_small", "convnext_tiny"])


@pytest.mark.parametrize("name, patch, expected", [("vit_small", 16, 22_050_664), ("convnext_tiny", 4, 28_589_128)])
def test_transformers_of_published_size(name, patch, expected):
    "ViT-S with patches of 16 pixels and ConvNeXt-T, for 1,000 classes and 224 x 224 pixels"
    assert parameters(shapes(name, 1000, image_size=224, patch=patch)) == expected


@every_transformer
@pytest.mark.parametrize("size, width, depth", [(16, 0.05, 1), (32, 0.125, 2), (64, 0.25, 3)])
def test_transformers_of_any_size_are_built_again_from_their_config(name, size, width, depth):
    model = create_model(name, num_classes=3, width=width, image_size=size, depth=depth, seed=1)
    again = create_model(**model.config, seed=1)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.config["patch"] == size // {"vit_small": 8 if size > 16 else 4, "convnext_tiny": 16}[name]
    assert again(images(model)).shape == (2, 3)
    F.cross_entropy(model.train()(images(model)), torch.tensor([0, 2])).backward()
    assert all(weights.grad is not None and weights.grad.isfinite().all() for weights in model.parameters())


@pytest.mark.parametrize("width, heads, units", [
    (1.0, 6, 384), (0.5, 3, 192), (0.25, 2, 96), (0.125, 1, 48), (0.01, 1, 4)])
def test_heads_of_a_transformer_go_with_its_width(width, heads, units):
    attention = [part for part in shapes("vit_small", width=width, depth=2).modules()
                 if isinstance(part, nn.MultiheadAttention)]
    assert [(part.num_heads, part.embed_dim) for part in attention] == [(heads, units)] * 2


def test_blocks_of_a_convnext():
    depthwise = lambda **options: [part.out_channels for part in convolutions(shapes("convnext_tiny", **options))
                                   if part.groups > 1]
    assert depthwise() == [96] * 3 + [192] * 3 + [384] * 9 + [768] * 3
    assert depthwise(width=0.25, depth=2) == [24, 48, 96, 96, 192]


@every_transformer
@pytest.mark.parametrize("options, words", [
    ({"image_size": 36, "patch": 5}, "patches of 5 pixels do not fill an image of 36"), ({"patch": 0}, "patch must be"),
    ({"depth": 0}, "depth must be"), ({"patch": 64}, "patch must be"), ({"image_size": 4}, "image_size of")])
def test_transformers_that_cannot_be(name, options, words):
    with pytest.raises(ValueError, match=words): create_model(name, width=0.05, **options)
