"""Data: splits and batches as properties, every loader on small files of our own, every refusal."""

import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from modnb.checks import check_number
from modnb.compat import import_torchvision
from modnb.data import (
    CorruptFile,
    ImageData,
    MissingDataset,
    Split,
    Stream,
    as_split,
    batches,
    channel_statistics,
    class_indices,
    crop_flip,
    hold_out,
    list_datasets,
    load_dataset,
    md5_of,
    normalise,
    pick_device,
    read_transform,
    resize,
    stream_folder,
)

CLASSES = ["airplane", "bird", "cat", "dog"]
quick = settings(deadline=None, max_examples=40)


def random_images(count, side=6, seed=0):
    return torch.randint(256, [count, 3, side, side], generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def split_of(count=20, side=6, crop_padding=0, flip=False):
    "A split in which the pixel at the top left is the image's own number and the labels follow it."
    images = random_images(count, side)
    images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]
    return Split(images, torch.arange(count) % 4, CLASSES, (0.0,) * 3, (1 / 255,) * 3, crop_padding, flip)


# Classes, numbers, devices


@quick
@given(st.lists(st.integers(0, 3), min_size=1, unique=True), st.data())
def test_classes_by_name_or_position_in_one_order(positions, data):
    mixed = [data.draw(st.sampled_from([index, CLASSES[index], np.int64(index)])) for index in positions]
    assert class_indices(mixed, CLASSES) == sorted(positions)


@pytest.mark.parametrize("chosen, words", [
    ([], "no class chosen. There is: airplane, bird"), (["cat", 2], "more than once: cat"), (["cow"], "no class 'cow'"),
    (["dogg"], "Did you mean 'dog'"), ([4], "no class 4. There is: 0 to 3"), ([-1], "no class -1"),
    ([1.5], "no class 1.5"), ([True], "no class True"), ([None], "no class None")])
def test_classes_that_do_not_exist(chosen, words):
    with pytest.raises(ValueError, match=words): class_indices(chosen, CLASSES)


def test_one_class_alone():
    assert class_indices("cat", CLASSES) == class_indices(2, CLASSES) == [2]


@pytest.mark.parametrize("value", [0, -3, 1.0, "1", None, True])
def test_whole_number_refuses(value):
    with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
        check_number("size", value, 1, whole=True)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == (torch.accelerator.current_accelerator(True) or torch.device("cpu")).type
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"no device '{device}'. There is: cpu"): pick_device(device)


# Pixels


@quick
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 4), st.integers(0, 1000))
def test_crop_flip_is_a_crop_and_a_flip(count, height, width, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, [count, 3, height, width], generator=generator, dtype=torch.uint8)
    offsets = torch.randint(2 * padding + 1, [count, 2], generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    found = crop_flip(images, padding, offsets, mirrored)
    for image, (row, column), mirror, result in zip(images, offsets, mirrored, found, strict=True):
        border = torch.zeros(3, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
        border[:, padding:padding + height, padding:padding + width] = image
        window = border[:, row:row + height, column:column + width]
        assert torch.equal(result, window.flip(2) if mirror else window)


def test_normalise_and_statistics_belong_together():
    images = random_images(50)
    mean, std = channel_statistics(images)
    reference = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(reference.mean(1).tolist(), abs=1e-12)
    assert std == pytest.approx(reference.std(1, correction=0).tolist(), abs=1e-12)
    normal = normalise(images, mean, std).transpose(0, 1).flatten(1)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(1, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_images_without_contrast_stay_finite():
    images = torch.full([2, 3, 4, 4], 7, dtype=torch.uint8)
    assert not normalise(images, *channel_statistics(images)).abs().gt(1e-4).any()


@pytest.mark.parametrize("size", [3, 6, 16])
def test_resize_keeps_level_and_type(size):
    flat = torch.tensor([0, 9, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 6, 6)
    assert torch.equal(resize(flat, size), flat[:, :, :1, :1].expand(2, 3, size, size))
    assert torch.equal(resize(random_images(2), 6), random_images(2))


# Splits


def test_split_refuses_tensors_that_do_not_fit():
    images, labels = random_images(3), torch.zeros(3, dtype=torch.int64)
    for bad in (images.float(), images[0]):
        with pytest.raises(ValueError, match="images must be uint8"): Split(bad, labels, CLASSES, (0,) * 3, (1,) * 3)
    with pytest.raises(ValueError, match="1 channels, but there are 3 means"):
        Split(images[:, :1], labels, CLASSES, (0,) * 3, (1,) * 3)
    for label in (-1, 4, -100):
        with pytest.raises(ValueError, match=f"0 to 3; 1 are not, such as {label}"):
            Split(images, torch.tensor([0, label, 1]), CLASSES, (0,) * 3, (1,) * 3)
    for bad in (labels[:2], labels.int()):
        with pytest.raises(ValueError, match="labels must be int64"): Split(images, bad, CLASSES, (0,) * 3, (1,) * 3)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, unique=True), st.integers(0, 30))
def test_subtask_keeps_images_and_renumbers(positions, count):
    split = split_of(count)
    part = split.subtask(positions)
    kept = sorted(positions)
    assert part.classes == [CLASSES[index] for index in kept]
    members = [number for number in range(count) if number % 4 in kept]
    assert part.images[:, 0, 0, 0].tolist() == members
    assert [part.classes[label] for label in part.labels] == [CLASSES[number % 4] for number in members]
    assert (part.mean, part.std, part.crop_padding, part.flip) == (split.mean, split.std, 0, False)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_any_number_of_channels(channels):
    images = torch.randint(256, [8, channels, 6, 6], dtype=torch.uint8)
    split = Split(images, torch.arange(8) % 4, CLASSES, (0.5,) * channels, (0.5,) * channels, crop_padding=1, flip=True)
    seen, _ = next(batches(split.subtask([1, 2]), augment=True, seed=0))
    assert seen.shape == (4, channels, 6, 6)
    torch.testing.assert_close(next(batches(split))[0], images.float() / 127.5 - 1)


def test_select():
    split = split_of(5)
    for chosen in ([3, 1], torch.tensor([3, 1])): assert split.select(chosen).images[:, 0, 0, 0].tolist() == [3, 1]
    assert split.select(split.labels == 0).images[:, 0, 0, 0].tolist() == [0, 4]
    assert len(split.select([])) == 0 and split.select([]).images.shape == (0, 3, 6, 6)


def test_image_data():
    data = ImageData("toy", CLASSES, split_of(20), split_of(0), split_of(8))
    assert (data.num_classes, data.image_size) == (4, 6)
    part = data.subtask(["dog", "airplane"])
    assert part.classes == part.train.classes == part.valid.classes == part.test.classes == ["airplane", "dog"]
    assert [len(split) for split in (part.train, part.valid, part.test)] == [10, 0, 4]
    assert torch.equal(data.example(3), next(batches(data.train, 3))[0])
    assert data.to("meta").test.device.type == "meta" and data.test.device.type == "cpu"


# Streams


def loader(split, size=3):
    return torch.utils.data.DataLoader(list(zip(normalise(split.images, split.mean, split.std), split.labels)), size)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, unique=True), st.integers(1, 20))
