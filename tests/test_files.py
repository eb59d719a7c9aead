"Files prove themselves: every damage and every invented header ends in one error, and reading has no side effects."
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modnb.checkpoints import History, read_checkpoint, write_checkpoint
from modnb.cnnsplitter.patch import load_patched
from modnb.cnnsplitter.search import State, read_state, write_state
from modnb.compose import ParallelModules, compose, load_module, save_module
from modnb.data import Split
from modnb.files import FORMAT, UnreadableFile, load_tensors, save_tensors
from modnb.lab.trained import load_trained, save_trained
from modnb.masks import ModuleMasks, threshold_masks
from modnb.metrics import accuracy, other_accuracy, precision_recall
from modnb.moda.decompose import decompose
from modnb.models import create_model
from modnb.prediction import evaluate
from modnb.similarity import AVERAGES, cosine_losses, mean_cosines
from modnb.walk import Answers

NAMES = [str(c) for c in range(4)]
KNOBS = {"dataset": "digits", "root": "", "image_size": 16, "valid": 0, "flip": False, "train_limit": 8,
         "test_limit": 8}
EXAMPLE = torch.zeros(1, 3, 16, 16)


def network(): return create_model("vgg12", num_classes=4, width=0.0625, seed=0).eval()


def masks_of(model):
    split = Split(torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
                  torch.arange(16) % 4, NAMES, (0.5,) * 3, (0.25,) * 3)
    return decompose(model, split, keep_threshold=0.5), split


@pytest.fixture(scope="module")
def parts():
    model = network()
    masks, split = masks_of(model)
    return model, masks, split


def module_file(parts, path):
    save_module(compose(parts[0], parts[1], ["1", "3"], EXAMPLE), path)
    return path, load_module


def beside_file(parts, path):
    save_module(ParallelModules([compose(parts[0], parts[1], [name], EXAMPLE) for name in ("0", "2")]), path)
    return path, load_module


def masks_file(parts, path):
    parts[1].save(path)
    return path, ModuleMasks.load


def checkpoint_file(parts, path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    write_checkpoint(path, {"lr": 0.1}, History([{"epoch": 1, "loss": 0.5}]), model, optimizer, model.state_dict())
    return path, read_checkpoint


def search_file(parts, path):
    state = State(torch.rand(2, 3, 4) > 0.5, torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 4) > 0.5,
                  history=[{"fitness": 0.5}], generation=1)
    write_state(path, {"seed": 1}, state, torch.Generator())
    return path, lambda path: read_state(path, {"seed": 1}, torch.Generator(), torch.device("cpu"))


def answers_file(parts, path):
    answers = Answers(path, {"seed": 1}, (3, 2), torch.device("cpu"))
    answers.add(0, 0, torch.tensor(3), torch.tensor(4))
    answers.save()
    return path, lambda path: Answers(path, {"seed": 1}, (3, 2), torch.device("cpu"))


def trained_file(parts, path):
    path = save_trained(path, parts[0], NAMES, KNOBS, {"system": "plain"})
    return path, lambda path: load_trained(path.parent)


def patched_file(parts, path):
    save_tensors(path, {"low": torch.zeros(1), "high": torch.ones(1), "weak/weight": torch.ones(4)}, "patched network",
                 {"weak": parts[0].config, "module": {}, "classes": NAMES, "targets": [1], "clip": True})
    return path, load_patched


FILES = {made.__name__.removesuffix("_file"): made for made in (module_file, beside_file, masks_file, checkpoint_file,
         search_file, answers_file, trained_file, patched_file)}


@pytest.fixture(params=FILES)
def written(request, parts, tmp_path): return FILES[request.param](parts, tmp_path / "file.safetensors")


