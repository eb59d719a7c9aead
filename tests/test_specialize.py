"One call: what is chosen, by which images, what is proved, files that load alone, every refusal."

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modnb.cnnsplitter.search import search
from modnb.data import Split, Stream, batches, load_dataset
from modnb.extract import masked
from modnb.lab.commands import main
from modnb.lab.networks import open_network, read_weights
from modnb.models import create_model
from modnb.prediction import evaluate
from modnb.specialize import WAYS, Candidate, load_specialized, pick, specialize, verify
from modnb.training import fit


@pytest.fixture(scope="module")
def trained():
    "A network that knows digits, and the images"
    data = load_dataset("digits", valid=0.2, device="cpu")
    model = create_model("lenet5", width=1.0, image_size=16, seed=0)
    fit(model, data, epochs=6, batch_size=64, lr=0.05, schedule="onecycle", device="cpu", evaluate_every=0)
    return model.eval(), data


fraction = st.floats(0, 1)
candidates = st.lists(st.builds(Candidate, st.just("x"), fraction, fraction, fraction), min_size=1, max_size=8)


@given(candidates, fraction, st.none() | st.floats(0, 0.5), st.none() | st.floats(0.05, 1))
def test_the_choice_is_the_best_that_fits_or_the_nearest(tried, whole, max_loss, size):
    found, reached = pick(tried, whole, max_loss, size)
    fits = [c for c in tried if (max_loss is None or whole - c.accuracy <= max_loss + 1e-9)
            and (size is None or c.size <= size)]
    assert reached == bool(fits) and found in tried
    if not fits: return
    assert found in fits
    if size is None: assert found.size == min(c.size for c in fits)
    else: assert found.accuracy == max(c.accuracy for c in fits)


def test_a_smaller_network_within_the_loss_in_the_order_asked_for(trained):
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    made = specialize(model, data, ["8", "1", "4"], max_loss=0.02)
    assert made.network.classes == ["8", "1", "4"] and made.report["reached"]
    assert made.report["valid"]["whole"] - made.report["valid"]["small"] <= 0.02 + 1e-9
    assert made.report["small"]["weights"] < made.report["whole"]["weights"]
    part = data.test.subtask(["1", "4", "8"])
    assert made.report["test"] == {"images": len(part), "whole": evaluate(model, part, data.classes),
                                   "small": evaluate(made.network, part)}
    assert evaluate(made.network, part) > 0.85, "asked in an order of its own, it still knows which is which"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(made.report)) == made.report


def test_calibrated_outputs_are_a_line_of_the_silenced_network(trained):
    model, data = trained
    made, plain = (specialize(model, data, ["8", "1", "4"], size=0.3, calibrated=each) for each in (True, False))
    assert made.report["calibrated"] and "outputs calibrated" in repr(made) and not plain.report["calibrated"]
    assert made.report["accuracy"] > plain.report["accuracy"], "this is what calibration is for"
    assert specialize(model, data, ["8", "1", "4"], max_loss=1.0).report["size"] <= made.report["size"]
    x = data.example(40)
    with torch.no_grad(): own, said = masked(model, made.network.keep, x)(x)[:, [8, 1, 4]], made.network(x)
    for silenced, output in zip(own.T.double(), said.T.double()):
        apart = silenced - silenced.mean()
        scale = (apart * output).sum() / apart.square().sum()
        torch.testing.assert_close(output - output.mean(), scale * apart, rtol=1e-3, atol=1e-3)


def test_units_that_are_no_images_stay_whole(trained):
    "Such as those of a small network that makes a table of positions, which all images share"
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.own = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 16)), trained[0]
            self.register_buffer("at", torch.rand(10, 2))

        def forward(self, x): return self.own(x) + self.place(self.at).sum()

    model, data = Placed().eval(), trained[1]
    made = specialize(model, data, ["8", "1", "4"], max_loss=0.02)
    assert made.report["small"]["weights"] < made.report["whole"]["weights"] and made.report["difference"] < 1e-4
    assert "place.1" not in made.network.keep and len(made.network.keep) > 1


