"""Rows as the studies of the matrix would leave them, without training: the settings are real, the numbers drawn."""

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pandas

from modnb.cnnsplitter.search import OURS, RELEASED, published_rules
from modnb.cnnsplitter.sensitivity import PUBLISHED
from modnb.lab import results
from modnb.lab.matrix import ABOUT_METRICS, MEASURES, Cell, decided, read_matrix, stage_notebook, study_cells
from modnb.lab.results import class_set, make_rows
from modnb.lab.running import canonical, config_hash, notebook_parameters
from modnb.subtasks import all_subtasks, draw_sizes, sample_subtasks

EXPERIMENTS = Path(__file__).parents[1] / "nbs/experiments"
CLASSES = {"cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
           "cifar100": [f"class {number}" for number in range(100)]}
TEN = [str(number) for number in range(10)]
OF_SYSTEMS = {"moda": {"warmup", "average", "affinity", "dispersion", "compactness", "compactness_form", "sites"},
              "mwt": {"warmup", "average", "w_cohesion", "w_coupling", "generators", "floor", "mask_slope"},
              "nemo": {"warmup", "w_contrast", "temperature", "contrast", "spared", "attention", "floor"}}
UNUSED = {"study", "run", "search", "out", "root", "device", "seed"}
NOT_RECORDED = {"modularize": {"latency_runs", "split"}, "thresholds": {"thresholds"}, "moda_residual": {"batch_size"},
                "moda_subtasks": {"batch_size", "rows_of_each"}, "cnnsplitter_patch": {"targets", "kinds"}}
TIMES = ("seconds", "milliseconds")
TERMS = ("loss", "cross_entropy", "affinity", "dispersion", "compactness", "cohesion_loss", "coupling_loss",
         "train_accuracy", "valid_accuracy", "sample_cohesion", "sample_coupling", "used_kernels", "seconds")


@cache
def parameters(notebook: str) -> dict: return notebook_parameters(EXPERIMENTS / f"{notebook}.ipynb")


@cache
def matrix() -> dict: return read_matrix(EXPERIMENTS / "matrix.yaml")


def published_studies() -> list[str]: return [study for study, spec in matrix().items() if spec["fills"]]


def drawn(*what) -> float:
    "A number between 0 and 1 that is the same for the same thing"
    return int(hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12], 16) / 16**12


def recorded(notebook: str, settings: dict) -> dict:
    "What rows of a stage record of its parameters"
    known = parameters(notebook) | settings
    return {name: value for name, value in known.items() if name not in UNUSED | NOT_RECORDED.get(notebook, set())}


def own_rule(config: dict, system: str) -> dict:
    "The rule for empty layers under its name"
    return {"empty": {"mwt": "relax"}.get(system, "top_share")} if config.get("empty") == "own" else {}


def searched(settings: dict, run: dict) -> dict:
    "What rows of a search record: what was done, not what was left open"
    known, five = recorded("cnnsplitter_search", settings), json.loads(run["config"])["only_classes"]
    name = known.pop("configuration")
    own = f"{run['model']}-{run['dataset']}{'5' if five else ''}" if name == "published" else name
    rules = asdict(published_rules(own) if own else RELEASED)
    names = {"population": "individuals"} | {name: name for name in (
        "parents", "elites", "fewest", "most", "mutation_rate", "initial_bias", "accuracy_weight", "accuracy_goal",
        "relative_goals")}
    for name in (*OURS[1:], "linear", "renormalise_images"): # recorded where they are not as they were
        if not known[name] or name == "renormalise_images": del known[name]
    known["start"] = known["start"] or rules["initial"]
    decided = {setting: rules[name] for setting, name in names.items() if known[setting] is None}
    for name in ("keep_sensitive", "keep_insensitive"):
        decided |= {} if known[name] else {name: ",".join(f"{share:g}" for share in rules[name])}
    pairs = ",".join(f"{size}:{share:g}" for size, share in rules["thresholds"])
    decided |= {"combination_thresholds": known["combination_thresholds"] or pairs,
                "sensitive_layers": ",".join(map(str, PUBLISHED[own]["sensitive"])) if own else "by the rule"}
    return known | decided


