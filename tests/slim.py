"""What `pip install modnb` brings without extras, and what it weighs: `make slim`, or `python tests/slim.py --help`.

A wheel of this checkout is installed into an environment of its own, far from the checkout, where a module that was
saved here is loaded, composed, specialised and exported, and where every part that is missing has to say what to do.
`tests/test_slim.py` does the same in this environment, with the modules of all extras taken away.

    python tests/slim.py                    # makes the environment, which takes minutes
    python tests/slim.py --python PATH      # one that is there, with the wheel in it
    python tests/slim.py --use FOLDER       # what is done in it

With `--tried FILE` all that is written is that it worked with the interpreter and the torch that are there."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modnb.cnnsplitter.importance import find_segments
from modnb.compat import MissingExtra
from modnb.compose import compose, load_module, save_module, save_onnx
from modnb.data import ImageData, Split, load_dataset
from modnb.lab.commands import main as command
from modnb.lab.results import read_rows
from modnb.lab.running import run_notebook
from modnb.masks import ModuleMasks
from modnb.moda.decompose import decompose
from modnb.models import create_model
from modnb.specialize import load_specialized, specialize
from modnb.training import fit

ROOT = Path(__file__).parents[1]
ALONE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} # of the checkout nothing
CLASSES = [str(c) for c in range(4)]
IMPORTS = ("modnb", "modnb.compose", "modnb.specialize")
MEASURE = """
import json, sys
from importlib.metadata import distributions
found = {}
for one in distributions():
    files = [one.locate_file(file) for file in one.files or []]
    found[one.metadata["Name"].lower()] = sum(file.stat().st_size for file in files if file.is_file())
for tool in ("pip", "setuptools", "wheel"): found.pop(tool, None)
print(json.dumps(found))"""
VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")}))"""
IMPORT = "import torch, time; start = time.process_time(); import {}; print(time.process_time() - start)"


def pictures() -> ImageData:
    "Noise around a shade for each class."
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % len(CLASSES)
    images = (torch.randint(80, [48, 3, 16, 16], generator=generator) + 40 * labels.view(-1, 1, 1, 1)).byte()
    splits = [Split(images[at::3], labels[at::3], CLASSES, (0.5,) * 3, (0.25,) * 3) for at in range(3)]
    return ImageData("shades", CLASSES, *splits)


def network() -> torch.nn.Module: return create_model("vgg12", num_classes=4, width=0.0625, seed=0).eval()


# Here: what somebody else saved. There: what is done with it


