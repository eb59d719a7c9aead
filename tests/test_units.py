"Sites, names, shapes and observers."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modnb.compat import import_torchvision
from modnb.models import create_model, list_models
from modnb.units import KINDS, observe, site_axes, trace, unit_axis, unit_sites

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("name, sites, units", [
    ("vgg16", 15, 4224 + 2 * 512), ("vgg16_4096", 15, 4224 + 2 * 4096),
    ("resnet18", 17, 64 + 4 * (64 + 128 + 256 + 512)),
    ("mobilenet", 27, None), ("lenet5", 4, 6 + 16 + 120 + 84), ("simcnn", 15, 4224 + 2 * 512), ("rescnn", 12, 4288)])
def test_activation_sites_are_those_of_the_published_programs(name, sites, units):
    found = unit_sites(create_model(name), IMAGE)
    assert len(found) == sites
    if units is not None: assert sum(found.values()) == units


@pytest.mark.parametrize("name, masked", [("vgg16", 4160), ("resnet18", 4736), ("simcnn", 4160), ("rescnn", 4224)])
def test_normalised_convolutions_but_the_first_are_those_that_mwt_masks(name, masked):
    found = list(unit_sites(create_model(name), IMAGE, "norm").values())
    assert sum(found[1:]) == masked


def test_the_second_relu_of_a_block_stands_behind_the_sum():
    traced = trace(create_model("resnet18", width=0.125), IMAGE)
    named = {n.meta["site"]: n for n in traced.graph.nodes}
    behind_sums = [s for s in unit_sites(create_model("resnet18", width=0.125), IMAGE)
                   if named[s].args[0].op == "call_function"]
    assert len(behind_sums) == 8


@pytest.mark.parametrize("name", list_models())
def test_names_repeat(name):
    first, second = (unit_sites(create_model(name, width=0.25, image_size=32), IMAGE) for _ in range(2))
    assert list(first.items()) == list(second.items())


def test_layers_called_twice_have_two_names():
    net = import_torchvision().models.resnet18(weights=None)
    sites = list(unit_sites(net, torch.zeros(1, 3, 64, 64)))
    assert len(sites) == 17 and "layer1.0.relu" in sites and "layer1.0.relu@2" in sites


def test_outputs_are_no_sites():
    squeezenet = import_torchvision().models.squeezenet1_1(weights=None, num_classes=7)
    x = torch.zeros(1, 3, 64, 64)
    for kind in KINDS:
        assert not {"classifier.1", "classifier.2"} & set(unit_sites(squeezenet, x, kind))
    assert list(unit_sites(create_model("lenet5"), IMAGE, "linear").values()) == [120, 84]


def test_units_of_tokens_lie_in_the_last_dimension():
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

        def forward(self, x): return self.down(F.gelu(self.up(x))).mean(1)

    assert unit_sites(Mlp(), torch.zeros(2, 5, 4)) == {"gelu": 12}
    node = next(n for n in trace(Mlp(), torch.zeros(2, 5, 4)).graph.nodes if n.name == "gelu")
    assert unit_axis(node) == 2


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "mobilenet"])
def test_observing_changes_nothing_and_shares_everything(name):
    torch.manual_seed(0)
    model, x = create_model(name, width=0.125).eval(), torch.randn(4, 3, 32, 32)
    sites = unit_sites(model, x)
    watched = observe(model, sites)
    logits, seen = watched(x)
    assert torch.equal(logits, model(x))
    assert {s: t.shape[1] for s, t in seen.items()} == sites
    assert {p.data_ptr() for p in watched.parameters()} == {p.data_ptr() for p in model.parameters()}


def test_training_the_observer_trains_the_model():
    torch.manual_seed(0)
    model, x = create_model("vgg12", width=0.125).train(), torch.randn(4, 3, 16, 16)
    before = [p.clone() for p in model.parameters()]
    watched = observe(model, unit_sites(model, x))
    assert model.training
    logits, seen = watched(x)
    (logits.sum() + sum(t.mean() for t in seen.values())).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(watched.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before) if p.grad.abs().sum() > 0)


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True),
                                  lambda x: x.relu_(), torch.relu_])
def test_observed_tensors_survive_operations_in_place(relu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 1), relu

        def forward(self, x): return self.relu(self.conv(x)).mean((2, 3))

    model, x = Net(), torch.randn(2, 3, 4, 4)
    _, seen = observe(model, ["conv"])(x)
    assert torch.equal(seen["conv"], model.conv(x)) and seen["conv"].min() < 0


def test_the_observer_compiles_into_one_graph():
    model, x = create_model("vgg12", width=0.125).eval(), torch.randn(2, 3, 16, 16)
    watched = observe(model, unit_sites(model, x))
    compiled = torch.compile(watched, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)[0], watched(x)[0])


def test_unknown_sites_and_kinds():
    model = create_model("lenet5")
    with pytest.raises(ValueError, match="no site 'conv1x'.*did you mean"): observe(model, ["conv1x"])
    with pytest.raises(ValueError, match="unknown kind of site 'kernel'; there are activation"):
        unit_sites(model, IMAGE, "kernel")


def test_an_observer_with_an_example_puts_units_into_dimension_1():
    tokens = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(2), nn.Linear(64, 6), nn.ReLU(),
                           nn.Linear(6, 5), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 32, 32)
    assert site_axes(tokens, ["0", "3", "4"], x) == {"0": 1, "3": 2, "4": 2}
    _, seen = observe(tokens, ["0", "3", "4"], x)(x)
    assert torch.equal(seen["0"], tokens[0](x)) and torch.equal(seen["3"], tokens[:4](x).transpose(1, 2))
    assert torch.equal(seen["4"], tokens[:5](x).transpose(1, 2)) and seen["4"].min() < 0, "before it is overwritten"
    assert unit_sites(tokens, x, "pointwise") == {"2": 6}, "the last layer gives the outputs"
    with pytest.raises(ValueError, match="no site 'nothing'"): observe(tokens, ["nothing"], x)
    with pytest.raises(ValueError, match="'size' cannot be looked at image by image: for 2 images it gives no tensor"):
        site_axes(Sized(), ["size"], x)


class Sized(nn.Module):
    def forward(self, x): return x * x.size(2)
