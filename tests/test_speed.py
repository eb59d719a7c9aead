"""A training step: no operation that waits for the device, one graph, and the same result as the plain loop."""

import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch._dynamo.testing
from references import CountOperations

from modnb.checkpoints import read_checkpoint
from modnb.data import load_dataset
from modnb.maps import scale_maps
from modnb.moda.losses import MODA
from modnb.models import create_model
from modnb.mwt.generators import MaskGenerator, add_mask_generators, fuse_scaling, mask_generators, observe_masks
from modnb.mwt.losses import MwT
from modnb.mwt.modularize import Recording
from modnb.mwt.stability import damp_masks
from modnb.objectives import CrossEntropy
from modnb.settings import Settings
from modnb.training import Loop, fit, forward_pass, make_forward, make_optimizer, prepare_network, train_step
from modnb.units import observe, unit_sites

OBJECTIVES = {"plain": CrossEntropy, "moda": MODA, "mwt": MwT, "recorded": lambda: Recording(MwT())}
MODELS = {"vgg12": 16, "resnet18": 32, "mobilenet": 32}
each_method = pytest.mark.parametrize("method", OBJECTIVES)
KNOBS = Settings(epochs=1, batch_size=16, channels_last=True)
WAITING = ("nonzero", "masked_select", "index.", "_local_scalar_dense", "item", "is_nonzero", "unique", "equal.")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    data = load_dataset("digits", device="cpu")
    return replace(data, train=data.train.select(range(136)), valid=data.train.select([]))


def modular(method, name="vgg12", width=0.125):
    model, size = create_model(name, width=width, seed=0), MODELS[name]
    return add_mask_generators(model, torch.zeros(2, 3, size, size), seed=0) if method in ("mwt", "recorded") else model


def step_of(method, name, knobs=KNOBS, images=16):
    "A function that takes one training step, its forward pass, and a batch"
    size, model, objective = MODELS[name], modular(method, name).train(), OBJECTIVES[method]()
    x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    labels, optimizer = torch.arange(images) % 10, make_optimizer(model, knobs)
    forward = forward_pass(prepare_network(model, objective, x[:2], 10), objective, knobs.precision)
    loop = Loop(forward, optimizer, knobs)
    return lambda: train_step(loop, x, labels), forward, (x, labels)


@each_method
@pytest.mark.parametrize("name", MODELS)
def test_a_step_waits_for_nothing(name, method):
    step, _, _ = step_of(method, name, replace(KNOBS, max_norm=1.0))
    step()
    with CountOperations() as count: step()
    assert "convolution_backward.default" in count.names, "the backward pass is counted too"
    assert not [operation for operation in count.names if operation.startswith(WAITING)]


def test_the_counter_sees_what_waits():
    values = torch.arange(4.0)
    ways = (lambda: values[values > 1], lambda: values.sum().item(), lambda: values.nonzero(), lambda: bool(values[0]))
    for wait in ways:
        with CountOperations() as count: wait()
        assert [operation for operation in count.names if operation.startswith(WAITING)]


@pytest.mark.parametrize("name", MODELS)
def test_what_the_methods_add_does_not_grow_with_pairs_or_classes(name):
    counts = {}
    for method, images in product(("plain", "moda", "mwt"), (12, 40)):
        step, _, _ = step_of(method, name, images=images)
        step()
        with CountOperations() as count: step()
        counts.setdefault(method, []).append(len(count.names))
    print(f"{name}: {counts} operations in a step with 12 and with 40 images")
    assert all(few == many for few, many in counts.values())
    (plain, _), (moda, _), (mwt, _) = counts.values()
    observed = len(unit_sites(create_model(name, width=0.125), torch.zeros(2, 3, MODELS[name], MODELS[name])))
    # a handful for each activation, or each generator with its backward pass and its update, and for the losses
    assert plain < moda <= plain + 11 * observed + 120
    assert plain < mwt <= plain + 66 * len(mask_generators(modular("mwt", name))) + 130


@pytest.mark.parametrize("name, method", [
    ("vgg12", "plain"), ("vgg12", "recorded"), *((name, method) for name in MODELS for method in ("moda", "mwt"))])
def test_forward_and_losses_are_one_graph(name, method):
    _, forward, batch = step_of(method, name)
    torch._dynamo.reset()
    whole = torch.compile(forward, backend="eager", fullgraph=True, dynamic=False)
    expected, found = forward(*batch), whole(*batch)
    torch.testing.assert_close(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    torch._dynamo.reset()


def test_shapes_do_not_depend_on_labels():
    "Another batch of the same size is no reason to compile again"
    _, forward, (x, labels) = step_of("mwt", "vgg12")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    whole = torch.compile(forward, backend=counter, fullgraph=True, dynamic=False)
    for each in (labels, labels.flip(0), torch.zeros_like(labels)): whole(x, each)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["moda", "mwt"])
