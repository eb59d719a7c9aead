"""Kill what runs for long, at random moments, and let it go on: `make torture`, or `python tests/torture.py --help`.

Each task runs once undisturbed. Then it is started again and again in a folder of its own and killed, by SIGKILL (as
by a lack of memory) or SIGTERM (as by a scheduler), between one and three times, before it may come to its end. What it
ends with has to be the same to the last bit, what it left in between has to be readable, and nothing else may lie in
its folder. The moments come from a seed; what they hit is up to the machine.

Children are forked, so that nothing is imported again: a hundred kills take a minute or two on one processor. The
matrix runs as people run it, with Snakemake and kernels: it takes most of the time, and is killed half as often."""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from modnb.checkpoints import read_checkpoint
from modnb.cnnsplitter.importance import Grouping, group_kernels, kernel_importance
from modnb.cnnsplitter.search import Rules, search
from modnb.compose import compose, load_module, save_module
from modnb.data import ImageData, Split
from modnb.files import digest, save_tensors
from modnb.lab.commands import main as modnb
from modnb.lab.reports import write_report
from modnb.lab.results import describe_run, make_rows, read_rows, write_rows
from modnb.locks import is_held
from modnb.moda.decompose import decompose
from modnb.mwt.reuse import fine_tune
from modnb.specialize import save_program
from modnb.subtasks import all_subtasks
from modnb.training import fit
from modnb.walk import evaluate_subtasks

COLUMNS = ("kills", "SIGKILL", "SIGTERM", "runs", "left over", "unequal", "litter") # of the table that is printed
CLASSES = ["a", "b", "c", "d"]


@cache
def pictures() -> ImageData:
    "Noise around a shade for each class."
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % len(CLASSES)
    noise = torch.randint(80, [96, 3, 8, 8], generator=generator)
    images = (noise + 40 * labels.view(-1, 1, 1, 1)).byte()
    parts = [Split(images[start::3], labels[start::3], CLASSES, (0.5,) * 3, (0.25,) * 3, 1) for start in range(3)]
    return ImageData("shades", CLASSES, *parts)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                  nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, len(CLASSES))]
        return nn.Sequential(*layers)


@cache
def trained() -> nn.Module:
    model = network()
    fit(model, pictures(), epochs=4, batch_size=16, lr=0.1, device="cpu", precision="float32")
    return model


@cache
def grouping() -> Grouping:
    return group_kernels(kernel_importance(trained(), pictures().train, min_confidence=0), CLASSES)


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# The tasks: each works in a folder, goes on with what it finds there, and returns what it ends with


def training(folder: Path) -> list:
    model = network()
    history = fit(model, pictures(), epochs=12, batch_size=8, device="cpu", precision="float32", keep_best=True,
                  checkpoint=folder / "run.safetensors")
    saved = read_checkpoint(folder / "run.safetensors")
    return [timeless(history.rows), digest(model.state_dict()), digest(saved.model), digest(saved.momentum)]


def searching(folder: Path) -> list:
    rules = Rules(individuals=6, parents=3, elites=2, fewest=20, most=40)
    state = folder / "search.safetensors"
    found = search(trained(), pictures().valid, grouping(), rules, generations=6, checkpoint=state)
    return [timeless(found.history), digest(found.masks.masks), digest([found.population])]


def tuning(folder: Path) -> list:
    model = network()
    model.load_state_dict(trained().state_dict())
    history = fine_tune(model, pictures(), epochs=8, batch_size=8, precision="float32")
    save_tensors(folder / "tuned.safetensors", model.state_dict(), "tuned", {})
    return [timeless(history.rows), digest(model.state_dict())]


def subtasks(folder: Path) -> list:
    masks = decompose(trained(), pictures().train, 0.5)
    rows = []
    for batch_size in (4, 8, 16):
        rows += evaluate_subtasks(trained(), masks, pictures().test, all_subtasks(CLASSES), batch_size=batch_size,
                                  path=folder / f"answers{batch_size}.safetensors", save_every=0)
    return rows


def results(folder: Path) -> list:
    for epochs in range(1, 21):
        run = describe_run("torture", "plain", "net", "shades", 0, {"epochs": epochs}, run="torture/one")
        write_rows(folder / "rows.csv", make_rows(run, {"accuracy": epochs / 20}) * 200)
    return [read_rows(folder / "rows.csv")["value"].tolist()]