def test_a_stream_gives_the_images_of_a_split(positions, count):
    split = split_of(count)
    for source in (loader(split), list(batches(split, 7))):
        stream = Stream(source, CLASSES)
        for data, wanted in ((stream, split), (stream.subtask(positions), split.subtask(positions))):
            assert data.classes == wanted.classes
            found, expected = list(data), list(batches(wanted))
            assert [label for _, labels in found for label in labels.tolist()] == wanted.labels.tolist()
            if found: assert torch.equal(torch.cat([images for images, _ in found]), expected[0][0])
            assert len(list(batches(data))) == len(found), "again, from the beginning"


@pytest.mark.parametrize("batch, words", [
    ({"x": 1}, "batch 0 is dict"), ([torch.zeros(2, 3, 4, 4)], "batch 0 is list"),
    ((torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2).long()), "normalised, of a floating type"),
    ((torch.zeros(2, 4, 4), torch.zeros(2).long()), "must be .B, C, H, W."),
    ((torch.zeros(2, 3, 4, 4), torch.zeros(3).long()), "labels must be integers .2."),
    ((torch.zeros(2, 3, 4, 4), torch.zeros(2)), "labels must be integers"),
    ((torch.zeros(2, 3, 4, 4), torch.tensor([0, 4])), "0 to 3; 1 are not, such as 4")])
def test_streams_refuse(batch, words):
    with pytest.raises(ValueError, match=words): list(Stream([batch], CLASSES))
    with pytest.raises(ValueError, match="shuffle and augment there"):
        batches(Stream([batch], CLASSES), shuffle=True, seed=0)


def test_what_is_no_stream():
    with pytest.raises(ValueError, match="generator cannot be gone through more than once"):
        Stream((x for x in []), CLASSES)
    with pytest.raises(ValueError, match="say Stream.data, classes"): as_split(loader(split_of(4)))
    with pytest.raises(ValueError, match="int cannot be gone through"): as_split(5)


# Batches


@quick
@given(st.integers(0, 25), st.integers(1, 30), st.booleans(), st.booleans())
def test_an_epoch_is_every_image_once(count, batch_size, shuffle, drop_last):
    split = split_of(count, 2)
    epoch = list(batches(split, batch_size, shuffle=shuffle, seed=0, drop_last=drop_last))
    sizes = [len(labels) for _, labels in epoch]
    full, rest = divmod(count, batch_size)
    assert sizes == [batch_size] * full + [rest] * (rest > 0 and not drop_last)
    numbers = [round(x[0, 0, 0].item()) for images, _ in epoch for x in images]
    assert [number % 4 for number in numbers] == [label for _, labels in epoch for label in labels.tolist()]
    if not drop_last: assert sorted(numbers) == list(range(count))
    if not shuffle: assert numbers == list(range(sum(sizes)))
    assert all(images.dtype == torch.float32 and labels.dtype == torch.int64 for images, labels in epoch)