def rows_about(run: dict, notebook: str, sets: dict) -> list[dict]:
    "Every metric of a notebook on every class set; `sets` has the class sets of every kind"
    config, rows, empty = json.loads(run["config"]), [], make_rows(run, {"accuracy": 0.0})[0]
    for metric, fact in MEASURES.items():
        key = [run[name] for name in ("run", "model", "dataset", "system")] + [metric, decided(metric, config)]
        if fact["unit"] in TIMES: key.append(notebook)
        split = "test" if any(word in metric for word in ("accuracy", "precision", "recall", "_f1")) else "train"
        common = empty | {"metric": metric, "unit": fact["unit"], "split": split}
        for classes in (one for kind in fact.get("from", {}).get(notebook, ()) for one in sets.get(kind, ())):
            value = sets["counted"] if metric == "subtasks" else drawn(*key, classes)
            if fact["unit"] in ("count", "multiply-adds", *TIMES) and metric != "subtasks":
                value = round(1 + 200 * value)
            rows.append(common | {"classes": class_set(classes), "value": value})
    return rows


@cache
def computer() -> dict:
    "What all runs have in common"
    return results.describe_run("", "", "", "", 0, {}, run="x") | {"hardware": "NVIDIA A100-SXM4-40GB"}


def describe_run(study: str, system: str, model: str, dataset: str, seed: int, config: dict, run: str) -> dict:
    return computer() | {"study": study, "system": system, "model": model, "dataset": dataset, "seed": seed, "run": run,
                         "config": canonical(config), "config_hash": config_hash(config)}


def class_names(dataset: str, only: str = "") -> list[str]:
    return [name.strip() for name in only.split(",")] if only else CLASSES.get(dataset, TEN)


def trained(cell: Cell) -> dict:
    "What the rows about the network of a cell have in common"
    known = parameters("train") | cell.train
    others = set.union(*OF_SYSTEMS.values()) - OF_SYSTEMS.get(known["system"], set())
    config = {name: value for name, value in known.items() if name not in UNUSED | others}
    config |= {"precision": known["precision"] or "float32"}
    if not known["head_weights"]: config["head_weights"] = "scaled" if known["width"] < 1 else "published"
    return describe_run(cell.study, known["system"], known["model"], known["dataset"], known["seed"], config,
                        cell.network)


def describe(about: dict, changes: dict, **others) -> dict:
    "The same network with more settings"
    config = json.loads(about["config"]) | changes
    return about | {"config": canonical(config), "config_hash": config_hash(config)} | others


def replacement_rows(cell: Cell, settings: dict) -> list[dict]:
    "Weak networks of both kinds, and every way to repair them"
    known = parameters("moda_replacement") | settings | {key: cell.train[key] for key in cell.train if key in settings}
    config = {name: value for name, value in known.items() if name not in UNUSED}
    names = class_names(known["dataset"])[:5]
    targets = [name for name in known["targets"].split(",") if name] or names
    ways = [(known["system"], {"adaptation_epochs": int(epochs), "inputs": inputs, "fed_with": fed})
            for epochs in str(known["adaptation_epochs"]).split(",") for inputs in known["inputs"].split(",")
            for fed in ("module", "own logit")]
    ways += [("cnnsplitter", {"adaptation_epochs": 0, "inputs": "none", "fed_with": fed})
             for fed in ("patch", "patch, range of all classes")]
    rows = []
    for kind in ("underfitting", "overfitting"):
        for system, variant in ways:
            more = variant | {"weak": kind, "weak_train_accuracy": drawn(kind)}
            run = describe_run(cell.study, system, known["model"], known["dataset"], known["seed"], config | more,
                               run=f"{cell.study}/moda_replacement-seed{known['seed']}")
            rows += rows_about(run, "moda_replacement", {"target": [[target] for target in targets]})
    return rows


