"""One guarded import of torchvision: with small packages of our own in its place, and with the real one.

Every case runs in a process of its own, since a declaration lasts as long as the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXTENSION = "def _has_ops(): return False\n"
NEEDS_SCHEMA = """
import torch
from . import extension
with open(torchvision_log, "a") as log: log.write("tried ")
@torch.library.register_fake("torchvision::nms")
def nms(dets, scores, iou_threshold): return dets.new_empty(0)
@torch.library.register_fake("torchvision::qnms")
def qnms(dets, scores, iou_threshold): return dets.new_empty(0)
"""


def run(code: str, folder: Path | None = None) -> str:
    "Run Python code in a new process, with `folder` before the installed packages; return what it printed."
    paths = [str(folder)] * (folder is not None) + sys.path
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fake(tmp_path):
    "Write a package called torchvision with the given code; return its parent folder."
    def write(code: str) -> Path:
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "extension.py").write_text(EXTENSION)
        (package / "__init__.py").write_text(code.replace("torchvision_log", repr(str(tmp_path / "log"))))
        return tmp_path
    return write


def test_plain_import_that_works_declares_nothing(fake):
    printed = run("""
import torch
from modnb.compat import DECLARED, import_torchvision
torchvision = import_torchvision()
assert torchvision.fits and torchvision is import_torchvision()
assert not DECLARED and not hasattr(torch.ops.torchvision, "nms")
print("ok")""", fake("fits = True\n"))
    assert printed == "ok\n"


def test_missing_operator_is_declared_once_and_import_tried_again(fake, tmp_path):
    printed = run("""
import sys, torch
from modnb.compat import DECLARED, import_torchvision
torchvision = import_torchvision()
assert sys.modules["torchvision.extension"] is torchvision.extension
assert import_torchvision() is torchvision and len(DECLARED) == 1
for operator in (torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
    try: operator(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError: print("no kernel")""", fake(NEEDS_SCHEMA))
    assert printed == "no kernel\nno kernel\n"
    assert (tmp_path / "log").read_text() == "tried tried "


def test_other_failures_pass_through(tmp_path):
    failures = {
        "RuntimeError": "raise RuntimeError('CUDA versions differ')",
        "OSError": "raise OSError('no libcudart')",
        "ModuleNotFoundError": "import package_that_torchvision_needs",
    }
    for kind, code in failures.items():
        (tmp_path / kind / "torchvision").mkdir(parents=True)
        (tmp_path / kind / "torchvision" / "__init__.py").write_text(code)
    printed = run(f"""
import sys
from modnb.compat import DECLARED, import_torchvision
for kind in {list(failures)}:
    sys.path.insert(0, {str(tmp_path)!r} + "/" + kind)
    try: import_torchvision()
    except Exception as error: print(type(error).__name__, error, len(DECLARED))""")
    assert printed.splitlines() == ["RuntimeError CUDA versions differ 0", "OSError no libcudart 0",
                                    "ModuleNotFoundError No module named 'package_that_torchvision_needs' 0"]


def test_missing_torchvision_says_how_to_install_it():
    printed = run("""
import sys
sys.modules["torchvision"] = None
from modnb.compat import DECLARED, import_torchvision
try: import_torchvision()
except ImportError as error: print(type(error).__name__, error, len(DECLARED))""")
    assert printed.startswith("MissingExtra torchvision is not installed") and "pip install 'modnb[data]'" in printed
    assert printed.endswith(" 0\n")


@pytest.mark.parametrize("before", ["", """
try: import torchvision
except RuntimeError: pass
"""], ids=["first", "after a plain import"])
def test_the_real_one(before):
    printed = run(before + """
import torch
from modnb.compat import DECLARED, import_torchvision
torchvision = import_torchvision()
assert len(DECLARED) == (0 if torchvision.extension._has_ops() else 1)
model = torchvision.models.resnet18().eval()
assert sum(weights.numel() for weights in model.parameters()) == 11_689_512
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
assert torchvision.datasets.CIFAR10.base_folder == "cifar-10-batches-py"
boxes, scores = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 1.9]]), torch.tensor([0.9, 0.8])
try: assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0] and not DECLARED
except RuntimeError as error: assert "Couldn't load custom C++ ops" in str(error) and DECLARED
import torchvision.transforms.v2
print("ok")""")
    assert printed == "ok\n"