def test_epochs_repeat_under_a_seed_and_differ_under_a_generator():
    split = split_of(40, 8, crop_padding=2, flip=True)
    epoch = lambda **source: torch.cat([images for images, _ in batches(split, augment=True, shuffle=True, **source)])
    assert torch.equal(epoch(seed=5), epoch(seed=5)) and not torch.equal(epoch(seed=5), epoch(seed=6))
    assert torch.equal(epoch(seed=5), epoch(seed=5, batch_size=7))
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first, second = epoch(generator=one), epoch(generator=one)
    assert torch.equal(first, epoch(seed=5)) and not torch.equal(first, second)
    assert torch.equal(first, epoch(generator=two)) and torch.equal(second, epoch(generator=two))


def test_an_epoch_stopped_early_does_not_change_the_next():
    split, one, two = split_of(40, 8, crop_padding=2), *(torch.Generator().manual_seed(0) for _ in range(2))
    next(batches(split, 4, augment=True, shuffle=True, generator=one))
    list(batches(split, 4, augment=True, shuffle=True, generator=two))
    assert one.get_state().equal(two.get_state())


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(batches(split_of(flip=True, crop_padding=1), augment=True, shuffle=True, seed=0))
    assert torch.equal(before, torch.get_rng_state())


def test_augmentation_only_where_asked_for():
    plain = normalise(split_of().images, (0.0,) * 3, (1 / 255,) * 3)
    assert torch.equal(next(batches(split_of(crop_padding=2, flip=True)))[0], plain)
    assert torch.equal(next(batches(split_of(), augment=True, seed=0))[0], plain)
    assert not torch.equal(next(batches(split_of(crop_padding=2), augment=True, seed=0))[0], plain)


def test_how_much_is_cropped_and_mirrored():
    "Every offset about equally often, half of the images mirrored, and each image only ever a window of itself."
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    image[:, 4, 3:6] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    count = 4000
    images, labels = image.expand(count, 3, 9, 9), torch.zeros(count, dtype=torch.int64)
    split = Split(images, labels, ["a"], (0,) * 3, (1 / 255,) * 3, crop_padding=1, flip=True)
    images = next(batches(split, count, augment=True, seed=0))[0][:, 0].round()
    middle = (images == 2).nonzero()
    assert len(middle) == count
    for row in (3, 4, 5):
        for column in (3, 4, 5):
            share = ((middle[:, 1] == row) & (middle[:, 2] == column)).float().mean().item()
            assert abs(share - 1 / 9) < 0.02
    left = images.gather(2, (middle[:, 2] - 1)[:, None, None].expand(count, 9, 1))[torch.arange(count), middle[:, 1], 0]
    assert set(left.tolist()) == {1.0, 3.0} and abs((left == 3).float().mean().item() - 0.5) < 0.03
    split.flip = False
    assert not (next(batches(split, count, augment=True, seed=0))[0][:, 0, :, 2].round() == 3).any()


def test_augmentation_does_not_loop_over_images():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **kwargs or {})

    calls = []
    for count in (2, 64):
        split = split_of(count, crop_padding=2, flip=True)
        with Count() as counted: next(batches(split, count, augment=True, shuffle=True, seed=0))
        calls.append(counted.calls)
    assert calls[0] == calls[1] < 70


@pytest.mark.parametrize("options, words", [
    ({"shuffle": True}, "pass generator or seed"), ({"augment": True}, "pass generator or seed"),
    ({"seed": 0, "generator": torch.Generator()}, "not both"), ({"batch_size": 0}, "batch_size must be a whole")])
def test_batches_refuse_at_once(options, words):
    with pytest.raises(ValueError, match=words): batches(split_of(), **options)


# Held-out parts