def reporting(folder: Path) -> list:
    import matplotlib.pyplot as plt
    import pandas

    figure, axes = plt.subplots(figsize=(2, 2), dpi=50)
    axes.plot([0, 1], [0, 1])
    frame = pandas.DataFrame({"class": CLASSES, "accuracy": [0.1, 0.2, 0.3, 0.4]})
    for words in ("first", "second", "third"):
        parts = [("heading", words), ("text", words * 2000), ("table", frame), ("a line", figure)]
        write_report(folder, "Torture", parts)
    plt.close(figure)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]


@cache
def small_network() -> nn.Module:
    masks = decompose(trained(), pictures().train, 0.5)
    return compose(trained(), masks, ["a", "c"], pictures().example())


def exporting(folder: Path) -> list:
    network, example = small_network(), pictures().example()
    for number in range(2):
        save_module(network, folder / "model.safetensors")
        save_program(network, example, folder / "model.pt2", {"number": number})
    program = torch.export.load(folder / "model.pt2").module()
    return [digest(load_module(folder / "model.safetensors", trained()).state_dict()), digest([program(example)])]


CODE = """import shutil
from pathlib import Path
shutil.copy(Path(r'{place}') / f'rows{{seed}}.csv', Path(out) / 'rows_train.csv')
(Path(out) / 'model.safetensors').write_text('')"""
MATRIX = "studies: {one: {vary: {system: [plain], seed: [1, 2, 3]}, stages: {}}}"


def experiments(folder: Path) -> Path:
    "The Snakefile with a training that only writes a row, which lies there already."
    folder.mkdir()
    for seed in (1, 2, 3):
        run = describe_run("one", "plain", "net", "shades", seed, {"seed": seed}, run=f"one/{seed}")
        write_rows(folder / f"rows{seed}.csv", make_rows(run, {"accuracy": seed / 4}))
    (folder / "Snakefile").write_text((Path(__file__).parents[1] / "nbs/experiments/Snakefile").read_text())
    (folder / "matrix.yaml").write_text(MATRIX)
    given = "out = ''  # folder\nstudy = ''  # name\nsystem = ''  # name\nseed = 0  # number\ndevice = ''  # where"
    cells = [{"cell_type": "code", "id": f"c{number}", "source": source, "outputs": [], "execution_count": None,
              "metadata": {"tags": ["parameters"] * (number == 0)}}
             for number, source in enumerate([given, CODE.format(place=folder)])]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    content = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "train.ipynb").write_text(json.dumps(content))
    return folder


def running(folder: Path) -> list: # a study, in a folder of all runs
    place = folder.with_name(folder.name + "-experiments")
    if not place.exists(): experiments(place)
    while any(map(is_held, [*folder.rglob(".*.running"), folder / ".modnb-run"])): time.sleep(0.2) # kernels notice soon
    code = modnb(["run", "one", "--experiments", str(place), "--runs", str(folder), "--jobs", "2", "--gpus", "0"])
    if code: raise SystemExit(f"modnb run ended with {code}")
    return [read_rows(sorted(folder.rglob("rows_train.csv")))[["run", "value"]].values.tolist()]


# What may be read while a task is not at its end


def whole_rows(folder: Path) -> bool:
    path = folder / "rows.csv"
    return not path.exists() or len(read_rows(path)) == 200


def whole_pages(folder: Path) -> bool:
    page = folder / "report.html"
    return not page.exists() or page.read_text(encoding="utf-8").endswith("</html>\n")


def whole_module(folder: Path) -> bool:
    path = folder / "model.safetensors"
    return not path.exists() or len(load_module(path, trained()).classes) == 2


class Task(NamedTuple):
    run: Callable[[Path], list] # returns what it ends with, plain values
    readable: Callable[[Path], bool] = lambda folder: True # whether what it left when it was killed is whole
    share: float = 1.0 # of the kills
    stops: bool = False # whether it ends by itself, with an error, when it is told to by SIGTERM


TASKS = {"training": Task(training), "search": Task(searching), "fine-tuning": Task(tuning),
         "sub-tasks": Task(subtasks), "results": Task(results, whole_rows), "report": Task(reporting, whole_pages),
         "export": Task(exporting, whole_module), "matrix": Task(running, share=0.5, stops=True)}


# Starting and killing


