"Without any extra: loading, composing, specialising and exporting work, and every other part says what to install."

import os
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import slim

from modnb.compat import EXTRAS

ROOT = Path(__file__).parents[1]
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys({modules!r}))
sys.argv = ["slim.py", "--use", {folder!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_the_slim_installation_is_enough(tmp_path):
    slim.save(tmp_path)
    modules = [*sum(EXTRAS.values(), ()), "fvcore", "nbdev", "fastcore", "IPython", "onnxruntime"]
    code = WITHOUT.format(modules=modules, folder=str(tmp_path), script=slim.__file__)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "small/model.pt2").exists() and not (tmp_path / "small/model.onnx").exists()
    assert ran.stderr.splitlines() == ["torchvision is not installed, which this part of modnb needs; pip install "
                                       "'modnb[data]'"]


def test_every_extra_brings_what_is_said():
    "In settings.ini under the name of the package, which need not be that of the module."
    config, packages = ConfigParser(delimiters=["="]), packages_distributions()
    config.read(ROOT / "settings.ini")
    words = lambda key: {word.partition("=")[0].partition("<")[0].lower() for word in config["DEFAULT"][key].split()}
    for extra, modules in EXTRAS.items():
        for module in modules: assert {*map(str.lower, packages[module])} & words(f"{extra}_requirements"), module
    assert words("requirements") == {"torch", "numpy", "safetensors", "fastjsonschema", "pyyaml", "tqdm"}


ADDED = """
import sys, torch
before = {*sys.modules}
import modnb.compose, modnb.specialize
print(*sorted({*sys.modules} - before))
"""


def test_importing_it_adds_little_to_torch():
    "Neither torch's compiler, which takes a second, nor an extra."
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.check_output([sys.executable, "-c", ADDED], env=environment, text=True).split()
    assert "modnb.compose" in found and "torch.utils.flop_counter" in found
    assert not [name for name in found if name.startswith(("torch._dynamo", "torch._inductor"))]
    packages = {name.partition(".")[0] for name in found} - {*sys.stdlib_module_names}
    assert not packages & {*sum(EXTRAS.values(), ())}
