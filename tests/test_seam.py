"""SeaM: weights behind gates, target problems, the choice of a state, structure of sparse networks, bad input."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from modnb.data import Split
from modnb.lab.results import read_rows
from modnb.lab.running import run_notebook
from modnb.metrics import count_weights
from modnb.models import create_model
from modnb.seam.structure import find_units, make_module, paths, shrink, sparse_multiply_adds, sparse_network
from modnb.seam.weights import (
    MaskedNetwork,
    Problem,
    State,
    choose_state,
    intact_accuracy,
    mask_weights,
    problem_images,
    target_problem,
    weight_names,
)
from modnb.units import CONV_LAYERS

CLASSES = ["a", "b", "c"]
EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"


def network(name: str = "vgg12", classes: int = 3) -> nn.Module:
    model = create_model(name, num_classes=classes, width=0.125, image_size=16, seed=0)
    generator = torch.Generator().manual_seed(1)
    if name == "vit_small": nn.init.normal_(model.heads.head.weight, generator=generator) # which begins with zeros
    for layer in model.modules(): # as after a training
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def sparse(name: str, share: float, seed: int = 0) -> nn.Module:
    "A network with weights removed by chance, whole rows and columns among them"
    model, generator = network(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in weight_names(model):
            values = model.get_parameter(name)
            values *= torch.rand(values.shape, generator=generator) < share
            if values.ndim > 1 and len(values) > 4 and values.shape[1] > 3:
                values[torch.rand(len(values), generator=generator) < 0.3] = 0
                values[:, torch.rand(values.shape[1], generator=generator) < 0.2] = 0
    return model


def split(count: int = 24, classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 100, (count, 3, 16, 16), generator=generator)
    images[torch.arange(count), labels] += 150 # a colour for each class
    return Split(images.byte(), labels, CLASSES[:classes], (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("name", ["vgg12", "resnet18", "vit_small"])
def test_open_gates_change_nothing(name):
    model, images = network(name), torch.rand(4, 3, 16, 16)
    made = MaskedNetwork(model, images, 2).eval()
    with torch.no_grad(): assert torch.allclose(made(images), made.head(model(images)), atol=1e-5)
    assert made.share() == 1


def test_a_removed_weight_has_the_gradient_of_its_value_times_the_weights():
    model, images = network("lenet5"), torch.rand(4, 3, 16, 16)
    made = MaskedNetwork(model, images, 2).eval()
    for values in made.values: values.data[torch.rand(values.shape) < 0.2] = -0.5
    weights = {name: tensor.detach().requires_grad_() for name, tensor in made.weights().items()}
    made(images).sum().backward()
    torch.func.functional_call(made.network, weights, (images,))
    made.head(torch.func.functional_call(made.network, weights, (images,))).sum().backward()
    shut = 0
    for name, values in zip(made.names, made.values):
        expected = (weights[name].grad * made.network.get_parameter(name)).clamp(-1, 1)
        assert torch.allclose(values.grad, expected, atol=1e-5)
        shut += int((values.grad[values <= 0] != 0).sum())
    assert shut > 0, "weights that are gone hear that they are missed"


def test_gates_are_of_convolutions_and_linear_layers_alone():
    names = weight_names(network("vgg12"))
    assert any(name.endswith("bias") for name in names) and not any("norm" in name or "bn" in name for name in names)
    made = MaskedNetwork(create_model("vgg16", width=0.125, image_size=32, seed=0), torch.rand(2, 3, 32, 32), 2).train()
    norms = [layer for layer in made.network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and not made.network.training and not any(layer.training for layer in norms)
    drops = [layer for layer in made.network.modules() if isinstance(layer, nn.Dropout)]
    assert all(layer.training for layer in drops)


def test_target_problems():
    problem = target_problem(["c", "a"], CLASSES)
    assert problem == Problem([0, 2], ["a", "c"], False)
    assert problem_images(split(), problem).labels.bincount().tolist() == [8, 8]
    against = target_problem("b", CLASSES, against_rest=True)
    images = problem_images(split(), against, seed=3)
    assert images.classes == ["b", "rest"] and images.labels.bincount().tolist() == [8, 8]
    assert torch.equal(images.images, problem_images(split(), against, seed=3).images), "drawn once"


def test_the_whole_network_can_be_judged_in_two_ways():
    class Says(nn.Module): # class 2 for every image, then class 1
        def forward(self, x): return torch.tensor([0.0, 1.0, 2.0]).expand(len(x), 3) + 0 * x.mean()
    problem = target_problem(["a", "b"], CLASSES)
    assert intact_accuracy(Says(), split(), problem, "problem") == 0.5
    assert intact_accuracy(Says(), split(), problem, "all") == 0
    assert intact_accuracy(Says(), split(), target_problem("a", CLASSES, True)) == 0.5
    with pytest.raises(ValueError, match="no reference 'both'"): intact_accuracy(Says(), split(), problem, "both")


def test_states_are_chosen_as_published():
    numbers = [(0.90, 1.0), (0.96, 0.5), (0.97, 0.5), (0.95, 0.1), (0.96, 0.4996), (0.99, 0.4999)]
    path = [State(*pair) for pair in numbers]
    assert choose_state(path, 0.96) == 5, "smaller by steps of a tenth of a point; the last is larger than it"
    assert choose_state(path[:3], 0.96) == 3, "not larger, but more accurate"
    assert choose_state(path, 0.5) == 4 and choose_state(path, 1.0) == 4, "if nobody reaches it: largest difference"


@pytest.mark.parametrize("name, share", [
    ("vgg12", 0.3), ("vgg12", 0.05), ("resnet18", 0.1), ("mobilenet", 0.2), ("lenet5", 0.3), ("vit_small", 0.3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_shrunk_network_says_the_same(name, share, seed):
    model, images = sparse(name, share, seed), torch.rand(4, 3, 16, 16)
    before, whole = copy.deepcopy(model.state_dict()), count_weights(model)
    shrunk = shrink(model, images)
    with torch.no_grad(): assert torch.allclose(shrunk.network(images), model(images), atol=1e-4)
    assert count_weights(shrunk.network) < whole and 0 < shrunk.filled <= 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert sparse_multiply_adds(model, images) < sparse_multiply_adds(network(name), images)


def test_paths_against_a_slow_search():
    "Unit by unit: reached and read along weights of a network of convolutions in a row"
    model = sparse("vgg12", 0.3)
    images, convs = torch.rand(2, 3, 16, 16), [layer for layer in model.modules() if isinstance(layer, CONV_LAYERS)]
    tables = [conv.weight.detach().abs().flatten(2).sum(2) != 0 for conv in convs] # [K, K before]
    reached, alive = [], {*range(3)}
    for table in tables:
        alive = {k for k in range(len(table)) if any(table[k, j] for j in alive)}
        reached.append(alive)
    found = list(paths(model, images).items())[:len(convs)]
    for (_, (there, _)), expected in zip(found, reached): assert {*there.nonzero().flatten().tolist()} == expected
    for number in range(4): # what the next layer does not look at is not read; maps as wide as kernels
        read, read_next = found[number][1][1], found[number + 1][1][1]
        looked_at = tables[number + 1][read_next].any(0)
        assert torch.equal(read, looked_at)


def test_units_that_say_the_same_for_every_image_stay():
    model, images = network("vgg12"), torch.rand(2, 3, 16, 16)
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    norm = next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))
    with torch.no_grad():
        first.weight[:2] = 0
        if first.bias is not None: first.bias[:2] = 0
        norm.running_mean[:2], norm.weight[:2], norm.bias[:2] = 0, 1, torch.tensor([0.5, -0.5])
    units = next(iter(find_units(model, images).values()))
    assert units.constant[:2].tolist() == [True, False] and units.keep[:3].tolist() == [True, False, True]


def test_learning_gives_a_module_for_the_problem():
    model, images = network(), split()
    found = mask_weights(model, images, split(12), ["a", "b"], epochs=6, batch_size=8, lr=0.2, head_lr=0.01)
    again = mask_weights(model, images, split(12), ["a", "b"], epochs=6, batch_size=8, lr=0.2, head_lr=0.01)
    assert found.states == again.states and len(found.states) == 6
    assert found.states[0].share == 1, "the first epoch is of the head alone"
    assert found.states[-1].share < 1
    assert found.network.share().item() == pytest.approx(found.states[found.epoch - 1].share)
    module, pixels = make_module(found, torch.rand(2, 3, 16, 16)), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(module.network(pixels), found.network(pixels), atol=1e-3)
        assert torch.allclose(found.network.head(sparse_network(found)(pixels)), found.network(pixels), atol=1e-4)
    assert module.network.classes == ["a", "b"] and module.masks.classes == ["a", "b"]
    assert all(torch.equal(mask[0], mask[1]) for mask in module.masks.masks.values())


def test_one_class_against_the_rest():
    found = mask_weights(network(), split(), split(12), "b", against_rest=True, epochs=2, batch_size=8)
    module = make_module(found, torch.rand(2, 3, 16, 16))
    assert module.network.classes == ["b", "rest"] and module.masks.classes == ["b"]
    assert found.network.head[-1].out_features == 2


@pytest.mark.parametrize("change, said", [
    ({"classes": ["a"]}, "a single class, 'a', has nothing to be told from"),
    ({"classes": CLASSES}, "has all 3 classes"),
    ({"classes": ["a", "b"], "against_rest": True}, "is for one class"), ({"classes": ["a", "x"]}, "no class 'x'"),
    ({"alpha": 1e7, "lr": 1.0, "epochs": 4}, "alpha=10000000.0 has removed all of"), ({"alpha": 0}, "alpha"),
    ({"train": split().select([0, 3, 6])}, "only images of 'a'"), ({"judges": split().select([])}, "no image judges"),
    ({"batch_size": 1}, "batch_size"), ({"epochs": 1}, "epochs"),
    ({"model": nn.Flatten()}, "no convolution and no linear layer|outputs")])
def test_bad_input_is_named(change, said):
    given = {"model": network(), "train": split(), "judges": split(12), "classes": ["a", "b"], "epochs": 2}
    given["batch_size"] = 8
    with pytest.raises(ValueError, match=said): mask_weights(**(given | change))


def test_the_experiment_leaves_rows_that_can_be_compared(tmp_path):
    "From a trained network to rows, in the names that other methods use; the problem of all classes is left out"
    settings = {"out": str(tmp_path), "sizes": "2,10", "gate_epochs": 8, "gate_lr": 0.1}
    run_notebook(EXPERIMENTS / "seam.ipynb", tmp_path / "seam.ipynb", settings)
    rows = read_rows(tmp_path / "rows.csv")
    assert set(rows.metric) == {
        "accuracy", "composed_accuracy", "composed_size", "composed_flops", "weight_retention", "filled",
        "constant_units", "sparse_flops", "modularizing_time", "union_retention"}
    assert rows.classes.unique().tolist() == ["1|8"] and (rows.system == "seam").all()
    values = rows.set_index("metric").value
    assert values["weight_retention"] < 1 and values["composed_size"] < 1.01 and 0 < values["filled"] <= 1