def test_a_flipped_bit_is_an_error_that_names_the_file(written):
    (path, read), chance = written, random.Random(0)
    good = path.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little") # of the header
    places = [*chance.sample(range(8 * size), 100), *(chance.randrange(8 * size, 8 * len(good)) for _ in range(100))]
    for place in places:
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ValueError) as error: read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_same_content_gives_the_same_bytes(parts, tmp_path):
    tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(40)}
    save_tensors(tmp_path / "a", tensors, "masks", {"b": 1, "a": [1.5, "é"]})
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), "masks", {"b": 1, "a": [1.5, "é"]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name in "cd": parts[1].save(tmp_path / name)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()
    ModuleMasks.load(tmp_path / "c").save(tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == (tmp_path / "c").read_bytes()


def pieces(path):
    with safe_open(path, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()["modnb"])


def test_files_from_before_there_was_a_format_are_read(parts, tmp_path):
    path, x = tmp_path / "m", torch.rand(2, 3, 16, 16)
    for make in (module_file, masks_file, checkpoint_file):
        make(parts, path)
        tensors, about = pieces(path)
        save_file(tensors, path, {"modnb": about["kind"], "header": json.dumps(about["header"])})
        found = make(parts, tmp_path / "now")[1](path)
        if make is masks_file: assert found == parts[1]
        if make is module_file: assert torch.equal(found(x), compose(parts[0], parts[1], ["1", "3"], EXAMPLE)(x))


def test_a_later_format_is_refused_with_the_way_out(parts, tmp_path):
    path = masks_file(parts, tmp_path / "m")[0]
    tensors, about = pieces(path)
    save_file(tensors, path, {"modnb": json.dumps(about | {"format": FORMAT + 98})})
    with pytest.raises(UnreadableFile, match="format 99.*upgrade"): ModuleMasks.load(path)


JUNK = [None, 7, -1, 2.5, "", "x", [], [7], [None], {}, {"x": 1}, True, [[1]], 10**30, {"name": 3}, ["1", "3"], [0, 1]]


def test_invented_headers_end_in_one_error(written):
    path, read = written
    tensors, about = pieces(path)
    header, survivors = about["header"], []
    def tried(changed, what, content=tensors):
        save_tensors(path, content, about["kind"], changed)
        try: read(path)
        except ValueError as error: assert str(path) in str(error) or str(path.parent) in str(error), (what, error)
        else: survivors.append(what)
    for field in header:
        tried({name: value for name, value in header.items() if name != field}, f"without {field}")
        for junk in JUNK:
            if junk != header[field]: tried(header | {field: junk}, (field, junk))
    if about["kind"] != "checkpoint": # which does not know its model; `load_weights` compares them
        for name in list(tensors)[:3]:
            tried(header, f"without tensor {name}", {n: t for n, t in tensors.items() if n != name})
    harmless = ("preparation", "network")
    survivors = [what for what in survivors if not isinstance(what, str) or what.split()[1] not in harmless]
    told = {"preparation": dict, "network": dict, "about": dict, "run": dict, "rows": list, "history": list,
            "outputs": list, "classes": list,
            "generation": int, "knobs": dict} # nothing in the file tells other values of these
    assert all(isinstance(what[1], (told.get(what[0], ()), type(None))) for what in survivors), survivors


def test_a_small_file_cannot_ask_for_a_giant_network(parts, tmp_path):
    path, _ = module_file(parts, tmp_path / "m")
    tensors, about = pieces(path)
    for change in ({"width": 2000.0}, {"width": 1e12}, {"num_classes": 10**11}, {"image_size": 10**6}, {"depth": 3}):
        architecture = about["header"]["architecture"] | change
        save_tensors(path, tensors, "module", about["header"] | {"architecture": architecture})
        with pytest.raises(UnreadableFile, match=str(path)): load_module(path)
    path, read = trained_file(parts, tmp_path)
    tensors, about = pieces(path)
    save_tensors(path, tensors, "model", about["header"] | {"model": about["header"]["model"] | {"width": 2000.0}})
    with pytest.raises(UnreadableFile, match="another architecture than it says"): read(path)


@pytest.mark.parametrize("spoil", [lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), lambda t: t.long()])
def test_weights_that_are_no_numbers_are_refused(parts, tmp_path, spoil):
    path, _ = module_file(parts, tmp_path / "m")
    tensors, about = pieces(path)
    name = next(name for name in tensors if name.endswith("weight"))
    save_tensors(path, tensors | {name: spoil(tensors[name])}, "module", about["header"])
    with pytest.raises(UnreadableFile, match=name.removeprefix("weight/")): load_module(path)


def test_loading_leaves_chance_and_threads_as_they_were(parts, tmp_path):
    for make in (module_file, beside_file):
        path, read = make(parts, tmp_path / "m")
        torch.manual_seed(3)
        before, threads = torch.get_rng_state(), torch.get_num_threads()
        module = read(path)
        assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))
        path.write_bytes(b"") # nothing of the module lives in the file
        assert module(torch.rand(2, 3, 16, 16)).isfinite().all()


def test_nothing_is_computed_from_what_is_no_number(parts):
    model, split = network(), parts[2]
    logits, labels = torch.full((3, 4), torch.nan), torch.zeros(3, dtype=torch.long)
    for look in (accuracy, lambda *a: precision_recall(*a, 0), lambda *a: other_accuracy(*a, 1)):
        with pytest.raises(ValueError, match="12 logits are not finite, the first is nan at"): look(logits, labels)
    next(p for p in model.parameters()).data[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"): evaluate(model, split)
    with pytest.raises(ValueError, match="the network is not sound: 'features.0.weight'|the network is not sound"):
        decompose(model, split)
    rates = torch.rand(4, 5)
    rates[2, 3] = torch.nan
    with pytest.raises(ValueError, match="at 'relu' the rate of unit 3 for class 2 is nan"):
        threshold_masks({"relu": rates}, NAMES)


@pytest.mark.parametrize("average", AVERAGES)
def test_cosines_of_huge_rows_are_right_and_of_nan_are_nan(average):
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.rand(8, 5, generator=generator), torch.arange(8) % 2
    expected = torch.stack(mean_cosines([rows, rows], labels, average))
    for factor in (1e15, 1e20, 1e37):
        torch.testing.assert_close(torch.stack(mean_cosines([rows * factor, rows], labels, average)), expected)
    for bad in (torch.nan, torch.inf, 3e38):
        spoilt = rows.clone()
        spoilt[0] = bad
        for cosines in (mean_cosines, cosine_losses):
            assert torch.stack(cosines([spoilt, rows], labels, average, num_classes=2)).isnan().all()


@pytest.mark.parametrize("label", [-1, -100, 4, 10**9])
def test_labels_outside_the_classes_are_refused(parts, label):
    split = parts[2]
    with pytest.raises(ValueError, match=f"labels must be positions in the 4 classes.*such as {label}"):
        Split(split.images, split.labels.index_fill(0, torch.tensor([5]), label), NAMES, split.mean, split.std)


def test_masks_of_some_classes_are_refused_unless_outputs_are_told(parts):
    model, _, split = parts
    some = decompose(model, split.subtask(["1", "3"]), keep_threshold=0.5)
    with pytest.raises(ValueError, match="say which output"): compose(model, some, ["1", "3"], EXAMPLE)
    told = compose(model, some, ["1", "3"], EXAMPLE, outputs=[1, 3])
    assert told.recipe["outputs"] == [1, 3]


def test_a_reader_says_what_a_file_holds(parts, tmp_path):
    path, _ = masks_file(parts, tmp_path / "m")
    with pytest.raises(UnreadableFile, match="holds masks, not module"): load_tensors(path, "module")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UnreadableFile, match="holds something else, not masks"): ModuleMasks.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=str(path)): ModuleMasks.load(path)
