"""Fine-tuning a trained network to take it apart: open generators, the door, smaller modules, resumption."""

import copy

import pytest
import torch

from modnb.data import load_dataset
from modnb.finetuning import check_trained, least_accuracy, modular_finetune, opened, started_from
from modnb.metrics import module_size
from modnb.moda.decompose import decompose
from modnb.moda.losses import MODA
from modnb.models import create_model
from modnb.mwt.generators import (
    add_mask_generators,
    fuse_scaling,
    mask_generators,
    nudge_generators,
    observe_masks,
    remove_mask_generators,
)
from modnb.mwt.losses import MwT
from modnb.objectives import CrossEntropy
from modnb.prediction import evaluate
from modnb.specialize import specialize
from modnb.training import fit

QUICK = {"batch_size": 64, "device": "cpu", "evaluate_every": 0}


@pytest.fixture(scope="module")
def data(): return load_dataset("digits", valid=0.2, device="cpu")


@pytest.fixture(scope="module")
def trained(data):
    model = create_model("vgg12", width=0.125, seed=0)
    fit(model, data, epochs=6, lr=0.1, schedule="onecycle", **QUICK)
    return model


def with_other(data, **splits):
    other = copy.copy(data)
    for name, split in splits.items(): setattr(other, name, split)
    return other


# Open generators


