"""The page to click on: what it holds is what the library measured, and its script reads it rightly."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from io import BytesIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import nn

from modnb.compose import compose
from modnb.data import Split
from modnb.lab.explorer import ANSWERS, PAGE, class_bits, explorer, explorer_data, picture
from modnb.masks import ModuleMasks
from modnb.metrics import count_flops
from modnb.subtasks import all_subtasks
from modnb.training import evaluate
from modnb.walk import evaluate_subtasks

CLASSES = ["a<b", "b", "c", "d"]


@pytest.fixture(scope="module")
def network():
    "A small network with random weights and masks, images, and its rows but the last one"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(),
                              nn.Linear(5 * 16, 4)).eval()
        masks = ModuleMasks({"1": torch.rand(4, 6) < 0.5, "3": torch.rand(4, 5) < 0.5}, CLASSES)
        for mask in masks.masks.values(): mask[:, 0] = True
        images = torch.randint(256, (40, 3, 8, 8)).byte()
    split = Split(images, torch.arange(40) % 4, CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)
    return model, masks, split, evaluate_subtasks(model, masks, split, all_subtasks(CLASSES))[:-1]


@pytest.fixture(scope="module")
def page(network):
    model, masks, split, rows = network
    weights, flops = sum(p.numel() for p in model.parameters()), count_flops(model, split.images[:1].float())
    return explorer(masks, rows, weights, flops, pictures=split.images[:4], chosen=["b", "d"])


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_what_composing_gives(network, page):
    model, masks, split, rows = network
    data = embedded(page)
    assert data["classes"] == CLASSES and data["chosen"] == 0b1010 and len(data["rows"]) == len(rows) == 10
    for row in rows:
        columns = [CLASSES.index(name) for name in row["classes"]]
        small, part = compose(model, masks, columns, split.images[:1].float()), split.subtask(columns)
        weights, flops, right, right_whole, images = data["rows"][str(class_bits(columns))]
        assert weights == sum(p.numel() for p in small.parameters())
        assert flops == count_flops(small, split.images[:1].float())
        assert images == len(part)
        assert right == round(evaluate(small, part) * images)
        assert right_whole == round(evaluate(model, part, columns=columns) * images)


def test_units_are_the_masks_in_another_order(network, page):
    masks = network[1]
    for layer, (site, mask) in zip(embedded(page)["layers"], masks.masks.items(), strict=True):
        assert layer["name"] == site
        assert sorted(layer["units"]) == sorted(class_bits(column.nonzero().flatten().tolist()) for column in mask.T)
        many = [unit.bit_count() for unit in layer["units"]]
        assert many == sorted(many, reverse=True)


def test_pictures_are_those_of_the_classes(network, page):
    from matplotlib.image import imread

    for address, image in zip(embedded(page)["pictures"], network[2].images[:4], strict=True):
        read = torch.tensor(imread(BytesIO(b64decode(address.partition(",")[2]))))
        assert torch.equal((read.permute(2, 0, 1) * 255).round().byte(), image)


def test_the_page_needs_nothing_from_elsewhere(page):
    assert "http" not in page and "import" not in ANSWERS + PAGE
    assert page.count("</script>") == 2, "a class name with < in it must not end the script"


@given(some.integers(1, 6), some.integers(1, 9), some.randoms())
def test_pictures_of_any_size(height, width, random):
    from matplotlib.image import imread

    image = torch.tensor([random.randrange(256) for _ in range(3 * height * width)]).byte().view(3, height, width)
    read = torch.tensor(imread(BytesIO(b64decode(picture(image).partition(",")[2]))))
    assert torch.equal((read.permute(2, 0, 1) * 255).round().byte(), image)


def test_what_does_not_fit_is_refused(network):
    _, masks, split, rows = network
    with pytest.raises(ValueError, match="flops_mode"): explorer_data(masks, [rows[0] | {"composed_flops": None}], 1, 1)
    with pytest.raises(ValueError, match="'e'"): explorer(masks, rows, 100, 100, chosen=["e"])
    with pytest.raises(ValueError, match="3 pictures for 4"): explorer(masks, rows, 100, 100, split.images[:3])
    wide = ModuleMasks({"1": torch.ones(31, 2).bool()}, [str(c) for c in range(31)])
    with pytest.raises(ValueError, match="at most 30"): explorer_data(wide, [], 1, 1)


def in_node(expression: str, data: dict) -> list:
    "The value of an expression of the script's functions, for every set of classes"
    if not (node := shutil.which("node")): pytest.skip("there is no node to run the script with")
    program = f"{ANSWERS}\nconst data = {json.dumps(data)}\nconst out = []\n" \
        f"for (let bits = 0; bits < {2 ** len(data['classes'])}; bits++) out.push({expression})\n" \
        "console.log(JSON.stringify(out))"
    return json.loads(subprocess.run([node, "-e", program], capture_output=True, text=True, check=True).stdout)


def test_the_script_counts_keepers(network, page):
    data, masks = embedded(page), network[1]
    for bits, layers in enumerate(in_node("keepers(data, bits)", data)):
        columns = [c for c in range(4) if bits >> c & 1]
        for counts, mask in zip(layers, masks.masks.values(), strict=True):
            assert sorted(counts) == sorted(mask[columns].sum(0).tolist())
            assert sum(n > 0 for n in counts) == mask[columns].any(0).sum()


def test_the_script_reads_the_rows(network, page):
    data, rows = embedded(page), {class_bits(map(CLASSES.index, row["classes"])): row for row in network[3]}
    total = data["whole"][0]
    for bits, said in enumerate(in_node("answer(data, bits)", data)):
        if bits.bit_count() < 2: assert "meters" not in said and re.search("Pick two|pick another", said["text"])
        elif bits not in rows: assert bits == 0b1111 and "was not evaluated" in said["text"] and "meters" not in said
        else:
            row = rows[bits]
            names, fractions, texts = zip(*said["meters"], strict=True)
            assert names == ("weights", "multiply-adds", "right, composed", "right, whole")
            found = [row[key] for key in ("composed_size", "composed_flops", "composed_accuracy", "accuracy")]
            assert fractions == pytest.approx(found, abs=1e-9)
            assert texts[0] == f"{data['rows'][str(bits)][0]:,} of {total:,}, {100 * row['composed_size']:.1f} %"
            assert f"A network for {', '.join(row['classes'])} keeps" in said["text"]


def test_the_script_writes_large_numbers_readably(page):
    assert in_node("grouped([7, 999, 1000, 120114, 15472640][bits] ?? 0)", embedded(page))[:5] == [
        "7", "999", "1,000", "120,114", "15,472,640"]