@quick
@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.floats(0.01, 0.5), st.integers(0, 5))
def test_hold_out_takes_its_share_of_every_class(sizes, fraction, seed):
    labels = torch.cat([torch.full([size], index) for index, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    kept, held = hold_out(labels, fraction, seed, CLASSES[:len(sizes)])
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert kept.equal(kept.sort().values) and held.equal(held.sort().values)
    for index, size in enumerate(sizes):
        assert (labels[held] == index).sum().item() == max(1, round(size * fraction))
    assert hold_out(labels, fraction, seed, CLASSES[:len(sizes)])[1].equal(held)


def test_hold_out_depends_on_the_seed_alone():
    labels = torch.arange(100) % 4
    first, second = (hold_out(labels, 0.3, seed, CLASSES)[1] for seed in (0, 1))
    assert len(first) == len(second) and not first.equal(second)
    assert [len(part) for part in hold_out(labels, 0.0, 0, CLASSES)] == [100, 0]


@pytest.mark.parametrize("fraction, words", [(1.0, "below 1"), (-0.1, "at least 0"), (0.99, "too few to hold out")])
def test_hold_out_refuses(fraction, words):
    with pytest.raises(ValueError, match=words): hold_out(torch.arange(4), fraction, 0, CLASSES)


# Digits


def test_digits():
    data = load_dataset("digits", device="cpu")
    assert (data.name, data.classes, data.image_size) == ("digits", list("0123456789"), 16)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [1437, 0, 360]
    for split in (data.train, data.test):
        assert split.images.dtype == torch.uint8 and split.images.is_contiguous()
        assert torch.equal(split.images[:, :1].expand_as(split.images), split.images)
        assert (split.crop_padding, split.flip) == (1, False)
    assert data.train.images.max() == 255
    assert data.train.mean == data.test.mean == pytest.approx(channel_statistics(data.train.images)[0])
    shares = data.test.labels.bincount() / (data.train.labels.bincount() + data.test.labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01


def test_digits_are_all_there_once():
    from sklearn.datasets import load_digits
    grey, truth = load_digits(return_X_y=True)
    data = load_dataset("digits", image_size=8, device="cpu")
    found = sorted((label, *image.tolist()) for split in (data.train, data.test)
                   for image, label in zip(split.images[:, 0].flatten(1), split.labels.tolist(), strict=True))
    levels = (torch.from_numpy(grey) * 255 / 16).round().byte()
    assert found == sorted((label, *image.tolist()) for image, label in zip(levels, truth.tolist(), strict=True))


def test_test_images_never_change():
    "Pinned: figures of one version must be comparable with those of the next."
    settings = {"seed": 0}, {"seed": 1, "valid": 0.2}, {"seed": 2, "valid": 0.2}
    data = [load_dataset("digits", device="cpu", **setting) for setting in settings]
    for other in data[1:]: assert torch.equal(data[0].test.images, other.test.images)
    assert data[0].test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert hashlib.md5(data[0].test.images.numpy().tobytes()).hexdigest() == "e293c03f62f1b61c7b0b2714caa0c2ea"
    assert not torch.equal(data[1].valid.images, data[2].valid.images)
    again = load_dataset("digits", seed=1, valid=0.2, device="cpu")
    for part in ("train", "valid"): assert torch.equal(getattr(data[1], part).images, getattr(again, part).images)
    assert len(data[1].train) + len(data[1].valid) == 1437
    assert data[1].train.mean == channel_statistics(data[1].train.images)[0] != data[2].train.mean


@pytest.mark.parametrize("image_size, padding", [(8, 1), (16, 1), (32, 2)])
def test_digits_at_other_sizes(image_size, padding):
    data = load_dataset("digits", image_size=image_size, device="cpu")
    assert data.train.images.shape == (1437, 3, image_size, image_size) and data.train.crop_padding == padding


# CIFAR and SVHN, from files in their format and a server of our own


@pytest.fixture
def address(tmp_path, monkeypatch):
    "Serve the folder `source` on this machine; return its address."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words): pass

    (tmp_path / "source").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "source")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pack(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, md5_of(path)]


def publish(monkeypatch, dataset, source, address, train, test, meta):
    "Make torchvision's class expect the files in `source`, and offer them there as an archive."
    archive = source / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar: tar.add(source / dataset.base_folder, dataset.base_folder)
    changes = {"train_list": train, "test_list": test, "meta": {**dataset.meta, "md5": meta}, "filename": archive.name,
               "url": f"{address}/{archive.name}", "tgz_md5": md5_of(archive)}
    for name, value in changes.items(): monkeypatch.setattr(dataset, name, value)


@pytest.fixture
def cifar10(tmp_path, monkeypatch, address):
    "Five training files of four images and a test file of eight; returns the pixels of both."
    dataset = import_torchvision().datasets.CIFAR10
    source = tmp_path / "source"
    images = [random_images(count, 32, seed) for seed, count in enumerate([4] * 5 + [8])]
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    listed = [pack(source / dataset.base_folder / name,
                   {"data": part.flatten(1).numpy(), "labels": [number % 10 for number in range(len(part))]})
              for name, part in zip(names, images, strict=True)]
    _, meta = pack(source / dataset.base_folder / "batches.meta", {"label_names": [f"class{n}" for n in range(10)]})
    publish(monkeypatch, dataset, source, address, listed[:5], listed[5:], meta)
    return source, torch.cat(images[:5]), images[5]


def test_cifar10_is_read_as_it_lies_there(cifar10):
    source, train, test = cifar10
    data = load_dataset("cifar10", root=source, device="cpu")
    assert torch.equal(data.train.images, train) and torch.equal(data.test.images, test)
    assert data.train.labels.tolist() == [0, 1, 2, 3] * 5 and data.test.labels.tolist() == list(range(8))
    assert (data.name, data.classes[:2], data.num_classes) == ("cifar10", ["class0", "class1"], 10)
    assert data.train.mean == (0.4914, 0.4822, 0.4465) and data.train.std == (0.2471, 0.2435, 0.2616)
    assert (data.train.crop_padding, data.train.flip, len(data.valid)) == (4, True, 0)


def test_cifar10_options(cifar10):
    data = load_dataset("cifar10", root=cifar10[0], image_size=16, flip=False, crop_padding=0, device="cpu")
    assert (data.image_size, data.train.flip, data.train.crop_padding) == (16, False, 0)
    assert load_dataset("cifar10", root=cifar10[0], image_size=16, device="cpu").train.crop_padding == 2


def test_cifar10_place_from_the_environment(cifar10, monkeypatch, tmp_path):
    monkeypatch.setenv("MODNB_DATA", str(cifar10[0]))
    assert len(load_dataset("cifar10", device="cpu").train) == 20
    monkeypatch.delenv("MODNB_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(MissingDataset, match=str(tmp_path / "home" / ".cache" / "modnb")): load_dataset("cifar10")


def test_cifar10_missing_then_downloaded(cifar10, tmp_path):
    root = tmp_path / "new"
    with pytest.raises(MissingDataset) as caught: load_dataset("cifar10", root=root, device="cpu")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, FileNotFoundError)
    for words in (str(root), "data_batch_1", "batches.meta", "download=True", "http://127.0.0.1", "MODNB_DATA"):
        assert words in str(caught.value)
    data = load_dataset("cifar10", root=root, download=True, device="cpu")
    assert torch.equal(data.train.images, cifar10[1])
    assert torch.equal(load_dataset("cifar10", root=root, device="cpu").test.images, cifar10[2])


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar10_corrupt_file_is_named_and_replaced(cifar10, tmp_path, name):
    root = tmp_path / "new"
    load_dataset("cifar10", root=root, download=True, device="cpu")
    file = root / "cifar-10-batches-py" / name
    expected = md5_of(file)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptFile) as caught: load_dataset("cifar10", root=root, device="cpu")
    assert all(words in str(caught.value) for words in (str(file), md5_of(file), expected))
    load_dataset("cifar10", root=root, download=True, device="cpu")
    assert md5_of(file) == expected
    file.unlink()
    with pytest.raises(MissingDataset, match=f"no cifar-10-batches-py/{name}. Pass"): load_dataset("cifar10", root=root)
    load_dataset("cifar10", root=root, download=True, device="cpu")