@pytest.mark.parametrize("name", ["vgg12", "resnet18", "mobilenet"])
def test_open_generators_change_nothing(name):
    model, x = create_model(name, width=0.125, image_size=32, seed=1).eval(), torch.randn(3, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    modular = add_mask_generators(model, x, form="open", seed=2)
    assert modular.config["mask_generators"] == "open"
    for view in (observe_masks(modular), fuse_scaling(observe_masks(modular))):
        logits, masks = view(x)
        torch.testing.assert_close(logits, model(x), rtol=1e-5, atol=1e-6)
        assert all(torch.equal(mask, torch.ones_like(mask)) for mask in masks.values()) and masks
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(remove_mask_generators(modular).eval()(x), model(x))
    logits, masks = observe_masks(nudge_generators(modular, seed=3).eval())(x)
    assert next(iter(masks.values())).std(0).max() > 0, "images differ, so the losses have a slope"
    with pytest.raises(ValueError, match="no mask generators"): nudge_generators(model)


def test_other_forms_are_as_they_were():
    model, x = create_model("vgg12", width=0.125, image_size=16, seed=0).eval(), torch.randn(2, 3, 16, 16)
    for form in ("released", "paper"):
        masks = observe_masks(add_mask_generators(model, x, form=form, seed=0).eval())(x)[1]
        joined = torch.cat([mask.flatten() for mask in masks.values()])
        assert joined.max() <= 1 and joined.std() > 0


def test_every_weight_of_an_open_generator_learns(trained, data):
    "None of it is where its function is flat, after one step that moves the last weights"
    modular = opened(trained, MwT(), data.example())
    images, labels = data.example(32), data.train.labels[:32]
    for _ in range(2):
        modular.zero_grad()
        torch.nn.functional.cross_entropy(modular(images), labels).backward()
        slopes = [generator.kernels.weight.grad.abs().sum() for generator in mask_generators(modular).values()]
        assert min(slopes) > 0
        with torch.no_grad():
            for parameter in modular.parameters(): parameter -= 1e-3 * parameter.grad
    assert min(generator.hidden.weight.grad.abs().sum() for generator in mask_generators(modular).values()) > 0


# What comes out


def test_modules_get_smaller_at_about_the_same_accuracy(trained, data):
    untouched = copy.deepcopy(trained.state_dict())
    tuned, history = modular_finetune(trained, data, MODA(dispersion=4), epochs=4, **QUICK)
    more, _ = modular_finetune(trained, data, CrossEntropyOnly(), epochs=4, **QUICK)
    size = {name: module_size(model, decompose(model, data.train), data.example()).mean().item()
            for name, model in (("before", trained), ("tuned", tuned), ("as long without", more))}
    assert size["tuned"] < 0.8 * size["before"] and size["tuned"] < 0.8 * size["as long without"]
    assert evaluate(tuned, data.valid) > evaluate(trained, data.valid) - 0.03
    assert len(history) == 4 and history.last["dispersion"] < history.rows[0]["dispersion"]
    assert all(torch.equal(untouched[key], value) for key, value in trained.state_dict().items()), "a copy learned"


class CrossEntropyOnly(MODA):
    "As much training without the losses"
    def __init__(self): super().__init__(0, 0, 0)


def test_masks_of_mwt_get_smaller(trained, data):
    tuned, history = modular_finetune(trained, data, MwT(0.5, 6.0), epochs=3, **QUICK)
    assert not mask_generators(trained) and mask_generators(tuned)
    assert history.last["coupling_loss"] < history.rows[0]["coupling_loss"]
    assert history.last["kernels_on"] < history.rows[0]["kernels_on"]
    again, _ = modular_finetune(tuned, data, MwT(0.5, 6.0), epochs=1, **QUICK)
    assert mask_generators(again).keys() == mask_generators(tuned).keys(), "no second set of generators"


def test_a_fifth_of_the_images_is_enough_to_run(trained, data):
    few = with_other(data, train=data.train.select(torch.arange(0, len(data.train), 5)))
    tuned, _ = modular_finetune(trained, few, MODA(dispersion=4), epochs=2, **QUICK)
    size = [module_size(model, decompose(model, few.train), data.example()).mean() for model in (trained, tuned)]
    assert size[1] < size[0]


# After a kill


class Killed(Exception): pass


class Dying(MODA):
    "Dies when the second epoch begins, the first time"
    def start_epoch(self, epoch, epochs):
        super().start_epoch(epoch, epochs)
        if epoch == 2 and self._alive: raise Killed

    _alive = True


def test_a_killed_fine_tuning_goes_on(trained, data, tmp_path):
    path, settings = tmp_path / "tuned.safetensors", QUICK | {"epochs": 3}
    whole, _ = modular_finetune(trained, data, Dying2(), checkpoint=tmp_path / "whole.safetensors", **settings)
    with pytest.raises(Killed): modular_finetune(trained, data, Dying(), checkpoint=path, **settings)
    assert path.exists()
    objective = Dying()
    objective._alive = False
    resumed, history = modular_finetune(trained, data, objective, checkpoint=path, **settings)
    assert len(history) == 3
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


class Dying2(MODA):
    "The same without the death"


def test_a_checkpoint_of_another_network_is_refused(trained, data, tmp_path):
    path, settings = tmp_path / "tuned.safetensors", QUICK | {"epochs": 1}
    first, _ = modular_finetune(trained, data, MODA(), checkpoint=path, **settings)
    with pytest.raises(ValueError, match="objective"):
        modular_finetune(first, data, MODA(), checkpoint=path, **settings)
    assert repr(started_from(MODA(), trained)) != repr(started_from(MODA(), first))


# At the door


def test_guessing_is_told_from_knowing():
    assert least_accuracy(torch.tensor([500, 500])) == pytest.approx(0.6)
    assert least_accuracy(torch.tensor([900, 100])) > 0.9, "who always says the frequent class knows nothing"
    assert least_accuracy(torch.full((100,), 100)) == pytest.approx(1.5 / 100.5)
    assert least_accuracy(torch.tensor([1, 1])) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_untrained_network_is_refused(data, seed):
    with pytest.raises(ValueError, match="not trained: it is right for"):
        modular_finetune(create_model("vgg12", width=0.125, seed=seed), data)


def test_bad_input(trained, data):
    cases = [("epochs must be a whole number", (data,), {"epochs": 0}),
             ("epochs must be a whole number", (data,), {"epochs": 1.5}),
             ("objective must be MODA", (data, "moda"), {}),
             ("objective must be MODA", (data, CrossEntropy()), {}),
             ("no images of 3", (with_other(data, train=data.train.select(data.train.labels != 3)),), {}),
             ("one class, '4'", (data.subtask(["4"]),), {}),
             ("schedule", (data,), {"schedule": "sudden"})]
    for words, given, options in cases:
        with pytest.raises(ValueError, match=words): modular_finetune(trained, *given, **options)


def test_without_validation_images_the_training_images_judge(trained, data):
    bare = load_dataset("digits", device="cpu")
    assert check_trained(trained, bare) > 0.8
    with pytest.raises(ValueError, match="training images"):
        check_trained(create_model("vgg12", width=0.125, seed=0), bare)


# In one call


def test_specialize_with_epochs(trained, data):
    plain = specialize(trained, data, ["1", "7"], max_loss=0.02, ways=["activity"])
    tuned = specialize(trained, data, ["1", "7"], max_loss=0.02, ways=["activity"], epochs=3)
    assert plain.report["epochs"] == 0 and tuned.report["tried"] == 2 * plain.report["tried"]
    assert tuned.report["size"] <= plain.report["size"]
    assert tuned.report["valid"]["whole"] == plain.report["valid"]["whole"], "loss counts from the given network"
    if tuned.report["epochs"]: assert "3 epochs of modular fine-tuning" in repr(tuned)
    with pytest.raises(ValueError, match="not trained"):
        specialize(create_model("vgg12", width=0.125, seed=0), data, ["1", "7"], epochs=1)
    with pytest.raises(ValueError, match="in their order"):
        swapped = dict(zip(data.classes, [1, 0, *range(2, 10)], strict=True))
        specialize(trained, data, ["1", "7"], outputs=swapped, epochs=1)