def test_a_warm_up_compiles_once(method, monkeypatch):
    objective = {"moda": MODA, "mwt": MwT}[method](warmup=1.0)
    monkeypatch.setitem(OBJECTIVES, method, lambda: objective)
    _, forward, batch = step_of(method, "vgg12")
    torch._dynamo.reset()
    counter, losses = torch._dynamo.testing.CompileCounter(), []
    whole = torch.compile(forward, backend=counter, fullgraph=True, dynamic=False)
    for epoch in (1, 2, 3):
        objective.start_epoch(epoch, 3)
        losses.append(whole(*batch)[1].item())
    assert counter.frame_count == 1 and losses == sorted(losses) and losses[0] < losses[-1]
    torch._dynamo.reset()


# The plain loop


@pytest.mark.parametrize("method", ["plain", "moda", "mwt"])
def test_the_fast_loop_follows_the_plain_one_for_100_steps(digits, method):
    curves = {}
    for fast in (True, False):
        history = fit(modular(method), digits, OBJECTIVES[method](), epochs=13, batch_size=17, lr=0.01, fast=fast,
                      precision="float32", evaluate_every=0, device="cpu")
        curves[fast] = torch.tensor(history.column("loss"))
    assert len(curves[True]) == 13 and curves[True][-1] < curves[True][0] # of 8 steps each
    # rounding is amplified from step to step: measured up to 2e-4 of the loss in the first 16 steps, 7e-3 in 104
    print(method, [f"{value:.1e}" for value in (curves[True] / curves[False] - 1).abs().tolist()])
    torch.testing.assert_close(curves[True][:2], curves[False][:2], rtol=2e-4, atol=0)
    torch.testing.assert_close(curves[True], curves[False], rtol=3e-2, atol=0)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_the_plain_loop_has_the_usual_layout_whatever_the_batches_have(digits, fast, augment, monkeypatch):
    seen, forward = set(), torch.nn.Conv2d.forward
    def noted(layer, x):
        y = forward(layer, x)
        if layer.training: seen.add(y.is_contiguous(memory_format=torch.channels_last))
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    fit(create_model("lenet5", image_size=16), digits, epochs=1, fast=fast, augment=augment, device="cpu")
    assert seen == {fast}


def test_without_channels_last_fast_and_plain_are_the_same_on_a_cpu(digits):
    ends = []
    for options in ({"fast": False}, {"channels_last": False, "precision": "float32"}):
        model = modular("mwt")
        fit(model, digits, MwT(watch=0), epochs=1, batch_size=32, device="cpu", **options)
        ends.append(model.state_dict())
    for name, value in ends[0].items(): assert torch.equal(value, ends[1][name]), name


@pytest.mark.parametrize("options", [{"channels_last": True}, {"precision": "bfloat16"}, {"compile": True}])
def test_a_plain_loop_that_is_not_plain_is_refused(digits, options):
    with pytest.raises(ValueError, match="plain float32 loop"): fit(modular("plain"), digits, fast=False, **options)


def test_old_checkpoints_name_the_same_run(digits, tmp_path):
    "Knobs that came later are written down only where they are used"
    path = tmp_path / "run.ckpt"
    fit(modular("plain"), digits, epochs=1, device="cpu", checkpoint=path)
    assert not {"fast", "compile"} & set(read_checkpoint(path).run)
    with pytest.raises(ValueError, match="fast was None and is False"):
        fit(modular("plain"), digits, epochs=1, device="cpu", checkpoint=path, fast=False)


@pytest.mark.parametrize("error", [RuntimeError, OSError, AssertionError])
def test_a_compiler_that_fails_is_told_and_left_alone(error, monkeypatch):
    def broken(function, **options):
        def call(*arguments): raise error("no compiler here")
        return call

    model, x, labels = create_model("lenet5", image_size=16, seed=0), torch.randn(4, 3, 16, 16), torch.arange(4)
    monkeypatch.setattr(torch, "compile", broken)
    forward = make_forward(model, CrossEntropy(), x[:2], 10, replace(KNOBS, compile=True), 4)
    with pytest.warns(UserWarning, match="no compiler here"): first = forward(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(forward(x, labels)[1], first[1])


class BreaksBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, gradient): raise RuntimeError("no compiler for the way back")


def test_a_compiler_that_fails_on_the_way_back_changes_nothing(monkeypatch):
    def broken(function, **options):
        def call(*arguments):
            logits, loss, terms = function(*arguments)
            return logits, BreaksBackward.apply(loss), terms
        return call

    x, labels, ends = torch.randn(4, 3, 16, 16), torch.arange(4), []
    monkeypatch.setattr(torch, "compile", broken)
    for compiled in (True, False):
        model, knobs = create_model("lenet5", image_size=16, seed=0), replace(KNOBS, compile=compiled)
        loop = Loop(make_forward(model, CrossEntropy(), x[:2], 10, knobs, 4), make_optimizer(model, knobs), knobs)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2): train_step(loop, x, labels)
        assert [str(warning.message).endswith("no compiler for the way back") for warning in told] == [True] * compiled
        ends.append(model.state_dict())
    for name, value in ends[0].items(): assert torch.equal(value, ends[1][name]), name


