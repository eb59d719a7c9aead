"""NeMo: its loss against pairs one by one, generators of linear layers, modules that equal the masked network."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modnb.compose import compose
from modnb.extract import Anatomy
from modnb.lab.matrix import read_matrix, study_cells
from modnb.lab.running import notebook_parameters
from modnb.lab.trained import build_network
from modnb.masks import ModuleMasks
from modnb.metrics import count_weights
from modnb.models import create_model
from modnb.mwt.generators import (
    MaskGenerator,
    add_mask_generators,
    fuse_scaling,
    mask_generators,
    observe_masks,
    remove_mask_generators,
)
from modnb.mwt.losses import CollapseWarning
from modnb.mwt.reuse import fold_masks
from modnb.nemo.cut import published_cut, stream_masks
from modnb.nemo.losses import RELEASED_WEIGHTS, NeMo, contrastive_loss
from modnb.nemo.neurons import ATTENTION, NeuronGenerator, add_neuron_generators, transformer_places
from modnb.units import trace, unit_axis

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
seeds = st.integers(0, 10**6)


# The loss


def pair_by_pair(masks, labels, tau, counts=True):
    "Every exponential by itself, pairs that are left out as e^0 where `counts`"
    total = 0.0
    for mask in masks:
        rows = [[value / max(math.hypot(*row), 1e-12) for value in row] for row in mask.tolist()]
        for i, one in enumerate(rows):
            same = other = 0.0
            for j, two in enumerate(rows):
                power = math.exp(sum(a * b for a, b in zip(one, two, strict=True)) / tau)
                if labels[j] == labels[i]: same, other = same + power, other + counts
                else: same, other = same + counts, other + power
            total -= math.log((same + counts * 1e-8) / (same + other + counts * 1e-8)) / len(rows) / len(masks)
    return total


def drawn(seed, images=7, widths=(3, 5)):
    chance = torch.Generator().manual_seed(seed)
    masks = [torch.relu(torch.randn(images, width, generator=chance, dtype=torch.float64)) for width in widths]
    return masks, torch.randint(3, (images,), generator=chance)


@given(seeds, st.sampled_from([0.1, 0.3, 1.0]), st.sampled_from(["released", "plain"]))
def test_the_loss_is_that_of_pairs_one_by_one(seed, tau, form):
    masks, labels = drawn(seed)
    masks[0][0] = 0  # a mask without direction resembles nobody, not even itself
    found = contrastive_loss(masks, labels, tau, form)
    assert found.item() == pytest.approx(pair_by_pair(masks, labels.tolist(), tau, form == "released"), rel=1e-6)


@given(seeds)
def test_neither_order_nor_length_of_masks_matter_and_layers_are_averaged(seed):
    masks, labels = drawn(seed)
    found, order = contrastive_loss(masks, labels), torch.randperm(7)
    torch.testing.assert_close(contrastive_loss([m[order] for m in masks], labels[order]), found)
    lengths = torch.rand(7, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(contrastive_loss([m * lengths for m in masks], labels), found)
    alone = [contrastive_loss([mask], labels) for mask in masks]
    torch.testing.assert_close(torch.stack(alone).mean(), found)


def test_the_slope_is_that_of_the_pairs():
    masks, labels = drawn(3, widths=(4,))
    masks[0] += 0.1
    masks[0].requires_grad_()
    contrastive_loss(masks, labels, 0.3).backward()
    for place in ((0, 0), (3, 2), (6, 3)):
        values = []
        for step in (1e-6, -1e-6):
            moved = masks[0].detach().clone()
            moved[place] += step
            values.append(pair_by_pair([moved], labels.tolist(), 0.3))
        assert masks[0].grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("tau", [0.001, 0.01, 0.2])
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]])
def test_no_batch_and_no_temperature_gives_what_is_no_number(tau, labels):
    "One class alone, none twice, masks of zeros: finite, with a finite gradient, in single precision"
    for form in ("released", "plain"):
        masks = torch.tensor([[0.5, 0, 0], [0, 0, 0], [0, 0.2, 0.1], [1, 1, 1]]).requires_grad_()
        loss = contrastive_loss([masks], torch.tensor(labels), tau, form)
        loss.backward()
        assert loss.isfinite() and loss >= 0 and masks.grad.isfinite().all()


def test_spared_layers_cost_a_constant_and_learn_nothing():
    masks, labels = drawn(5)
    for mask in masks: mask.requires_grad_()
    loss = contrastive_loss(masks, labels, 0.2, spared=1)
    loss.backward()
    ones = contrastive_loss([torch.ones_like(masks[0]), masks[1]], labels, 0.2)
    torch.testing.assert_close(loss, ones)
    assert masks[0].grad is None or not masks[0].grad.any()
    assert masks[1].grad.any()


@pytest.mark.parametrize("wrong, message", [
    ({"temperature": 0}, "temperature must be a number above 0"),
    ({"temperature": float("nan")}, "temperature must be"),
    ({"form": "released "}, "Did you mean 'released'"),
    ({"spared": 2}, "spared must be a whole number"),
])
def test_wrong_settings_of_the_loss_are_told(wrong, message):
    masks, labels = drawn(0)
    with pytest.raises(ValueError, match=message): contrastive_loss(masks, labels, **wrong)
    with pytest.raises(ValueError, match="one row for each label"): contrastive_loss([masks[0][:3]], labels)
    with pytest.raises(ValueError, match="no rows"): contrastive_loss([], labels)


def test_the_objective_tells_what_it_cannot_do():
    convolutional = create_model("vgg12", width=0.05, image_size=16)
    images = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="no mask generators"): NeMo().prepare(convolutional, images)
    masked = add_mask_generators(convolutional, images)
    with pytest.raises(ValueError, match="spared must be"): NeMo(spared=99).prepare(masked, images)
    with pytest.raises(ValueError, match="one process"): NeMo().across(object())
    assert NeMo().across(None)
    with pytest.raises(ValueError, match="no second class"):
        NeMo()(torch.zeros(2, 1), torch.zeros(2).long(), {"a": torch.ones(2, 3)})
    for wrong in ({"w_contrast": -1}, {"temperature": -0.1}, {"form": "paper"}, {"spared": -1}, {"warmup": 2}):
        with pytest.raises(ValueError, match=next(iter(wrong))): NeMo(**wrong)


def test_the_objective_adds_up_watches_and_spares_as_its_program():
    masks, labels = drawn(9)
    observed, logits = {"a": masks[0].float(), "b": masks[1].float()}, torch.zeros(7, 3)
    objective = NeMo(2.0, 0.2, spared=1, warmup=0.5)
    objective._spared = 1
    for epoch, share in ((1, 0), (2, 0.5), (3, 1)):
        objective.start_epoch(epoch, 4)
        loss, terms = objective(logits, labels, observed)
        wanted = math.log(3) + share * 2 * contrastive_loss(list(observed.values()), labels, 0.2, spared=1)
        torch.testing.assert_close(loss, torch.as_tensor(wanted))
    with pytest.warns(CollapseWarning, match="dead layers"): objective.end_epoch({"epoch": 1, "dead_layers": 0.5})
    small, images = create_model("vgg12", width=0.05, image_size=16, seed=0), torch.zeros(2, 3, 16, 16)
    for model, spared in ((add_mask_generators(small, images), 1), (add_neuron_generators(transformer(), images), 0)):
        asked = NeMo()
        asked.prepare(model, images)
        assert asked._spared == spared and "spared=None" in repr(asked)


def test_the_weights_of_its_scripts_are_those_of_the_study():
    defaults, names = notebook_parameters(EXPERIMENTS / "train.ipynb"), ("w_contrast", "temperature")
    cells = study_cells(read_matrix(EXPERIMENTS / "matrix.yaml"), "nemo_published", defaults)
    own = [cell.train for cell in cells if cell.train["system"] == "nemo"]
    found = {(train["model"], train["dataset"]): {name: train[name] for name in names} for train in own}
    assert found == RELEASED_WEIGHTS


# Transformers


def transformer(depth=3, width=0.25):
    "With a random head: it begins with zeros, which would hide all mistakes before it"
    model = create_model("vit_small", width=width, image_size=16, depth=depth, seed=0).eval()
    nn.init.normal_(model.heads.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def images(): return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def units(model, attention="neurons", first=False):
    places = transformer_places(trace(model, images()), attention, first)
    return {place.node.meta["site"]: place.node.meta["shape"][unit_axis(place.node)] for place in places}


def random_masks(sizes, seed, share=0.5):
    chance = torch.Generator().manual_seed(seed)
    masks = {site: torch.rand(count, generator=chance) < share for site, count in sizes.items()}
    for mask in masks.values(): mask[0] = True
    return masks


def test_sites_are_the_linear_layers_behind_the_first_encoder():
    model, width = transformer(), 96
    encoder = [3 * width, width, 4 * width, width]  # queries, keys and values; output; both layers of the MLP
    assert list(units(model).values()) == 2 * encoder
    assert list(units(model, first=True).values()) == 3 * encoder
    assert list(units(model, "heads").values()) == 2 * [2, width, 4 * width, width]
    assert list(units(transformer(width=0.125), "heads").values()) == 2 * [48, 192, 48], "a single head is no choice"
    assert not any("encoder_layer_0" in site or "heads.head" in site for site in units(model))
    parts = [place.parts for place in transformer_places(trace(model, images()))]
    assert parts == 2 * [3, 1, 1, 1]


class Apart(nn.Module):
    "Attention with three layers of its own, by a product of matrices"

    def __init__(self, inputs=8, heads=2):
        super().__init__()
        self.patch = nn.Conv2d(3, inputs, 4, stride=4)
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(inputs, inputs) for n in "qkvo"}) for _ in range(2))
        self.heads, self.head = heads, nn.Linear(inputs, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            q, k, v = (block[n](x).unflatten(2, (self.heads, -1)).transpose(1, 2) for n in "qkv")
            x = x + block["o"](((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def test_layers_of_their_own_have_generators_of_their_own():
    torch.manual_seed(0)
    model = Apart().eval()
    assert units(model) == {f"blocks.1.{name}": 8 for name in "qkvo"}
    modular = add_neuron_generators(model, images(), seed=0)
    assert list(mask_generators(modular)) == [f"blocks.1.{name}" for name in "qkvo"]
    with torch.no_grad(): assert modular.eval()(images()).shape == (3, 4)


def fixed(modular, masks):
    "Generators that give a constant mask of zeros and ones"
    for site, generator in mask_generators(modular).items():
        layers = [layer for layer in generator.kernels.modules() if isinstance(layer, nn.Linear)]
        signs = (masks[site].float() * 2 - 1).chunk(len(layers))
        for layer, sign in zip(layers, signs, strict=True):
            nn.init.zeros_(layer.weight)
            with torch.no_grad(): layer.bias.copy_(1000 * sign)
    return modular.eval()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_module_is_the_masked_transformer_and_so_is_one_whose_generators_say_the_same(attention, share):
    model = transformer()
    masks = random_masks(units(model, attention), seed=4, share=share)
    modular = fixed(add_neuron_generators(model, images(), attention, seed=0), masks)
    anatomy = Anatomy(model, images())
    module, oracle = anatomy.extract(masks), anatomy.masked(masks)
    with torch.no_grad(): found = [network(images()) for network in (modular, oracle, module, model)]
    for other in found[1:3]: torch.testing.assert_close(found[0], other, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[3], atol=1e-2), "masks change the network"
    assert count_weights(module) < 0.9 * count_weights(model)
    said = observe_masks(modular)(images())[1]
    assert all(torch.equal(mask > 0, masks[site].expand(3, -1)) for site, mask in said.items())


@pytest.mark.parametrize("attention", ATTENTION)
def test_open_masks_change_nothing_and_there_is_a_way_back(attention):
    model = transformer()
    ones = {site: torch.ones(count).bool() for site, count in units(model, attention).items()}
    modular = add_neuron_generators(model, images(), attention, seed=0)
    with torch.no_grad():
        assert not torch.allclose(modular(images()), model(images()), atol=1e-3)
        torch.testing.assert_close(fixed(modular, ones)(images()), model(images()), atol=1e-4, rtol=1e-4)
        plain = remove_mask_generators(modular).eval()(images())  # attention in steps, not torch's in one
        torch.testing.assert_close(plain, model(images()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ATTENTION)
def test_masks_by_hand_and_gradients_of_all_generators(attention):
    "The generator sees the mean over the tokens of what its layer reads; the shorter step gives the same"
    modular = add_neuron_generators(transformer(), images(), attention, seed=0).eval()
    seen = {}
    logits, soft = observe_masks(modular)(images())
    fused, same = fuse_scaling(observe_masks(modular))(images())
    torch.testing.assert_close(fused, logits, atol=1e-5, rtol=1e-5)
    for site, mask in soft.items(): torch.testing.assert_close(same[site], mask)
    first = next(iter(mask_generators(modular)))  # which reads the first normalisation of the second encoder
    tokens = []
    hook = modular.get_submodule("encoder.layers.encoder_layer_1.ln_1").register_forward_hook(
        lambda layer, given, out: tokens.append(out))
    modular(images())
    hook.remove()
    generator = mask_generators(modular)[first]
    hidden = torch.relu(tokens[0].mean(1) @ generator.hidden.weight.T + generator.hidden.bias)
    layers = [layer for layer in generator.kernels.modules() if isinstance(layer, nn.Linear)]
    halves = zip(hidden.chunk(len(layers), 1), layers, strict=True)
    parts = [part @ layer.weight.T + layer.bias for part, layer in halves]
    torch.testing.assert_close(soft[first], torch.relu(torch.tanh(torch.cat(parts, 1))), atol=1e-5, rtol=1e-4)
    loss, _ = NeMo(temperature=0.2)(logits, torch.tensor([0, 0, 1]), soft)
    loss.backward()
    for site, generator in mask_generators(modular).items():
        seen[site] = any(parameter.grad is not None and parameter.grad.any() for parameter in generator.parameters())
    assert all(seen.values()), seen


def test_a_modular_transformer_is_built_again_from_what_its_file_says():
    for attention in ATTENTION:
        modular = add_neuron_generators(transformer(), images(), attention, floor=0.25, seed=0)
        again = build_network(modular.config)
        assert again.config == modular.config
        again.load_state_dict(modular.state_dict())
        with torch.no_grad(): assert torch.equal(again.eval()(images()), modular.eval()(images()))
        masks = observe_masks(modular.eval())(images())[1].values()
        assert all(((mask > 0).sum(1) >= 0.25 * mask.shape[1]).all() for mask in masks), "a floor under the masks"


def test_networks_without_attention_have_the_generators_of_mwt():
    model = create_model("vgg12", width=0.05, image_size=16, seed=0)
    mine, theirs = add_neuron_generators(model, images(), seed=0), add_mask_generators(model, images(), seed=0)
    assert mine.config == theirs.config
    for one, two in zip(mine.parameters(), theirs.parameters(), strict=True): assert torch.equal(one, two)


def test_what_has_no_place_for_generators_is_told():
    short = transformer(depth=1)
    with pytest.raises(ValueError, match="only its first encoder"): add_neuron_generators(short, images())
    assert len(mask_generators(add_neuron_generators(short, images(), first=True))) == 4
    with pytest.raises(ValueError, match="Did you mean 'heads'"): add_neuron_generators(transformer(), images(), "head")
    modular = add_neuron_generators(transformer(depth=2), images())
    with pytest.raises(ValueError, match="already"): add_neuron_generators(modular, images())
    dense = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    with pytest.raises(ValueError, match="no convolution"): add_neuron_generators(dense, images())
    with pytest.raises(ValueError, match="equal parts"): NeuronGenerator(4, 10, parts=3)
    sites = {"linear_2": torch.ones(288)}
    with pytest.raises(ValueError, match="'linear_2' is no layer"): fold_masks(transformer(), sites)
    assert isinstance(NeuronGenerator(4, 3073 * 2), MaskGenerator)
    assert NeuronGenerator(4, 3074).hidden.out_features == 1537, "half above 3,072"


# The published cut


def class_masks(model, seed=2):
    sizes = units(model)
    chance = torch.Generator().manual_seed(seed)
    masks = {site: torch.rand(10, count, generator=chance) < 0.3 for site, count in sizes.items()}
    return ModuleMasks(masks, [str(digit) for digit in range(10)])


def test_the_published_cut_has_the_widths_of_its_masks():
    model = transformer()
    masks = class_masks(model)
    keep, cut = masks.keep([1, 2]), published_cut(model, masks, ["1", "2"], images())
    last = "encoder.layers.encoder_layer_2"
    second, third = (int(keep[f"encoder.layers.encoder_layer_{i}.mlp.3"].sum()) for i in (1, 2))
    attention = [int(keep[site].sum()) for site in ("linear_3", "linear_5")]
    widths = {path: layer.normalized_shape[0] for path, layer in cut.named_modules() if isinstance(layer, nn.LayerNorm)}
    assert widths["encoder.layers.encoder_layer_0.ln_1"] == 96 == widths["encoder.layers.encoder_layer_1.ln_1"]
    assert widths["encoder.layers.encoder_layer_1.ln_2"] == attention[0] and widths[f"{last}.ln_2"] == attention[1]
    assert widths[f"{last}.ln_1"] == second and widths["encoder.ln"] == third
    assert cut.get_submodule(f"{last}.mlp.0").weight.shape == (int(keep[f"{last}.mlp.0"].sum()), attention[1])
    assert cut.classes == ["1", "2"] and cut(images()).shape == (3, 2)
    assert count_weights(cut) < count_weights(compose(model, masks, ["1", "2"], images()))
    found = stream_masks(trace(model, images()), keep)
    queries, keys, values = keep["linear_2"].chunk(3)
    assert torch.equal(found["linear_2"], torch.cat([queries & keys, queries & keys, values]))


def test_the_published_cut_can_be_trained_and_repeats_under_a_seed():
    model = transformer()
    cuts = [published_cut(model, class_masks(model), [0, 1, 2], images(), seed=seed) for seed in (0, 0, 1)]
    found = [cut(images()) for cut in cuts]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    found[0].sum().backward()
    new = [weights for name, weights in cuts[0].named_parameters() if "head" in name or "ln" in name]
    assert all(weights.grad is not None for weights in new)


def test_the_published_cut_is_for_neurons_of_transformers_alone():
    model = transformer()
    heads = ModuleMasks({site: torch.ones(10, count).bool() for site, count in units(model, "heads").items()},
                        [str(digit) for digit in range(10)])
    with pytest.raises(ValueError, match="linear layers of a transf"): published_cut(model, heads, [0, 1], images())