def test_cifar10_download_that_fails(cifar10, tmp_path):
    archive = cifar10[0] / "archive.tar.gz"
    archive.write_bytes(b"half an archive")
    with pytest.raises(MissingDataset, match="could not be fetched from http://127.*to .*new: .*corrupt"):
        load_dataset("cifar10", root=tmp_path / "new", download=True)
    archive.unlink()
    with pytest.raises(MissingDataset, match="could not be fetched.*404"):
        load_dataset("cifar10", root=tmp_path / "other", download=True)


def test_nothing_is_unpickled_before_its_md5(cifar10, tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "sprung"),)

    file = cifar10[0] / "cifar-10-batches-py" / "data_batch_1"
    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CorruptFile, match="data_batch_1"): load_dataset("cifar10", root=cifar10[0])
    assert not (tmp_path / "sprung").exists()


def test_cifar100(tmp_path, monkeypatch):
    dataset = import_torchvision().datasets.CIFAR100
    images, folder = random_images(6, 32), tmp_path / dataset.base_folder
    content = {"data": images.flatten(1).numpy(), "fine_labels": [0, 1, 2, 99, 98, 97], "coarse_labels": [0] * 6}
    train, test = pack(folder / "train", content), pack(folder / "test", content)
    _, meta = pack(folder / "meta", {"fine_label_names": [f"fine{n}" for n in range(100)]})
    publish(monkeypatch, dataset, tmp_path, "http://nowhere", [train], [test], meta)
    data = load_dataset("cifar100", root=tmp_path, device="cpu")
    assert torch.equal(data.train.images, images) and data.test.labels.tolist() == [0, 1, 2, 99, 98, 97]
    assert data.num_classes == 100 and data.train.flip
    assert data.train.mean == (0.5071, 0.4867, 0.4408) and data.train.std == (0.2675, 0.2565, 0.2761)


@pytest.fixture
def svhn(tmp_path, monkeypatch, address):
    "Files of 5, 7 and 4 images; digit 0 is labelled 10 in them."
    from scipy.io import savemat
    dataset, source, listed, images = import_torchvision().datasets.SVHN, tmp_path / "source", {}, {}
    for seed, (part, count) in enumerate((("train", 5), ("extra", 7), ("test", 4))):
        images[part], file = random_images(count, 32, seed), source / f"{part}_32x32.mat"
        labels = np.array([[10, 1, 2, 9, 10, 3, 4][number] for number in range(count)], dtype=np.uint8)[:, None]
        savemat(file, {"X": images[part].permute(2, 3, 1, 0).numpy(), "y": labels})
        listed[part] = [f"{address}/{file.name}", file.name, md5_of(file)]
    monkeypatch.setattr(dataset, "split_list", listed)
    return source, images