def test_the_compiler_is_not_loaded_before_it_is_asked_for():
    code = "import sys, modnb.compose, modnb.training; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_batches_of_another_size_are_not_compiled_for(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *a: seen.append(len(a[0])) or function(*a))
    model, x = create_model("lenet5", image_size=16, seed=0), torch.randn(5, 3, 16, 16)
    forward = make_forward(model, CrossEntropy(), x[:2], 10, replace(KNOBS, compile=True), 5)
    for size in (5, 3, 5): forward(x[:size], torch.arange(size))
    assert seen == [5, 5]


# Exact changes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (3, 8, 16, 16), (2, 5, 1, 1), (7, 2, 3, 9)])
def test_the_generators_mean_is_mean_bit_for_bit(shape, form, layout):
    generator = MaskGenerator(shape[1], 6, form)
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    as_before = generator.gate(generator.tanh(generator.kernels(
        generator.relu(generator.hidden(x.flatten(2).mean(2))))))
    found, weights = generator(x), [x, *generator.parameters()]
    assert torch.equal(found, as_before)
    for a, b in zip(torch.autograd.grad(found.square().sum(), weights),
                    torch.autograd.grad(as_before.square().sum(), weights)): assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_products_joined_to_their_relu_change_nothing(name, dtype):
    model = modular("mwt", name, 0.25).train().to(dtype).to(memory_format=torch.channels_last)
    for generator in mask_generators(model).values(): # some masks are zero
        with torch.no_grad(): generator.kernels.bias.sub_(1)
    x = torch.randn(16, 3, MODELS[name], MODELS[name], generator=torch.Generator().manual_seed(0)).to(dtype)
    found, labels, views = [], torch.arange(16) % 10, (observe_masks(model), fuse_scaling(observe_masks(model)))
    assert any(node.target is scale_maps for node in views[1].graph.nodes)
    for view in views:
        torch.manual_seed(0) # of dropout
        logits, masks = view(x)
        assert any((mask == 0).any() for mask in masks.values())
        loss, _ = MwT()(logits, labels, masks)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((logits, torch.cat([gradient.flatten() for gradient in gradients])))
    (logits, gradient), (same, joined) = found
    assert torch.equal(logits, same)
    assert (gradient - joined).norm() < {torch.float32: 1e-4, torch.float64: 1e-12}[dtype] * gradient.norm()


def test_a_product_that_somebody_else_reads_is_left_alone():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)
            self.relu = torch.nn.ReLU()

        def forward(self, x):
            x = self.two(self.one(x))
            return (self.relu(x) + x).mean((2, 3))

    view = fuse_scaling(observe_masks(add_mask_generators(Both(), torch.zeros(2, 3, 8, 8), first=True)))
    assert [node.args[2] for node in view.graph.nodes if node.target is scale_maps] == [False]


def test_a_damped_view_can_be_joined_as_well():
    model, x = modular("mwt"), torch.randn(4, 3, 16, 16)
    views = [damp_masks(change(observe_masks(model)), model, 0.1) for change in (lambda view: view, fuse_scaling)]
    gradients = [torch.autograd.grad(view(x)[0].square().sum(), list(model.parameters())) for view in views]
    for a, b in zip(*gradients): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item() + 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_means_taken_in_the_network_are_those_of_the_maps(name):
    model = modular("plain", name, 0.25).train().to(memory_format=torch.channels_last)
    x = torch.randn(16, 3, MODELS[name], MODELS[name], generator=torch.Generator().manual_seed(0))
    sites, found, labels = list(unit_sites(model, x[:2])), [], torch.arange(16) % 10
    objective = MODA()
    for view in (objective.prepare(model, x[:2]), observe(model, sites)):
        torch.manual_seed(0) # of dropout
        logits, observed = view(x)
        loss, terms = objective(logits, labels, observed)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss, torch.cat([gradient.flatten() for gradient in gradients])))
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() < 1e-5 * found[1][1].norm()


# CUDA


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("method", ["plain", "moda", "mwt"])
def test_no_synchronisation_on_cuda(digits, method):
    model, objective = modular(method).cuda().train(), OBJECTIVES[method]()
    x, labels = torch.randn(16, 3, 16, 16, device="cuda"), torch.arange(16, device="cuda") % 10
    knobs = replace(KNOBS, precision="bfloat16", max_norm=1.0)
    optimizer = make_optimizer(model, knobs)
    forward = forward_pass(prepare_network(model, objective, x[:2], 10), objective, knobs.precision)
    loop = Loop(forward, optimizer, knobs)
    for _ in range(2): train_step(loop, x, labels)
    torch.cuda.set_sync_debug_mode("error")
    try: train_step(loop, x, labels)
    finally: torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("method", ["plain", "moda", "mwt"])
def test_compiled_training_follows_the_plain_loop_on_cuda(digits, method):
    common = dict(epochs=13, batch_size=17, lr=0.01, evaluate_every=0, device="cuda")
    plain = fit(modular(method), digits, OBJECTIVES[method](), fast=False, **common)
    fast = fit(modular(method), digits, OBJECTIVES[method](), **common)
    assert fast.last["loss"] == pytest.approx(plain.last["loss"], rel=0.05) # bfloat16 has 8 bits
