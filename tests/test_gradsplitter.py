"""GradSplitter: classes folded into the batch against one pass a class, heads, the choice of a state, bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from modnb.data import Split
from modnb.extract import masked
from modnb.gates import check_learnable, frozen, gate
from modnb.gradsplitter.gates import GatedNetwork, gate_sites, keep_one
from modnb.gradsplitter.learn import (
    Heads,
    Learned,
    Phase,
    State,
    all_logits,
    choose_state,
    epochs_of,
    learn_modules,
    make_modules,
    schedule,
    score_loss,
)
from modnb.lab.results import read_rows
from modnb.lab.running import run_notebook
from modnb.masks import ModuleMasks
from modnb.models import create_model

CLASSES = ["a", "b", "c"]
EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"


class Branches(nn.Module):
    "A path without a gate is added to one with gates."

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.last = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.last((x + self.relu(self.conv(x))).mean((2, 3)))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "branches": return Branches().eval()
    return create_model(name, num_classes=3, width=0.125, image_size=16, seed=0).eval()


def drawn(gated: GatedNetwork, seed: int = 0) -> GatedNetwork:
    "About half of the gates are shut"
    generator = torch.Generator().manual_seed(seed)
    for values in gated.values: values.data = torch.rand(values.shape, generator=generator) - 0.5
    return gated


def split(count: int = 24, classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 100, (count, 3, 16, 16), generator=generator)
    images[torch.arange(count), labels] += 150 # a colour for each class
    return Split(images.byte(), labels, CLASSES[:classes], (0.5,) * 3, (0.25,) * 3)


def test_a_gate_is_straight_through():
    values = torch.tensor([-2.0, 0.0, 1e-9, 3.0], requires_grad=True)
    (gate(values) * torch.tensor([0.3, -5.0, 5.0, 0.0])).sum().backward()
    assert gate(values).tolist() == [0, 0, 1, 1], "exactly zero is shut"
    assert values.grad.tolist() == pytest.approx([0.3, -1.0, 1.0, 0.0]), "limited, wherever the number is"


@pytest.mark.parametrize("name", ["vgg12", "resnet18", "mobilenet", "vit_small", "branches"])
def test_folded_classes_are_one_pass_a_class(name):
    "Outputs and gradients of the gates, against the masked network of each class by itself"
    model, images = network(name), torch.rand(4, 3, 16, 16)
    gated = GatedNetwork(model, images, 3, "first")
    with torch.no_grad(): found, whole = gated(images), model(images)
    assert torch.allclose(found, whole.expand(3, 4, 3), atol=1e-4), "all-ones gates change nothing"
    weights, together = torch.rand(3, 4, 3), drawn(gated)(images)
    (together * weights).sum().backward()
    found = [values.grad.clone() for values in gated.values]
    for c in range(3): # one after the other
        values = [v.detach()[c:c + 1].clone().requires_grad_() for v in gated.values]
        alone = gated.network(images, *map(gate, values))
        assert torch.allclose(alone, together[c], atol=1e-4)
        (alone * weights[c]).sum().backward()
        for folded, single in zip(found, values): assert torch.allclose(folded[c], single.grad[0], atol=1e-3)


@pytest.mark.parametrize("name", ["vgg12", "resnet18", "vit_small"])
def test_modules_are_the_gated_network(name):
    "Extracted and masked; a class without a kernel in a layer keeps the one nearest to being open, in both"
    model, images = network(name), torch.rand(4, 3, 16, 16)
    gated = drawn(GatedNetwork(model, images, 3))
    gated.values[-1].data[0] = -1 - torch.rand(gated.values[-1].shape[1])
    masks = ModuleMasks(gated.kept(), CLASSES).of(model)
    assert masks.flat().any() and not masks.flat().all() and list(masks.masks.values())[-1][0].sum() == 1
    heads = Heads(3, 3)
    modules = make_modules(model, Learned(masks, heads, [], 1), ["c", "a", "b"], images)
    with torch.no_grad():
        outputs = gated(images)
        for c in range(3): assert torch.allclose(outputs[c], masked(model, masks.keep([c]), images)(images), atol=1e-4)
        assert torch.allclose(modules(images), heads(outputs)[:, [2, 0, 1]], atol=1e-4)
    assert modules.classes == ["c", "a", "b"]


def test_the_published_rule_keeps_what_the_gated_network_had_not():
    values = torch.tensor([[-1.0, -0.5], [1.0, -1.0]])
    assert keep_one(gate(values), values, "first").tolist() == [[1, 0], [1, 0]]
    assert keep_one(gate(values), values, "largest").tolist() == [[0, 1], [1, 0]]
    gated = GatedNetwork(network("vgg12"), torch.rand(2, 3, 16, 16), 3, "first")
    gated.values[0].data[0] = -1
    kept = next(iter(gated.kept().values()))[0]
    assert gated.gates()[0][0].sum() == 0 and kept[0] and kept.sum() == 1


def test_equal_scores_cost_the_logarithm_and_right_ones_the_floor():
    labels = torch.tensor([4, 2])
    assert score_loss(torch.full((2, 10), 0.7), labels, 0.0, 0.1).item() == pytest.approx(math.log(10), abs=1e-5)
    right = nn.functional.one_hot(labels, 100).float()
    assert score_loss(right, labels, 0.0, 0.1).item() == pytest.approx(3.622, abs=1e-3)
    assert score_loss(right, labels, 0.5, 0.2).item() == pytest.approx(3.722, abs=1e-3)


def test_a_batch_of_one_class_breaks_nothing():
    images = torch.rand(4, 3, 16, 16)
    gated, heads = GatedNetwork(network("vgg12"), images, 3), Heads(3, 3)
    loss = score_loss(heads(gated(images)), torch.zeros(4, dtype=torch.int64), gated.share(), 0.1)
    loss.backward()
    assert loss.isfinite() and all(values.grad.isfinite().all() for values in gated.values)


def test_turns_move_what_they_should_and_nothing_else():
    "Heads alone from logits that are computed once, then both; the network itself stays"
    model, images = network("vgg12"), split()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gated, heads = GatedNetwork(model, torch.rand(2, 3, 16, 16), 3), Heads(3, 3)
    known, start = all_logits(gated, images, 15), heads.hidden.detach().clone()
    for _ in epochs_of(Phase(1, 0.0, 0.01, 0.0), gated, heads, images, 8, torch.Generator().manual_seed(0)): pass
    assert all((values == 1).all() for values in gated.values) and not torch.equal(heads.hidden, start)
    assert torch.allclose(all_logits(gated, images), known, atol=1e-5)
    for _ in epochs_of(Phase(1, 0.001, 0.01, 0.1), gated, heads, images, 8, torch.Generator().manual_seed(0)): pass
    moved = torch.cat([values.flatten() for values in gated.values]) - 1
    assert moved.abs().max() < 0.0045, "three steps of Adam"
    assert moved.abs().max() > 0.0005
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_published_schedule():
    phases = schedule()
    assert len(phases) == 41 and sum(phase.epochs for phase in phases) == 145
    assert phases[0] == Phase(5, 0.0, 0.01, 0.0) and phases[1] == Phase(5, 0.001, 0.001, 0.1) and phases[2].alpha == 0


def test_states_are_chosen_by_the_rule_or_by_hand():
    numbers = [(0.9, 1.0), (0.92, 0.5), (0.915, 0.3), (0.6, 0.1), (0.92, 0.7)]
    states = [State(*pair, [], {}) for pair in numbers]
    assert [choose_state(states, pick) for pick in ("rule", "most accurate", "last", 4)] == [3, 5, 5, 4]
    assert choose_state(states, tolerance=0.5) == 4 and choose_state(states, reference=0.93) == 2
    with pytest.raises(ValueError, match="none of the 5 epochs reaches an accuracy of 0.980.*the best is 0.920"):
        choose_state(states, reference=0.99)
    with pytest.raises(ValueError, match="no way to pick a state 'best'"): choose_state(states, "best")


def test_learning_repeats_and_gives_the_state_it_says():
    model, train, valid = network("vgg12"), split(), split(12)
    options = {"phases": [Phase(1, 0.0, 0.01, 0.0), Phase(2, 0.2, 0.01, 0.0)], "batch_size": 8, "pick": 3}
    first, again = (learn_modules(model, train, valid, **options) for _ in range(2))
    assert first.masks == again.masks and [s.share for s in first.states] == [s.share for s in again.states]
    assert first.states[0].share == 1 and first.states[-1].share < 1 and first.epoch == 3
    assert first.masks.flat().float().mean().item() >= first.states[-1].share
    assert all(torch.equal(a, b) for a, b in zip(first.heads.state_dict().values(), first.states[2].heads.values()))


@pytest.mark.parametrize("change, said", [
    ({"train": split(8, 1)}, "only images of 'a'"), ({"train": split().select([])}, "there are no images"),
    ({"train": split().select([0, 1, 3, 4])}, "c"), ({"batch_size": 1}, "batch_size"),
    ({"valid": split().select([])}, "chooses a state on held-out images, and there are none"),
    ({"phases": [Phase(2, 1.0, 0.01, 1e6)]}, "alpha=1000000.0 has shut every gate"),
    ({"model": nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))}, "no place for a gate"),
    ({"empty": "none"}, "no rule for empty layers 'none'"),
    ({"empty": "error", "phases": [Phase(3, 1.0, 0.01, 1e6)]}, "has shut all .* kernels of a layer|every gate")])
def test_bad_input_is_named(change, said):
    given = {"model": network("vgg12"), "train": split(), "valid": split(12), "phases": [Phase(1, 0.0, 0.01, 0.0)]}
    with pytest.raises(ValueError, match=said): learn_modules(**(given | change))


def test_frozen_networks_and_unsound_ones():
    model = network("vgg12").train()
    still = frozen(model)
    assert model.training and not still.training and not any(p.requires_grad for p in still.parameters())
    next(model.parameters()).data[0] = float("nan")
    with pytest.raises(ValueError, match="not sound"): frozen(model)


class Rows(nn.Module):
    "Makes rows of maps by `view`, which works in one memory layout alone."

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4 * 14 * 14, 3)

    def forward(self, x): return self.last(self.relu(self.conv(x)).view(-1, 4 * 14 * 14))


@pytest.mark.parametrize("model, faster", [(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), True),
                                           (Rows(), False)])
def test_the_memory_layout_is_the_fast_one_where_it_can_be(model, faster):
    images, layout = torch.rand(2, 3, 16, 16), {"memory_format": torch.channels_last}
    still = frozen(model, images)
    assert next(still.parameters()).is_contiguous(**layout) == faster
    assert not next(model.parameters()).is_contiguous(**layout), "the network that was given stays as it is"
    with torch.no_grad(): assert torch.allclose(still(images), model(images), atol=1e-5)
    if not faster: assert GatedNetwork(model, images, 3)(images).shape == (3, 2, 3)


def test_one_image_teaches_nothing():
    with pytest.raises(ValueError, match="batch_size"): check_learnable(split(), 1)


def test_gates_stand_behind_every_activation_of_maps():
    sites = gate_sites(network("resnet18"), torch.rand(2, 3, 16, 16))
    assert len(sites) == 17, "the first convolution, and two in each of eight blocks"
    assert len(gate_sites(network("vit_small"), torch.rand(2, 3, 16, 16))) > 1, "neurons between tokens"


def test_the_experiment_leaves_rows_that_can_be_compared(tmp_path):
    "From a trained network to rows, in the names that other methods use"
    run_notebook(EXPERIMENTS / "gradsplitter.ipynb", tmp_path / "gradsplitter.ipynb", {"out": str(tmp_path)})
    rows = read_rows(tmp_path / "rows.csv")
    counts = rows.groupby("metric").size().to_dict()
    assert counts == {"accuracy": 3, "composed_accuracy": 3, "composed_size": 2, "composed_flops": 2,
                      "union_retention": 2, "kernel_retention": 11, "module_size": 11, "masked_retention": 1,
                      "module_flops": 1, "overlap": 1, "coupling": 1, "modularizing_time": 1, "total_time": 1}
    masks = ModuleMasks.load(tmp_path / "masks.safetensors")
    kept = rows[(rows.metric == "masked_retention")].value.item()
    assert masks.flat().double().mean().item() == pytest.approx(kept, abs=1e-6) and len(masks.classes) == 10
    assert len(json.loads((tmp_path / "states.json").read_text())) == 6