def test_svhn(svhn):
    source, images = svhn
    data = load_dataset("svhn", root=source, device="cpu")
    assert torch.equal(data.train.images, images["train"]) and torch.equal(data.test.images, images["test"])
    assert data.train.labels.tolist() == [0, 1, 2, 9, 0] and data.test.labels.tolist() == [0, 1, 2, 9]
    assert (data.classes, data.train.flip, data.train.crop_padding) == (list("0123456789"), False, 4)
    assert data.train.mean == (0.485, 0.456, 0.406) and data.train.std == (0.229, 0.224, 0.225)
    assert load_dataset("svhn", root=source, flip=True, device="cpu").train.flip


def test_svhn_extra(svhn):
    source, images = svhn
    data = load_dataset("svhn", root=source, extra=True, device="cpu")
    assert torch.equal(data.train.images, torch.cat([images["train"], images["extra"]])) and len(data.test) == 4
    assert data.train.labels.tolist() == [0, 1, 2, 9, 0, 0, 1, 2, 9, 0, 3, 4]


def test_svhn_missing_corrupt_and_downloaded(svhn, tmp_path):
    root = tmp_path / "new"
    with pytest.raises(MissingDataset, match="train_32x32.mat, test_32x32.mat. Pass"): load_dataset("svhn", root=root)
    data = load_dataset("svhn", root=root, download=True, device="cpu")
    assert torch.equal(data.test.images, svhn[1]["test"]) and not (root / "extra_32x32.mat").exists()
    with pytest.raises(MissingDataset, match="no extra_32x32.mat. Pass"): load_dataset("svhn", root=root, extra=True)
    expected = md5_of(root / "test_32x32.mat")
    (root / "test_32x32.mat").write_bytes(b"damaged")
    found = hashlib.md5(b"damaged").hexdigest()
    with pytest.raises(CorruptFile, match=f"test_32x32.mat is corrupt: its md5 is {found}, expected {expected}"):
        load_dataset("svhn", root=root)
    assert len(load_dataset("svhn", root=root, download=True, device="cpu").test) == 4


# Folders of images


def write_images(folder, count, shade, size=(40, 40)):
    folder.mkdir(parents=True)
    for number in range(count): Image.new("RGB", size, (shade, number, 0)).save(folder / f"{number:02d}.png")


@pytest.fixture
def flat(tmp_path):
    "CLASS/*: ten images of each of two classes, told apart by their red, numbered by their green."
    for shade, name in ((50, "ant"), (200, "bee")): write_images(tmp_path / "insects" / name, 10, shade)
    return tmp_path / "insects"


@pytest.fixture
def ready(tmp_path):
    "train/CLASS/* and test/CLASS/*."
    for part, count in (("train", 6), ("test", 3)):
        for shade, name in ((50, "ant"), (200, "bee")): write_images(tmp_path / "ready" / part / name, count, shade)
    return tmp_path / "ready"


def test_folder_of_classes_is_split_once(flat):
    data = load_dataset(flat, device="cpu")
    assert (data.name, data.classes, data.image_size) == ("insects", ["ant", "bee"], 32)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [16, 0, 4]
    for split in (data.train, data.test):
        assert split.images[:, 0].flatten(1).eq(torch.tensor([50, 200])[split.labels, None]).all()
    numbers = [(label, green) for split in (data.train, data.test)
               for label, green in zip(split.labels.tolist(), split.images[:, 1, 0, 0].tolist(), strict=True)]
    assert sorted(numbers) == [(label, green) for label in (0, 1) for green in range(10)]
    assert (data.train.crop_padding, data.train.flip) == (4, False)
    assert data.train.mean == channel_statistics(data.train.images)[0]
    for other in (load_dataset(str(flat), seed=3, device="cpu"), load_dataset("folder", root=flat, device="cpu")):
        assert torch.equal(data.test.images, other.test.images) and other.name == "insects"
    assert [len(load_dataset(flat, test=share).test) for share in (0.0, 0.3)] == [0, 6]


def test_folder_with_its_own_splits(ready):
    data = load_dataset(ready, valid=0.5, image_size=8, device="cpu")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [6, 6, 6]
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test.images[:, 1, 0, 0].tolist() == [0, 1, 2] * 2
    for shade, name in ((50, "ant"), (200, "bee")): write_images(ready / "valid" / name, 2, shade)
    data = load_dataset(ready, device="cpu")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [12, 4, 6]
    with pytest.raises(ValueError, match="own validation images"): load_dataset(ready, valid=0.5)
    with pytest.raises(ValueError, match="own test/"): load_dataset(ready, test=0.5)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (20, 30), (32, 32)])
