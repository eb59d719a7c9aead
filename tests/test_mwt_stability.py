"""SteadyMwT: the published form as a special case, slopes against autograd by hand, warm-up, kill and resume."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modnb.checkpoints import read_checkpoint
from modnb.data import load_dataset
from modnb.models import create_model
from modnb.mwt.generators import add_mask_generators, mask_generators, observe_masks
from modnb.mwt.losses import MwT, cohesion_loss, coupling_loss
from modnb.mwt.modularize import Recording
from modnb.mwt.stability import Damp, SteadyMwT, damp_masks
from modnb.prediction import predict
from modnb.training import fit


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", image_size=16, valid=0.1, device="cpu")


@pytest.fixture(scope="module")
def few(data):
    part = copy.copy(data)
    part.train, part.valid = data.train.select(range(256)), data.valid.select(range(40))
    return part


def network(name="mobilenet", seed=0, width=0.125, size=16):
    example, head = torch.zeros(2, 3, size, size), {"head": "published"} if name == "mobilenet" else {}
    return add_mask_generators(create_model(name, width=width, image_size=size, seed=seed, **head), example, seed=seed)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def rows_of(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history.rows]


RECIPE = dict(epochs=4, batch_size=64, lr=0.05, device="cpu")


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.floats(0, 1))
def test_damp_keeps_the_bits_and_scales_the_gradient(values, share):
    x = torch.tensor(values, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16): assert torch.equal(Damp(share)(x.to(dtype)), x.to(dtype))
    weights = torch.arange(1.0, len(values) + 1)
    (Damp(share)(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, share * weights)


@pytest.mark.parametrize("name, size", [("mobilenet", 16), ("resnet18", 16), ("vgg12", 16)])
def test_damping_is_a_factor_between_mask_and_maps_alone(name, size):
    "Against the same network with a hook that scales what flows back into the product's mask"
    modular, x = network(name, size=size).eval(), torch.rand(4, 3, size, size)
    before = modular.code
    plain, damped = observe_masks(modular), damp_masks(observe_masks(modular), modular, 0.25)
    logits, masks = plain(x)
    same_logits, same_masks = damped(x)
    assert torch.equal(logits, same_logits) and list(masks) == list(same_masks) == list(mask_generators(modular))
    assert all(torch.equal(masks[site], same_masks[site]) for site in masks)
    assert modular.code == before and not any("damp" in key for key in dict(modular.named_modules()))
    names, parameters = zip(*modular.named_parameters())
    by_view = torch.autograd.grad(same_logits.square().sum(), parameters, allow_unused=True)
    scaled = copy.deepcopy(modular)
    for generator in mask_generators(scaled).values():
        generator.gate.register_forward_hook(
            lambda module, args, output: output.register_hook(lambda slope: 0.25 * slope) and None)
    by_hook = torch.autograd.grad(scaled(x).square().sum(), list(scaled.parameters()), allow_unused=True)
    for key, one, other in zip(names, by_view, by_hook):
        assert (one is None) == (other is None), key
        if one is not None: torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3, msg=key)


def test_what_is_asked_of_a_mask_is_not_damped():
    modular, x = network(width=0.25).eval(), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    site, generator = list(mask_generators(modular).items())[0]
    slopes = []
    for view in (observe_masks(modular), damp_masks(observe_masks(modular), modular, 0.0)):
        slopes.append(torch.autograd.grad(view(x)[1][site].sum(), generator.kernels.bias)[0])
    assert slopes[0].any() and torch.equal(*slopes)


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_cross_entropy_reaches_the_maps_in_full(slope):
    "With a slope of 0 the generators learn nothing from the logits, and the last layers as much as ever"
    modular, x = network().train(), torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    linear = modular.get_submodule("classifier.linear1")
    found = {}
    for share in (1.0, slope):
        logits, _ = SteadyMwT(mask_slope=share).prepare(modular, x)(x)
        own = [generator.kernels.bias for generator in mask_generators(modular).values()]
        found[share] = torch.autograd.grad(logits.square().sum(), [linear.weight, *own])
    torch.testing.assert_close(found[slope][0], found[1.0][0])
    shorter = [one.norm() < 0.5 * other.norm() for one, other in zip(found[slope][1:], found[1.0][1:])]
    assert sum(shorter) > 0.8 * len(shorter)
    if not slope: assert not any(tensor.any() for tensor in found[slope][1:])


@settings(max_examples=20)
@given(st.integers(0, 99), st.floats(0, 5), st.floats(0, 5), st.integers(1, 9), st.sampled_from([MwT, SteadyMwT]))
def test_the_loss_is_the_weighted_sum_of_the_moment(seed, together, apart, epoch, kind):
    random = torch.Generator().manual_seed(seed)
    rows = {str(width): torch.randn(8, width, generator=random).relu() for width in (3, 5)}
    logits, labels = torch.randn(8, 4, generator=random), torch.arange(8) % 4
    objective = kind(together, apart, warmup=0.5, label_smoothing=0.1)
    objective.start_epoch(epoch, 9)
    masks, share = list(rows.values()), min(1, (epoch - 1) / 4.5)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1) + share * (
        together * cohesion_loss(masks, labels) + apart * coupling_loss(masks, labels))
    loss, terms = objective(logits, labels, rows)
    torch.testing.assert_close(loss, expected)
    assert terms.keys() == MwT()(logits, labels, rows)[1].keys()


def test_the_published_form_is_a_special_case(few):
    "Bit for bit, through a training run"
    models, histories = [network(), network()], []
    for model, objective in zip(models, (MwT(0.5, 3.0), SteadyMwT(0.5, 3.0, mask_slope=1, warmup=0))):
        histories.append(rows_of(fit(model, few, objective, **RECIPE)))
    assert same(*models) and histories[0] == histories[1]
    other = network()
    fit(other, few, SteadyMwT(0.5, 3.0), **RECIPE)
    assert not same(models[0], other)


class StopsIn(SteadyMwT):
    def __init__(self, epoch=99, **options):
        super().__init__(**options)
        self._stop = epoch

    def start_epoch(self, epoch, epochs):
        super().start_epoch(epoch, epochs)
        if epoch == self._stop: raise RuntimeError("stopped")


@pytest.mark.parametrize("wrap", [lambda objective: objective, Recording], ids=["alone", "recorded"])
def test_a_stopped_run_goes_on_in_the_middle_of_the_warm_up(few, tmp_path, wrap):
    path, options = tmp_path / "run.ckpt", {"w_coupling": 4.0, "warmup": 1.0}
    stopped, resumed, whole = network(), network(seed=3), network()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(stopped, few, wrap(StopsIn(3, **options)), checkpoint=path, **RECIPE)
    assert len(read_checkpoint(path).rows) == 2
    history = fit(resumed, few, wrap(StopsIn(**options)), checkpoint=path, **RECIPE)
    undisturbed = fit(whole, few, wrap(StopsIn(**options)), **RECIPE)
    assert same(resumed, whole) and rows_of(history) == rows_of(undisturbed)
    modular = [(row["loss"] - row["cross_entropy"]) / (0.5 * row["cohesion_loss"] + 4 * row["coupling_loss"])
               for row in history.rows]
    assert modular == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-3)


def test_a_checkpoint_knows_the_settings(few, tmp_path):
    path, recipe = tmp_path / "run.ckpt", RECIPE | {"epochs": 1}
    fit(network(), few, SteadyMwT(mask_slope=0.2, warmup=0.3), checkpoint=path, **recipe)
    for other, told in ((SteadyMwT(mask_slope=0.3, warmup=0.3), "mask_slope"), (SteadyMwT(mask_slope=0.2), "warmup"),
                        (MwT(), "MwT")):
        with pytest.raises(ValueError, match=told): fit(network(), few, other, checkpoint=path, **recipe)
    objective = SteadyMwT(warmup=0.5)
    before = repr(objective)
    objective.start_epoch(1, 10)
    assert repr(objective) == before
    assert before == "SteadyMwT(average='pairs', mask_slope=0.1, w_cohesion=0.5, w_coupling=1.5, warmup=0.5)"
    assert "label_smoothing=0.1" in repr(SteadyMwT(label_smoothing=0.1))


def test_the_trained_model_has_no_trace_of_it(few):
    model = network()
    fit(model, few, SteadyMwT(), **RECIPE | {"epochs": 1})
    fresh = network(seed=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(predict(fresh, few.valid), predict(model, few.valid))


def test_fewer_gates_are_closed(data):
    "The finding, in small: cross-entropy alone closes gates, and a tenth of its slope closes fewer"
    on = {}
    for slope in (1.0, 0.1):
        model = network(width=0.25)
        recipe = RECIPE | {"epochs": 3, "lr": 0.1, "evaluate_every": 0}
        on[slope] = fit(model, data, SteadyMwT(0, 0, mask_slope=slope), **recipe).last["kernels_on"]
    assert on[0.1] > on[1.0] + 0.1


def test_bad_settings_and_models_are_named():
    for options in ({"mask_slope": -0.1}, {"mask_slope": 1.5}, {"warmup": 2}, {"warmup": math.nan}, {"w_coupling": -1}):
        with pytest.raises(ValueError, match=next(iter(options))): SteadyMwT(**options)
    with pytest.raises(ValueError, match="no mask generators"):
        SteadyMwT().prepare(create_model("lenet5"), torch.zeros(2, 3, 32, 32))