def save(folder: Path) -> None:
    model, images = network(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = decompose(model, pictures().train, keep_threshold=0.5)
    masks.save(folder / "masks.safetensors")
    module = compose(model, masks, ["3", "1"], images)
    save_module(module, folder / "module.safetensors")
    save_file({"images": images, "logits": module(images).detach()}, folder / "expected.safetensors")


def use(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    images, close = expected["images"], lambda found: torch.testing.assert_close(found.detach(), expected["logits"])
    module = load_module(folder / "module.safetensors")
    close(module(images))
    close(compose(network(), ModuleMasks.load(folder / "masks.safetensors"), ["3", "1"], images)(images))
    torch.export.save(torch.export.export(module, (images,)), folder / "module.pt2")
    close(torch.export.load(folder / "module.pt2").module()(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # that it knows nothing, since it was not trained
        small = specialize(network(), pictures(), ["0", "2"], max_loss=1.0)
    small.save(folder / "small")
    torch.testing.assert_close(load_specialized(folder / "small")(images), small.network(images))
    history = fit(network(), pictures(), epochs=3, batch_size=4, device="cpu", precision="float32")
    assert history.rows[-1]["loss"] < history.rows[0]["loss"], history.rows


def parts(folder: Path) -> Iterator[tuple[str, Callable]]: # extra, what needs it
    (folder / "a.ipynb").write_text(json.dumps({"cells": [
        {"cell_type": "code", "source": "x = 1", "metadata": {"tags": ["parameters"]}}]}))
    (folder / "rows.csv").write_text("")
    yield "data", lambda: load_dataset("digits", device="cpu")
    yield "data", lambda: load_dataset("cifar10", root=folder)
    yield "data", lambda: create_model("vit_small", image_size=16)
    yield "data", lambda: find_segments(network(), torch.zeros(1, 3, 16, 16))
    yield "onnx", lambda: save_onnx(network(), torch.zeros(1, 3, 16, 16), folder / "x.onnx")
    yield "lab", lambda: read_rows(folder / "rows.csv")
    yield "lab", lambda: run_notebook(folder / "a.ipynb", folder / "b.ipynb")


def refuse(folder: Path) -> None:
    for extra, call in parts(folder):
        try: call()
        except MissingExtra as error: assert f"pip install 'modnb[{extra}]'" in str(error), error
        else: raise AssertionError(f"a part of {extra} worked without it")
    assert command(["inspect", "torchvision:resnet18"]) == 2


# The environment, and what it weighs


def install(folder: Path) -> str: # its interpreter
    run = lambda *words: subprocess.run(list(map(str, words)), check=True)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT)
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv/bin/python"
    same = f"torch=={torch.__version__.partition('+')[0]}"
    run(python, "-m", "pip", "install", "--quiet", *folder.glob("modnb*.whl"), same)
    return str(python)


def measure(python: str) -> dict: # distributions, megabytes, seconds of imports
    how = {"check": True, "capture_output": True, "text": True, "cwd": "/", "env": ALONE}
    ask = lambda code: subprocess.run([python, "-c", code], **how).stdout
    sizes = json.loads(ask(MEASURE))
    fastest = {name: min(float(ask(IMPORT.format(name))) for _ in range(3)) for name in IMPORTS}
    return {"distributions": len(sizes), "megabytes": round(sum(sizes.values()) / 1e6),
            "besides torch": round(sum(size for name, size in sizes.items() if name != "torch") / 1e6),
            "names": sorted(sizes), "import seconds": {name: round(value, 3) for name, value in fastest.items()}}


def tell(path: Path, python: str, error: str) -> None: # of versions that were tried, once each
    tried = json.loads(path.read_text()) if path.exists() else []
    now = json.loads(subprocess.check_output([python, "-c", VERSIONS], text=True, cwd="/", env=ALONE))
    tried = [one for one in tried if any(one[name] != now[name] for name in ("python", "torch"))]
    path.write_text(json.dumps([*tried, now | {"error": error}], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Install without extras, use it, and say what it weighs.")
    parser.add_argument("--python", help="interpreter of an environment that has the wheel (a new one is made)")
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help="write what was measured there, as JSON")
    parser.add_argument("--tried", type=Path, help="add the versions there, as JSON, and whether they work")
    options = parser.parse_args()
    if options.use: return use(options.use), refuse(options.use), None
    with tempfile.TemporaryDirectory() as folder:
        python = options.python or install(Path(folder))
        place = Path(folder, "there")
        place.mkdir()
        save(place)
        ran = subprocess.run([python, __file__, "--use", place], cwd=place, env=ALONE, text=True,
                             stderr=subprocess.PIPE if options.tried else None)
        if options.tried:
            return tell(options.tried, python, ran.stderr.strip().splitlines()[-1] if ran.returncode else "")
        if ran.returncode: sys.exit(ran.returncode)
        found = {"pip install modnb": measure(python), "pip install 'modnb[dev]'": measure(sys.executable)}
    for name, row in found.items():
        seconds = ", ".join(f"{module} {value:.2f} s" for module, value in row["import seconds"].items())
        print(f"{name:26}{row['distributions']:5} distributions {row['megabytes']:6} MB, "
              f"{row['besides torch']} besides torch; imports: {seconds}")
    if options.write: options.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