def test_a_search_is_judged_by_training_images_alone(trained, monkeypatch):
    model, data = trained
    seen = []
    def watched(network, split, *rest, **options):
        seen.append(split)
        return search(network, split, *rest, **options)
    monkeypatch.setattr("modnb.specialize.search", watched)
    monkeypatch.setattr("modnb.specialize.GENERATIONS", 1)
    monkeypatch.setitem(WAYS, "search", (0.8, 0.6))
    made = specialize(model, data, ["8", "1", "4"], max_loss=0.5, ways=["search"])
    known = {image.numpy().tobytes() for image in data.train.images}
    assert [split.classes for split in seen] == [["1", "4", "8"]] * 2
    assert all(image.numpy().tobytes() in known for split in seen for image in split.images)
    assert made.report["way"] == "search" and made.network.classes == ["8", "1", "4"] and made.report["size"] < 0.9
    assert made.report["test"]["small"] > 0.5 and made.report["difference"] < 1e-4


def test_where_nothing_can_be_searched(trained):
    model, data = trained
    loaders = {name: Stream(list(batches(getattr(data, name), 100)), data.classes) for name in ("train", "valid")}
    with pytest.raises(ValueError, match="take 'search' off ways"):
        specialize(model, loaders, ["1", "7"], ways=["search"])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(data.example()[0].numel(), 10))
    with pytest.raises(ValueError, match="no convolution .* take 'search' off ways"), warnings.catch_warnings():
        warnings.simplefilter("ignore") # that it guesses
        specialize(flat, data, ["1", "7"], ways=["search"])


def test_test_images_take_no_part_in_the_choice(trained):
    model, data = trained
    other = replace(data, test=replace(data.test, labels=data.test.labels.flip(0)))
    found = [specialize(model, each, ["1", "7"], ways=["activity"]).report for each in (data, other)]
    assert found[0]["test"] != found[1]["test"]
    for name in ("way", "level", "accuracy", "size"): assert found[0][name] == found[1][name]


def test_outputs_are_found_by_name(trained):
    "Images of two classes for a network with ten outputs"
    model, data = trained
    pair = data.subtask(["3", "7"])
    with pytest.raises(ValueError, match="10 outputs for the 2 classes"): specialize(model, pair, ["7", "3"])
    made = specialize(model, pair, ["7", "3"], outputs={"3": 3, "7": 7}, max_loss=0.02)
    assert made.report["test"]["whole"] > 0.9
    made = specialize(model, pair, ["7", "3"], outputs=data.classes, max_loss=0.02, ways=["activity"])
    assert evaluate(made.network, pair.test) > 0.85


def test_loaders_do_as_splits_do(trained):
    model, data = trained
    loader = lambda split: Stream(list(batches(split, 100)), split.classes, split.preparation())
    splits = {"train": data.train, "valid": data.valid, "test": data.test}
    made = [specialize(model, each, ["1", "7"], max_loss=0.01, ways=["activity"], calibrated=False)
            for each in (splits, {name: loader(split) for name, split in splits.items()})]
    for name in ("way", "level", "valid", "test"): assert made[0].report[name] == made[1].report[name]
    assert made[0].network.preparation == made[1].network.preparation == data.train.preparation()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_of_numbers(trained, dtype):
    model, data = copy.deepcopy(trained[0]).to(dtype), trained[1]
    made = specialize(model, data, ["1", "7"], max_loss=0.02)
    assert next(made.network.parameters()).dtype == dtype and made.report["test"]["small"] > 0.9