def test_shorter_side_is_resized_and_the_centre_kept(flat, size):
    "White in the middle square, grey beyond it: only white may come through."
    short = min(size)
    image = Image.new("RGB", size, (90, 90, 90))
    image.paste((255, 255, 255), ((size[0] - short) // 2, (size[1] - short) // 2, (size[0] + short) // 2,
                                  (size[1] + short) // 2))
    for file in (flat / "ant").iterdir(): image.save(file)
    data = load_dataset(flat, image_size=16, device="cpu")
    found = data.train.subtask("ant").images
    assert found.shape[1:] == (3, 16, 16) and found[:, :, 1:-1, 1:-1].eq(255).all()


def test_all_sorts_of_image_files(flat):
    folder, grey = flat / "ant", Image.new("L", (32, 32), 50)
    for file in folder.iterdir(): file.unlink()
    grey.save(folder / "grey.jpg", quality=95)
    grey.convert("P").save(folder / "palette.GIF")
    grey.convert("RGBA").save(folder / "alpha.webp", lossless=True)
    Image.fromarray(np.full((32, 32), 50 * 256 + 7, dtype=np.uint16)).save(folder / "deep.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image")
    (flat / ".thumbnails").mkdir()
    with pytest.warns(UserWarning, match="left out 1 files .* such as notes.txt"):
        data = load_dataset(flat, test=0.0, device="cpu")
    found = data.train.subtask("ant").images
    assert len(found) == 4 and data.classes == ["ant", "bee"]
    assert (found.int() - 50).abs().max() <= 1


def test_photographs_are_turned_upright(flat):
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3 # upside down
    for file in (flat / "ant").iterdir(): image.save(file, exif=exif)
    upright = load_dataset(flat, device="cpu").train.subtask("ant").images
    assert upright[:, :, :16].eq(0).all() and upright[:, :, 16:].eq(255).all()


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_image_is_named_with_its_md5(flat, content):
    file = flat / "bee" / "03.png"
    file.write_bytes(file.read_bytes()[:60] if content == "truncated" else content)
    with pytest.raises(CorruptFile) as caught: load_dataset(flat)
    assert str(file) in str(caught.value) and md5_of(file) in str(caught.value)


def test_no_picture_starts_a_program(flat, monkeypatch):
    "Pillow hands PostScript to Ghostscript: here a program that would leave a trace stands in for it."
    binary, trace = flat.parent / "gs", flat.parent / "started"
    binary.write_text(f"#!/bin/sh\ntouch {trace}\n")
    binary.chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(binary))
    Image.new("RGB", (8, 8)).save(flat / "ant" / "03.eps")
    (flat / "ant" / "03.eps").rename(flat / "ant" / "03.png")
    with pytest.raises(CorruptFile, match=r"03.png \(md5 .* cannot identify"): load_dataset(flat)
    stream = stream_folder(flat, 8, [0.5] * 3, [0.5] * 3)
    with pytest.raises(CorruptFile, match="03.png"): list(stream)
    assert not trace.exists()


def test_a_picture_too_large_is_named_and_not_unpacked(flat, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 40 - 1)
    with pytest.raises(CorruptFile, match="ant/00.png has more than 1,599 pixels.*MAX_IMAGE_PIXELS"): load_dataset(flat)
    pixels = b"P5 20000 20000 255\n" # says that 400 million follow
    (flat / "ant" / "00.png").write_bytes(pixels)
    monkeypatch.undo()
    with pytest.raises(CorruptFile, match="ant/00.png has more than 89,478,485 pixels"): load_dataset(flat)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path), lambda path: path.symlink_to("gone")])
def test_what_is_named_like_a_picture_and_is_no_file(flat, make):
    make(flat / "bee" / "x.png")
    with pytest.raises(CorruptFile, match="bee/x.png is named like an image, but is no file"): load_dataset(flat)


@pytest.mark.parametrize("name", ["more", "x.png"])
def test_folders_within_classes_are_said(flat, name):
    (flat / "bee" / name).mkdir()
    with pytest.raises(ValueError, match=f"bee holds the folders {name}, whose images would not be read"):
        load_dataset(flat)


def test_folders_beside_the_splits_are_said(ready):
    (ready / "validation").mkdir()
    with pytest.warns(UserWarning, match="validation left out; only train, test and valid"): load_dataset(ready)


@pytest.mark.parametrize("name", ["a|b", "a\nb", " "])
def test_names_of_classes_are_checked_when_they_come_in(flat, name):
    (flat / "ant").rename(flat / name)
    with pytest.raises(ValueError, match="cannot be the name of a class.*rename"): load_dataset(flat)
    with pytest.raises(ValueError, match="cannot be the name of a class.*rename"):
        stream_folder(flat, 8, [0.5] * 3, [0.5] * 3)


