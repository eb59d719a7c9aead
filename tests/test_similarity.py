"""Mean cosines from class sums against loops over pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import CountOperations, gathered_mean_cosines, slow_mean_cosines

from modnb.devices import one_hot
from modnb.similarity import AVERAGES, cosine_losses, layer_indicator, mean_cosines, pair_weights

VGG16_WIDTHS = [64, 128, 128, 256, 256, 256, *[512] * 6] # the twelve masked layers
RESNET18_WIDTHS = [*[64] * 4, *[128] * 5, *[256] * 5, *[512] * 5] # the nineteen
KINDS = st.sampled_from(("relu", "signed", "mask"))


def draw_rows(seed, size, widths, kind, zero_share=0.2):
    random = torch.Generator().manual_seed(seed)
    rows = []
    for width in widths:
        row = torch.randn(size, width, generator=random, dtype=torch.float64)
        if kind == "relu": row = row.relu()
        if kind == "mask": row = (row > 0).double()
        row[torch.rand(size, generator=random) < zero_share] = 0
        rows.append(row.requires_grad_())
    return rows


batch = st.fixed_dictionaries({
    "seed": st.integers(0, 2**20), "widths": st.lists(st.integers(1, 7), min_size=1, max_size=4), "kind": KINDS,
    "labels": st.lists(st.integers(0, 4), min_size=1, max_size=9).map(torch.tensor)})


@settings(max_examples=60, deadline=None)
@given(batch, st.sampled_from(AVERAGES), st.floats(-2, 2))
def test_value_and_gradient_equal_the_pair_loop(batch, average, mix):
    rows = draw_rows(batch["seed"], len(batch["labels"]), batch["widths"], batch["kind"])
    fast = mean_cosines(rows, batch["labels"], average)
    slow = slow_mean_cosines(rows, batch["labels"], average)
    for a, b in zip(fast, slow): assert a.dtype == torch.float64 and abs(a - b) < 1e-10
    fast_gradients = torch.autograd.grad(fast[0] + mix * fast[1], rows)
    slow_gradients = torch.autograd.grad(slow[0] + mix * slow[1], rows, allow_unused=True)
    for a, b in zip(fast_gradients, slow_gradients):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-10, rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(batch, st.sampled_from(AVERAGES), st.integers(0, 4))
def test_more_classes_than_images_change_nothing(batch, average, outside):
    "The sums then have a row for each image; with few classes, one for each class"
    rows = draw_rows(batch["seed"], len(batch["labels"]), batch["widths"], batch["kind"])
    labels = torch.where(batch["labels"] == outside, -1, batch["labels"]) # takes part in no pair
    small = labels.where(labels >= 0, torch.tensor(1 + 5 * 200))
    padded = [torch.cat([row, row.new_zeros(1000, row.shape[1])]) for row in rows] # more images than classes
    alone = torch.cat([labels, torch.full([1000], -1)])
    assert len(alone) > 5 and len(labels) < 1000
    many = mean_cosines(rows, labels * 200, average, num_classes=1000)
    few = mean_cosines(padded, alone, average, num_classes=5)
    beyond = mean_cosines(rows, small * 200, average, num_classes=1000)
    for a, b, c in zip(few, many, beyond): assert abs(a - b) < 1e-10 and abs(a - c) < 1e-10
    for a, b in zip(torch.autograd.grad(sum(few), rows), torch.autograd.grad(sum(many), rows)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_sums_are_no_more_than_images(monkeypatch):
    seen = []
    def counted(labels, num_classes, dtype): return seen.append(num_classes) or one_hot(labels, num_classes, dtype)
    monkeypatch.setattr("modnb.similarity.one_hot", counted)
    for classes in (10, 64, 1000): mean_cosines([torch.rand(64, 3)], torch.arange(64) % 10, num_classes=classes)
    assert seen == [10, 64, 64]


@settings(max_examples=40, deadline=None)
@given(batch, st.sampled_from(AVERAGES))
def test_layers_are_averaged_with_equal_weight(batch, average):
    rows = draw_rows(batch["seed"], len(batch["labels"]), batch["widths"], batch["kind"])
    within, between = mean_cosines(rows, batch["labels"], average, per_layer=True)
    alone = [mean_cosines([row], batch["labels"], average) for row in rows]
    torch.testing.assert_close(within, torch.stack([w for w, _ in alone]))
    torch.testing.assert_close(between, torch.stack([b for _, b in alone]))
    together = mean_cosines(rows, batch["labels"], average)
    torch.testing.assert_close(torch.stack(together), torch.stack([within.mean(), between.mean()]))


@settings(max_examples=40, deadline=None)
@given(batch, st.sampled_from(AVERAGES), st.integers(0, 999))
def test_order_and_scale_of_images_do_not_matter(batch, average, seed):
    labels, random = batch["labels"], torch.Generator().manual_seed(seed)
    rows = [row.detach() for row in draw_rows(batch["seed"], len(labels), batch["widths"], batch["kind"])]
    expected = torch.stack(mean_cosines(rows, labels, average))
    order = torch.randperm(len(labels), generator=random)
    torch.testing.assert_close(torch.stack(mean_cosines([r[order] for r in rows], labels[order], average)), expected)
    scaled = [row * (torch.rand(len(row), 1, generator=random, dtype=torch.float64) * 100 + 0.01) for row in rows]
    torch.testing.assert_close(torch.stack(mean_cosines(scaled, labels, average)), expected)


@settings(max_examples=30, deadline=None)
@given(batch, st.sampled_from(AVERAGES))
def test_numbers_of_classes_do_not_matter(batch, average):
    rows = draw_rows(batch["seed"], len(batch["labels"]), batch["widths"], batch["kind"])
    expected = torch.stack(mean_cosines(rows, batch["labels"], average))
    torch.testing.assert_close(torch.stack(mean_cosines(rows, batch["labels"], average, num_classes=11)), expected)
    torch.testing.assert_close(torch.stack(mean_cosines(rows, 10 - batch["labels"], average)), expected)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels, absent", [([0, 1, 2, 3], 0), ([2, 2, 2, 2], 1), ([1], 0), ([1], 1)])
def test_a_batch_without_pairs_gives_zero_with_zero_gradient(labels, absent, average, dtype):
    row = torch.rand(len(labels), 5, dtype=dtype, requires_grad=True)
    value = mean_cosines([row], torch.tensor(labels), average, num_classes=4)[absent]
    loss = cosine_losses([row], torch.tensor(labels), average, num_classes=4)[absent]
    assert value.item() == 0 and loss.item() == 0
    (value + loss).backward()
    assert row.grad.eq(0).all()


def test_an_empty_batch_gives_zero():
    within, between = mean_cosines([torch.rand(0, 5)], torch.zeros(0, dtype=torch.long))
    assert within.item() == 0 and between.item() == 0


def test_losses_are_one_minus_within_and_between():
    rows, labels = [torch.rand(9, 4)], torch.arange(9) % 3
    within, between = mean_cosines(rows, labels)
    together, apart = cosine_losses(rows, labels)
    assert together == 1 - within and apart == between


@pytest.mark.parametrize("average", AVERAGES)
def test_labels_out_of_range_take_no_part(average):
    rows, labels = [torch.rand(6, 4, dtype=torch.float64)], torch.tensor([0, 0, 1, 1, -1, 7])
    kept = mean_cosines([rows[0][:4]], labels[:4], average)
    for a, b in zip(mean_cosines(rows, labels, average, num_classes=2), kept): assert abs(a - b) < 1e-12


def test_zero_rows_have_zero_gradient_and_short_rows_none_that_explodes():
    row = torch.tensor([[1., 2], [0, 0], [1e-13, 0], [3, 1]], requires_grad=True)
    mean_cosines([row], torch.zeros(4, dtype=torch.long))[0].backward()
    assert row.grad[1:3].eq(0).all() and row.grad[[0, 3]].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_inside(dtype):
    row = torch.rand(64, 50).to(dtype)
    labels = torch.arange(64) % 7
    exact = mean_cosines([row.double()], labels)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): found = mean_cosines([row], labels)
        for a, b in zip(found, exact): assert a.dtype == torch.float32 and abs(a - b) < 1e-6


def test_boolean_masks_are_rows_too():
    masks = torch.rand(12, 9) > 0.4
    found = mean_cosines([masks], torch.arange(12) % 3)
    torch.testing.assert_close(torch.stack(found), torch.stack(mean_cosines([masks.float()], torch.arange(12) % 3)))


@pytest.mark.parametrize("widths, name", [(VGG16_WIDTHS, "VGG16"), (RESNET18_WIDTHS, "ResNet18")])
def test_operations_do_not_grow_with_layers_or_wait_for_the_device(widths, name):
    rows, labels = [torch.rand(128, width) for width in widths], torch.arange(128) % 10
    layer_indicator(widths) # made once in a run
    counts = {}
    for average in AVERAGES:
        with CountOperations() as fast: mean_cosines(rows, labels, average, num_classes=10)
        counts[average] = len(fast.names)
        waiting = ("nonzero", "masked_select", "index.", "_local_scalar_dense", "item")
        assert not [operation for operation in fast.names if operation.startswith(waiting)]
    with CountOperations() as gathered: expected = gathered_mean_cosines(rows, labels)
    print(f"{name}: {counts} operations forward, {len(gathered.names)} with matrices of cosines per layer")
    torch.testing.assert_close(torch.stack(mean_cosines(rows, labels, num_classes=10)), torch.stack(expected))
    assert max(counts.values()) < 60 < len(gathered.names)
    assert [name for name in gathered.names if name.startswith("index.")]


def test_it_compiles_into_one_graph():
    rows, labels = [torch.rand(16, 5), torch.rand(16, 3)], torch.arange(16) % 4
    compiled = torch.compile(lambda a, b: mean_cosines([a, b], labels, num_classes=4), backend="eager", fullgraph=True)
    for a, b in zip(compiled(*rows), mean_cosines(rows, labels, num_classes=4)): torch.testing.assert_close(a, b)


def test_the_indicator_may_first_be_asked_for_in_inference_mode():
    labels, width = torch.tensor([0, 0]), 337 # a width that no other test asks for
    with torch.inference_mode(): mean_cosines([torch.rand(2, width)], labels)
    row = torch.rand(2, width, requires_grad=True)
    mean_cosines([row], labels)[0].backward()
    assert row.grad.isfinite().all()


def test_weights_add_up_to_one():
    sizes = torch.tensor([3., 0, 1, 5], dtype=torch.float64)
    for average in AVERAGES:
        weights = pair_weights(sizes, average)
        assert abs((weights.within * sizes * (sizes - 1)).sum() - 1) < 1e-12
        share = weights.member * sizes
        assert abs((share.sum()**2 - share.square().sum()) * weights.between - 1) < 1e-12


good = [torch.rand(4, 3)], torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("rows, labels, options, message", [
    ([], good[1], {}, "no rows"),
    ([torch.rand(4, 3, 2, 2)], good[1], {}, "average feature maps"),
    ([torch.rand(4, 3), torch.rand(3, 3)], good[1], {}, r"rows\[1\]"),
    ([torch.rand(4, 0)], good[1], {}, r"rows\[0\]"),
    (*good, {"average": "class"}, "pairs, classes"),
    (*good, {"num_classes": 0}, "at least 1"),
    (good[0], torch.rand(4), {}, "whole numbers"),
    (good[0], torch.zeros(4, 1, dtype=torch.long), {}, "whole numbers"),
])
def test_wrong_input_is_named(rows, labels, options, message):
    with pytest.raises(ValueError, match=message): mean_cosines(rows, labels, **options)
