"""Much at once, and much in memory: `make load`, or `python tests/load.py --help`.

- 200 tiny notebooks, 8 at a time, through the runner of the library: how long, and whether anything is left.
- All 14,697 sub-tasks of a network with 100 classes: by how much memory grows, for a part of them and for all.
- The masks of 50,000 images at 4,160 units: the same.

Each measurement of memory has a process of its own, which says what it held before and at most."""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modnb.data import Split
from modnb.masks import threshold_masks
from modnb.metrics import cohesion
from modnb.models import create_model
from modnb.mwt.modularize import sample_masks
from modnb.subtasks import sample_subtasks
from modnb.units import unit_sites
from modnb.walk import evaluate_subtasks

ROOT = Path(__file__).parents[1]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
ALL = 14_697 # sub-tasks of 100 classes that the sample has


# Notebooks


def tiny(folder: Path) -> Path: # a notebook that writes its number
    sources = ["number = 0  # which\nout = ''  # folder",
               "from pathlib import Path\n(Path(out) / 'n').write_text(str(number))"]
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
              "metadata": {"tags": ["parameters"] * (i == 0)}} for i, source in enumerate(sources)]
    path = folder / "tiny.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}))
    return path


def processes(word: str) -> list[str]: # command lines of others that name a word; needs /proc
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError: continue # it has just ended
        if word in line and int(path.parent.name) != os.getpid(): found.append(line)
    return found


def notebooks(count: int, jobs: int) -> dict: # seconds, those that failed, what is left
    with tempfile.TemporaryDirectory(prefix="load") as place:
        folder, own = Path(place), Path(place, "tmp")
        own.mkdir()
        path = tiny(folder)
        environment = os.environ | {"TMPDIR": str(own), "JUPYTER_RUNTIME_DIR": str(own / "jupyter"),
                                    "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT),
                                    "OMP_NUM_THREADS": "1"}
        def one(number: int) -> bool:
            out = folder / f"runs/{number}"
            words = [path, out / "tiny.ipynb", "-p", "number", str(number), "-p", "out", out]
            words = [sys.executable, "-m", "modnb.lab.running", *words]
            ran = subprocess.run(words, env=environment, capture_output=True)
            return ran.returncode == 0 and (out / "n").read_text() == str(number)
        begun = time.monotonic()
        with ThreadPoolExecutor(jobs) as pool: right = sum(pool.map(one, range(count)))
        took = time.monotonic() - begun
        time.sleep(2) # a kernel looks every second whether it is still wanted
        locks = [str(path) for path in folder.rglob("*.running")]
        files = [str(path.relative_to(own)) for path in own.rglob("*") if path.is_file() or path.is_socket()]
        return {"notebooks": count, "at a time": jobs, "right": right, "seconds": round(took, 1),
                "left": {"processes": processes(place), "locks": locks, "temporary files": files}}


# Memory


def held() -> float: # megabytes at most, so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def pictures(count: int, classes: int, side: int) -> Split:
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"c{number}" for number in range(classes)]
    return Split(images, torch.arange(count) % classes, names, (0.5,) * 3, (0.25,) * 3)


def walk(count: int) -> dict: # of that many sub-tasks of 100 classes
    model = create_model("vgg12", num_classes=100, width=0.25, image_size=16, seed=0).eval()
    split = pictures(200, 100, 16)
    chance = torch.Generator().manual_seed(0)
    sites = unit_sites(model, split.images[:1].float())
    masks = threshold_masks({site: torch.rand(100, units, generator=chance) for site, units in sites.items()},
                            split.classes, 0.97)
    subtasks = sample_subtasks(split.classes)
    chosen = subtasks[::len(subtasks) // count][:count]
    evaluate_subtasks(model, masks, split, chosen[:20]) # what comes with the first ones whatever their number
    before, begun = held(), time.process_time()
    rows = evaluate_subtasks(model, masks, split, chosen)
    return {"sub-tasks": len(rows), "units": sum(sites.values()),
            "processor seconds": round(time.process_time() - begun, 1), "megabytes before": round(before),
            "megabytes more": round(held() - before)}


def collect(count: int, units: int = 4160) -> dict: # masks of that many images
    width = units // 8 # the first layer has no masks
    layers = [nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(8): layers += [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10)).eval()
    split = pictures(count, 10, 4)
    sample_masks(model, split.select(torch.arange(min(512, count))))
    before, begun = held(), time.process_time()
    used = torch.cat(list(sample_masks(model, split).values()), 1)
    collected = held()
    cohesion(used[:, :units], split.labels)
    return {"images": count, "units": used.shape[1], "processor seconds": round(time.process_time() - begun, 1),
            "megabytes of masks": round(used.numel() / 1e6), "megabytes before": round(before),
            "megabytes more": round(collected - before), "and for cohesion": round(held() - before)}


def alone(task, number: int) -> dict: # in a process of its own
    with get_context("spawn").Pool(1) as pool: return pool.apply(task, (number,))


PARTS = ("sub-tasks", "masks", "notebooks")


def measure(part: str, options: argparse.Namespace) -> Any: # plain values
    if part == "notebooks": return notebooks(options.notebooks, options.jobs)
    task, most = (walk, ALL) if part == "sub-tasks" else (collect, 50_000)
    return [alone(task, max(1, round(options.share * count))) for count in (most // 10, most)]


def main() -> int: # 1 where a notebook failed, or something is left
    parser = argparse.ArgumentParser(description="Much at once, and much in memory.")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this one; may be said several times (all)")
    parser.add_argument("--notebooks", type=int, default=200, help="how many (200)")
    parser.add_argument("--jobs", type=int, default=8, help="at a time (8)")
    parser.add_argument("--share", type=float, default=1.0, help="of the sub-tasks and images (1)")
    parser.add_argument("--write", type=Path, help="write what was measured there, as JSON; other parts stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.write.read_text()) if options.write and options.write.exists() else {}
    for part in options.part or PARTS:
        found[part] = measure(part, options)
        print(json.dumps({part: found[part]}), flush=True)
        if options.write: options.write.write_text(json.dumps(found, indent=1) + "\n")
    crowd = found.get("notebooks", {"right": 0, "notebooks": 0, "left": {}})
    return int(crowd["right"] < crowd["notebooks"] or any(crowd["left"].values()))


if __name__ == "__main__": sys.exit(main())
