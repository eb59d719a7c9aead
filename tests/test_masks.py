"Thresholds, unions and files of masks."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modnb.compat import import_torchvision
from modnb.extract import extract
from modnb.files import UnreadableFile, atomic_path, save_tensors
from modnb.masks import EMPTY_RULES, ModuleMasks, relaxed, threshold_masks
from modnb.units import unit_sites

NAMES = ["a", "b", "c"]
RATES = st.lists(st.lists(st.integers(0, 50), min_size=6, max_size=6), min_size=3, max_size=3).map(
    lambda rows: {"x": torch.tensor(rows).float() / 50, "y": torch.tensor(rows)[:, :4].float().flip(0) / 50})


@settings(deadline=None)
@given(RATES, st.sampled_from(["relax", "none"]))
def test_a_higher_threshold_never_keeps_more(rates, empty):
    kept = [sum(int(c.sum()) for c in threshold_masks(rates, NAMES, tau, empty).counts().values())
            for tau in [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]]
    assert kept == sorted(kept, reverse=True)


@settings(deadline=None)
@given(RATES, st.sampled_from(["relax", "top_share"]), st.floats(0.05, 1.0))
def test_filling_rules_leave_no_layer_empty(rates, empty, tau):
    masks = threshold_masks(rates, NAMES, tau, empty)
    assert all((counts > 0).all() for counts in masks.counts().values())


@settings(deadline=None)
@given(RATES, st.floats(0.05, 1.0))
def test_rules_agree_where_nothing_is_empty(rates, tau):
    plain = threshold_masks(rates, NAMES, tau, "none")
    if all((counts > 0).all() for counts in plain.counts().values()):
        assert all(threshold_masks(rates, NAMES, tau, rule) == plain for rule in EMPTY_RULES)


@settings(deadline=None)
@given(RATES, st.floats(0.05, 1.0))
def test_relaxing_equals_the_loop(rates, tau):
    "Step by step, as the released MwT does it"
    for site, r in rates.items():
        for c, row in enumerate(r.double()):
            threshold = tau
            while threshold > 0 and not (row >= threshold - 1e-6).any(): threshold -= 0.05
            found = threshold_masks({site: r}, NAMES, tau, "relax").masks[site][c]
            if threshold > 1e-6: assert torch.equal(found, (row >= threshold - 1e-6) & (row > 0))
            elif row.max() > 0: assert torch.equal(found, row == row.max())
            else: assert found.tolist() == [True] + [False] * (len(row) - 1)


def test_rates_equal_to_the_threshold_are_kept():
    for images in (10, 50, 130, 1000):
        rate = torch.tensor([[round(0.9 * images) / images]])  # float32: a little below or above 0.9
        assert threshold_masks({"x": rate}, ["a"], 0.9, "none").masks["x"].item()
    assert relaxed(torch.tensor([[0.85]]).double(), 0.9).item() == pytest.approx(0.85)


def test_top_share_sees_the_masks_of_earlier_classes():
    rates = torch.tensor([[0.5, 0.6, 0.7, 0.8], [0.95, 0.95, 0.95, 0.1], [0.1, 0.2, 0.3, 0.4]])
    kept = threshold_masks({"x": rates}, NAMES, 0.9, "top_share").masks["x"]
    assert kept.int().tolist() == [[0, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]]


@settings(deadline=None)
@given(RATES)
def test_unions(rates):
    masks = threshold_masks(rates, NAMES, 0.5)
    for site in masks.sites:
        both = masks.keep(["a", "b"])[site]
        assert torch.equal(both, masks.keep(["a"])[site] | masks.keep([1])[site])
        assert torch.equal(both, masks.keep(["b", "a"])[site])
        assert not (both & ~masks.keep()[site]).any()


def test_file_round_trip(tmp_path):
    masks = threshold_masks({"z.1": torch.rand(3, 7), "a.0": torch.rand(3, 2)}, NAMES, 0.5)
    masks.save(tmp_path / "m.safetensors")
    again = ModuleMasks.load(tmp_path / "m.safetensors")
    assert again == masks and list(again.sites) == ["z.1", "a.0"]  # in order of execution, not of the alphabet
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m").write_bytes(b"not masks")
    with pytest.raises(UnreadableFile, match="damaged"): ModuleMasks.load(tmp_path / "m")
    save_tensors(tmp_path / "c", {"w": torch.zeros(2)}, "checkpoint", {})
    with pytest.raises(UnreadableFile, match="holds checkpoint, not masks"): ModuleMasks.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError): ModuleMasks.load(tmp_path / "nowhere")


def test_a_failing_write_leaves_the_old_file(tmp_path):
    masks = threshold_masks({"x": torch.rand(3, 7)}, NAMES, 0.5)
    masks.save(tmp_path / "m")
    with pytest.raises(OSError), atomic_path(tmp_path / "m") as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert ModuleMasks.load(tmp_path / "m") == masks
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_arguments():
    rates = {"x": torch.rand(3, 7)}
    for tau in (0, -0.1, 1.1, 90):
        with pytest.raises(ValueError, match="keep_threshold must lie in"): threshold_masks(rates, NAMES, tau)
    with pytest.raises(ValueError, match="unknown rule 'drop'"): threshold_masks(rates, NAMES, empty="drop")
    with pytest.raises(ValueError, match="masks of 'x' must be bool"): threshold_masks(rates, NAMES[:2])
    masks = threshold_masks(rates, NAMES)
    with pytest.raises(ValueError, match="'d'"): masks.keep(["d"])
    with pytest.raises(ValueError, match="no masks for"): masks.only(["y"])
    with pytest.raises(ValueError, match="at 'x' no unit reaches 1.0 for a, b, c"):
        threshold_masks({"x": torch.zeros(3, 2)}, NAMES, 1.0, "error")


def test_another_network_refuses_masks_and_old_files_load(tmp_path):
    models, image = import_torchvision().models, torch.zeros(1, 3, 64, 64)
    eighteen, deeper = models.resnet18(), models.resnet34()
    masks = ModuleMasks({s: torch.ones(1, k, dtype=torch.bool) for s, k in unit_sites(eighteen, image).items()}, ["a"])
    extract(deeper, masks.keep(), image)  # nothing is known of its network
    known = masks.of(eighteen)
    known.save(tmp_path / "new")
    masks.save(tmp_path / "old")
    for kept in (known, ModuleMasks.load(tmp_path / "new"), known.only(["relu"])):
        extract(eighteen, kept.keep(), image)
        extract(nn.DataParallel(eighteen), kept.keep(), image)
        told = r"another network.*'layer1.2.conv1.weight' does not exist, here it has shape \[64"
        with pytest.raises(ValueError, match=told):
            extract(deeper, kept.keep(), image)
    assert ModuleMasks.load(tmp_path / "old").network is None and ModuleMasks.load(tmp_path / "old") == known
    with pytest.raises(ValueError, match="'fc.weight' has shape"):
        extract(models.resnet18(num_classes=5), known.keep(), image)