def patch_rows(run: dict, search: dict, settings: dict) -> list[dict]:
    "Weak networks of three kinds and what a module of the search makes of them"
    known = recorded("cnnsplitter_patch", settings)
    config = {name: value for name, value in known.items() if not name.startswith(("strong_", "image_size", "dataset"))}
    config |= search | {**config, "masks": "masks.safetensors"}
    given = parameters("cnnsplitter_patch") | settings
    rows = []
    for kind in given["kinds"].split(","):
        about = describe(run, config | {"weak": kind}, system="cnnsplitter", run=f"{run['run']}/{kind}")
        rows += rows_about(about, "cnnsplitter_patch", {"target": [[target] for target in given["targets"].split(",")]})
    return rows


@cache
def count_subtasks(classes: int, confidence: float, margin: float) -> int:
    names = [str(number) for number in range(classes)]
    return len(all_subtasks(names) if classes <= 12 else sample_subtasks(names, confidence, margin))


def stage_rows(cell: Cell, stage: str, run: dict, names: list[str]) -> list[dict]:
    "What one stage leaves"
    notebook, settings = stage_notebook(stage), cell.stages[stage]
    if notebook == "moda_replacement": return replacement_rows(cell, settings)
    known, given = recorded(notebook, settings), parameters(notebook) | settings
    known |= own_rule(known, run["system"])
    if notebook == "cnnsplitter_patch":
        return patch_rows(run, searched(cell.stages[cell.after[stage][0]], run), settings)
    if notebook == "cnnsplitter_search": known = searched(settings, run)
    if notebook == "moda_subtasks":
        sets = {"all": [None], "counted": count_subtasks(len(names), given["confidence"], given["margin"])}
        return rows_about(describe(run, known), notebook, sets)
    subtasks = draw_sizes(names, given["sizes"], given["subtasks_per_size"], given["subtask_seed"])
    sets = {"all": [None], "class": [[name] for name in names], "sub-task": subtasks}
    own = {"cnnsplitter_search": "cnnsplitter", "gradsplitter": "gradsplitter", "seam": "seam"} # of plain networks
    system = own.get(notebook, run["system"])
    lists = ABOUT_METRICS["lists"].get(notebook, {})
    levels = [{lists[name]: float(word)} for name in lists for word in given[name].split(",")] or [{}]
    if notebook == "moda_residual":
        levels = [{"masks_by": form, "level": 0.9} for form in ("published", "published_chosen", "contribution")]
    if notebook == "mwt_reuse": levels = [{"tune_select": word.strip()} for word in given["tune_select"].split(",")]
    return [row for level in levels for row in rows_about(describe(run, known | level, system=system), notebook, sets)]


def cell_rows(cell: Cell) -> dict[str, list[dict]]:
    "What every step of a cell leaves"
    found, run, names = {}, None, []
    if cell.needs_network:
        run = trained(cell)
        names = class_names(run["dataset"], json.loads(run["config"])["only_classes"])
        found["train"] = rows_about(run, "train", {"all": [None]})
    return found | {stage: stage_rows(cell, stage, run, names) for stage in cell.stages}


@cache
def study_rows(study: str) -> pandas.DataFrame:
    "All rows of a study, every cell and every stage, for two of its seeds"
    cells = [cell for cell in study_cells(matrix(), study, parameters("train")) if cell.train["seed"] < 2]
    return pandas.DataFrame([row for cell in cells for rows in cell_rows(cell).values() for row in rows])


def histories(rows: pandas.DataFrame) -> dict[str, list[dict]]:
    "A short history of every trained network"
    runs = rows[rows["metric"] == "parameters"].drop_duplicates("run")["run"]
    return {run: [{"epoch": epoch} | {term: drawn(run, epoch, term) for term in TERMS} for epoch in range(3)]
            for run in runs}