def test_files_load_without_the_class(trained, tmp_path):
    _, data = trained
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU())
            self.head = nn.Linear(12, 10)

        def forward(self, x): return self.head(self.body(x).amax((2, 3)))

    model = Own()
    fit(model, data, epochs=1, batch_size=64, lr=0.05, device="cpu", evaluate_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # it has learned little
        made = specialize(model, data, ["9", "0"], size=0.7)
    files = made.save(tmp_path / "out")
    assert {"README.md", "config.json", "model.pt2", "model.safetensors"} <= set(files)
    again = load_specialized(tmp_path / "out")
    assert again.classes == ["9", "0"] and again.preparation == data.train.preparation()
    for count in (1, 5):
        x = data.example(count)
        torch.testing.assert_close(again(x), made.network(x), rtol=1e-4, atol=1e-5)
    assert evaluate(again, data.test.subtask([0, 9])) == made.report["test"]["small"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["classes"] == ["9", "0"] and config["report"] == made.report
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n") and "pipeline_tag: image-classification" in card and "9, 0" in card
    with pytest.raises(FileNotFoundError, match="Specialized.save writes it"): load_specialized(tmp_path)
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no exported program"): load_specialized(tmp_path)


def test_what_cannot_be_reached_is_named(trained):
    model, data = trained
    with pytest.warns(UserWarning, match="the nearest loses"):
        made = specialize(model, data, ["1", "7"], max_loss=0.0, size=0.001, ways=["activity"])
    assert not made.report["reached"] and "NOT reached" in repr(made)


def test_a_wrong_preparation_is_noticed(trained):
    model, data = trained
    wrong = data.map(lambda split: replace(split, mean=(9.0,) * 3))
    with pytest.warns(UserWarning, match="Are the images normalised as it was trained"):
        specialize(model, wrong, data.classes, ways=["activity"])


@pytest.mark.parametrize("classes, options, words", [
    (["1", "seven"], {}, "no class 'seven'"), (["1"], {}, "at least two classes"), ([], {}, "no class chosen"),
    (["1", "1"], {}, "more than once"), (["1", "7"], {"size": 30}, "size must be"),
    (["1", "7"], {"max_loss": -1}, "max_loss must be"), (["1", "7"], {"ways": ["magic"]}, "no way to choose units"),
    (["1", "7"], {"outputs": [1, 2]}, "2 outputs for the 10 classes"),
    (["1", "7"], {"outputs": {"1": 1}}, "no output for the class '0'")])
def test_wrong_arguments(trained, classes, options, words):
    with pytest.raises(ValueError, match=words): specialize(*trained, classes, **options)


def test_wrong_data(trained):
    model, data = trained
    empty = replace(data, valid=data.valid.select([]))
    grey = Split(data.train.images[:, :1], data.train.labels, data.classes, (0.5,), (0.5,))
    train, valid = data.train, data.valid
    for wrong, words in [(train, "not Split"), (empty, "no valid images"), ({"train": train}, "no valid images"),
                         ({"train": train, "valid": valid, "tset": data.test}, "Did you mean 'test'"),
                         ({"train": train, "valid": valid.subtask([1, 7])}, "the valid images have the classes"),
                         ({"train": train.select(train.labels != 7), "valid": valid}, "no images of 7"),
                         ({"train": grey, "valid": grey}, "expected input.* to have 3 channels")]:
        with pytest.raises(ValueError, match=words): specialize(model, wrong, ["1", "7"])


def test_the_proof_refuses_a_wrong_network(trained):
    model, data = trained
    small = specialize(model, data, ["1", "7"], ways=["activity"], calibrated=False).network
    assert verify(model, small, data.example()) < 1e-4
    with torch.no_grad(): next(small.parameters()).mul_(1.5)
    with pytest.raises(ArithmeticError, match="more than rounding"): verify(model, small, data.example())
    with torch.no_grad(): next(small.parameters()).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="more than rounding"): verify(model, small, data.example())


# From a shell


def test_weights_are_read_without_running_code(tmp_path):
    from safetensors.torch import save_file

    state = {"fc.weight": torch.zeros(2, 4), "fc.bias": torch.zeros(2)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"): assert read_weights(tmp_path / name).keys() == state.keys()
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    refused = {"whole.pt": "save model.state_dict", "list.pt": "no tensors by name", "text.pt": "cannot be read"}
    for name, words in refused.items():
        with pytest.raises(ValueError, match=words): read_weights(tmp_path / name)
    with pytest.raises(FileNotFoundError): read_weights(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="another network"):
        open_network("torchvision:squeezenet1_1", tmp_path / "a.pt")


@pytest.mark.parametrize("words, message", [
    ("inspect keras:resnet18", "no source of networks"), ("inspect torchvision:resnet19", "Did you mean"),
    ("specialize torchvision:resnet18 nowhere --weights none.pt --classes a,b --to out", "no file of weights")])
def test_wrong_commands(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_inspect(capsys):
    assert main("inspect torchvision:squeezenet1_1 --num-classes 3 --image-size 64".split()) == 0
    said = capsys.readouterr().out
    assert "kept whole: nothing" in said and "weights" in said