def test_layouts_that_are_refused(flat, ready, tmp_path):
    with pytest.raises(MissingDataset, match="no folder .*nowhere.*CLASS"): load_dataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs root="): load_dataset("folder")
    with pytest.raises(ValueError, match="leave out root="): load_dataset(flat, root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds the folders none"): load_dataset(tmp_path / "empty")
    (flat / "cow").mkdir()
    with pytest.raises(ValueError, match="no image in .*cow"): load_dataset(flat)
    write_images(ready / "test" / "cow", 1, 0)
    with pytest.raises(ValueError, match="test has the classes ant, bee, cow, expected ant, bee"): load_dataset(ready)
    (ready / "test").rename(ready / "exam")
    with pytest.raises(ValueError, match="holds the folders exam, train.*test/CLASS"): load_dataset(ready)
    (ready / "exam").rename(ready / "test")
    for file in (ready / "train" / "bee").iterdir(): file.unlink()
    (ready / "train" / "bee").rmdir()
    with pytest.raises(ValueError, match="expected ant$"): load_dataset(ready)


def test_a_class_too_small_to_split(flat):
    for file in list((flat / "bee").iterdir())[1:]: file.unlink()
    with pytest.raises(ValueError, match=r"class 'bee' has 1 image\(s\), too few"): load_dataset(flat)


# Arguments


@pytest.mark.parametrize("arguments, words", [
    ({"name": "cifar"}, "Did you mean 'cifar10'.*digits, cifar10, cifar100, svhn, folder"),
    ({"name": "digits", "extra": True}, "no option of digits 'extra'.*There is: flip, crop_padding"),
    ({"name": "svhn", "extras": True}, "Did you mean 'extra'"),
    ({"image_size": 0}, "image_size must be a whole number of at least 1"),
    ({"image_size": 16.0}, "image_size"), ({"crop_padding": -1}, "crop_padding must be a whole number of at least 0"),
    ({"valid": 1.0}, "below 1"), ({"device": "gpu"}, "no device 'gpu'")])
def test_arguments_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words): load_dataset(**arguments)


def test_the_list():
    assert {"digits", "cifar10", "cifar100", "svhn", "folder"} <= set(list_datasets())


def test_digits_need_no_torchvision():
    "Nothing heavy comes with the import either."
    code = """
import sys
sys.modules.update(dict.fromkeys(["torchvision", "fastcore", "fvcore", "papermill", "nbdev", "matplotlib"]))
import modnb.data, modnb.models
assert "sklearn" not in sys.modules
print(len(modnb.data.load_dataset("digits", device="cpu").train))
try: modnb.data.load_dataset("cifar10")
except ImportError as error: print(error)"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("1437\ntorchvision is not installed"), done.stderr


# As a network was trained


@pytest.fixture
def pictures(tmp_path):
    "Two classes of pictures that are not square"
    chance = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number, shape in enumerate([(40, 61), (57, 33), (48, 48), (33, 90)]):
            pixels = chance.integers(256, size=(*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_are_prepared_as_torchvision_does(pictures, interpolation):
    datasets = import_torchvision().datasets
    from torchvision import transforms
    method = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([transforms.Resize(31, method), transforms.CenterCrop(28), transforms.ToTensor(),
                                 transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    expected = torch.stack([image for image, _ in datasets.ImageFolder(str(pictures), theirs)])
    numbers = {"resize": 31, "crop": 28, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
               "interpolation": interpolation}
    for options in ({"transform": theirs}, numbers):
        data = load_dataset(pictures, device="cpu", test=0.25, **options)
        order = torch.cat([data.train.labels * 10, data.test.labels * 10]).argsort(stable=True)
        found = torch.cat([next(batches(split))[0] for split in (data.train, data.test)])[order]
        sums = [sorted(images.sum((1, 2, 3)).tolist()) for images in (found, expected)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-4)
        assert data.test.preparation()["resize"] == 31 and data.test.mean == (0.485, 0.456, 0.406)
    for workers in (0, 1):
        stream = stream_folder(pictures, **numbers, batch_size=3, workers=workers)
        streamed = torch.cat([images for images, _ in stream])
        torch.testing.assert_close(streamed, expected)


def test_transforms_of_torchvision_and_timm_are_read():
    weights = import_torchvision().models.get_model_weights("efficientnet_b0").DEFAULT
    found = read_transform(weights.transforms())
    assert (found["resize"], found["crop"], found["interpolation"]) == (256, 224, "bicubic")
    timm_data = pytest.importorskip("timm.data")
    found = read_transform(timm_data.create_transform((3, 192, 192), crop_pct=0.75, mean=(0.1, 0.2, 0.3)))
    assert (found["resize"], found["crop"]) == (256, 192) and found["mean"] == pytest.approx((0.1, 0.2, 0.3))


def test_preparation_is_said_once_and_whole(pictures):
    from torchvision import transforms
    for options, words in [({"resize": 40}, "resize needs crop"), ({"resize": 20, "crop": 28}, "at least 28"),
                           ({"mean": [0.5] * 3}, "mean alone"), ({"crop": 20, "image_size": 24}, "the same thing"),
                           ({"mean": [0.5], "std": [1]}, "3 channels, but there are 1"),
                           ({"transform": transforms.Resize((30, 30))}, "do not know how to do Resize"),
                           ({"transform": transforms.CenterCrop(30), "crop": 30}, "crop is said by transform"),
                           ({"interpolation": "cubic"}, "no interpolation 'cubic'")]:
        with pytest.raises(ValueError, match=words): load_dataset(pictures, device="cpu", **options)
    with pytest.raises(ValueError, match="no option of digits 'resize'"): load_dataset("digits", resize=20, crop=16)