def start(task: Task, folder: Path) -> int: # of the process, which leaves END beside the folder
    sys.stdout.flush(), sys.stderr.flush()
    if child := os.fork(): return child
    code = 1
    try:
        os.setsid() # it is killed with the processes that it started
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with folder.with_suffix(".log").open("w") as log: os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        end = folder.with_suffix(".json")
        end.write_text(json.dumps(task.run(folder)))
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def said(folder: Path) -> str: return folder.with_suffix(".log").read_text()[-3000:] # by the last process


def finish(task: Task, folder: Path) -> Any: # what it ended with, and the names of the files
    folder.mkdir(exist_ok=True)
    _, status = os.waitpid(start(task, folder), 0)
    if status: raise SystemExit(f"{folder.name}: a run that was not killed ended with status {status}\n{said(folder)}")
    return json.loads(folder.with_suffix(".json").read_text()), names(folder)


def names(folder: Path) -> list[str]: # of the files; what Snakemake notes for itself is its own
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(map(str, (path for path in paths if ".snakemake" not in path.parts)))


def kill_once(task: Task, folder: Path, moment: float, how: signal.Signals) -> bool: # whether it came before the end
    folder.mkdir(exist_ok=True)
    child = start(task, folder)
    time.sleep(moment)
    try: os.killpg(child, how)
    except ProcessLookupError: os.kill(child, how) # before it had a group of its own
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) or bool(status and task.stops and how == signal.SIGTERM)
    if status and not killed: raise SystemExit(f"{folder.name}: a run ended with status {status}\n{said(folder)}")
    if not task.readable(folder): raise SystemExit(f"{folder.name}: something was left half-written")
    return killed


def torment(name: str, kills: int, chance: random.Random, place: Path) -> Counter: # what was counted
    task, counted = TASKS[name], Counter()
    begun = time.monotonic()
    expected = finish(task, place / f"{name}-whole")
    lasts = time.monotonic() - begun
    while counted["kills"] < kills and counted["runs"] < 10 * kills:
        folder = place / f"{name}-{counted['runs']}"
        for _ in range(min(chance.randint(1, 3), kills - counted["kills"])):
            how = chance.choice((signal.SIGKILL, signal.SIGTERM))
            if not kill_once(task, folder, chance.uniform(0, lasts), how): break
            counted["kills"] += 1
            counted[how.name] += 1
            counted["left over"] += any(path.name.startswith(".") for path in folder.iterdir())
        found = finish(task, folder)
        counted["runs"] += 1
        counted["unequal"] += found[0] != expected[0]
        counted["litter"] += found[1] != expected[1]
        if found != expected: print(f"{folder.name}: {expected} was expected, not {found}", file=sys.stderr)
    return counted


def deal(kills: int, chosen: list[str]) -> dict[str, int]: # task -> kills, one at least
    total = sum(TASKS[name].share for name in chosen)
    shares = {name: max(1, int(kills * TASKS[name].share / total)) for name in chosen}
    for name in chosen[:max(0, kills - sum(shares.values()))]: shares[name] += 1
    return shares


def main() -> int: # 1 where something was not as it has to be
    parser = argparse.ArgumentParser(description="Kill trainings, searches and so on, and let them go on.")
    parser.add_argument("--kills", type=int, default=120, help="in all (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--task", choices=TASKS, action="append", help="only this one; may be said several times (all)")
    parser.add_argument("--write", type=Path, help="write the counts there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1) # a process that forks must not have others beside it
    trained(), grouping(), small_network() # once, not in every child
    wrong, chosen, found = 0, options.task or list(TASKS), {}
    print(f"{'task':12}" + "".join(f"{word:>10}" for word in (*COLUMNS, "seconds")))
    with TemporaryDirectory(prefix="torture") as place:
        shares = deal(options.kills, chosen)
        for name in chosen:
            begun, share = time.monotonic(), shares[name]
            counted = torment(name, share, random.Random(f"{options.seed} {name}"), Path(place))
            wrong += counted["unequal"] + counted["litter"] + (counted["kills"] < share)
            found[name] = {word: counted[word] for word in COLUMNS} | {"seconds": round(time.monotonic() - begun, 1)}
            print(f"{name:12}" + "".join(f"{value:10}" for value in found[name].values()), flush=True)
    if options.write: options.write.write_text(json.dumps(found, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__": sys.exit(main())
