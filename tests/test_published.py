"""Published numbers: all are read, each carries its caveats, and only what was made by the same recipe is compared."""

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modnb.lab.matrix import facts
from modnb.lab.published import (
    CAVEATS,
    COLUMNS,
    PRINTED,
    TABLES,
    TOLERANCE,
    beside,
    beside_text,
    bootstrap_interval,
    caveats_of,
    number_text,
    prepare_rows,
    published_tables,
    read_heading,
    read_published,
    recipe,
    side_by_side,
    table_text,
    what_differs,
)
from modnb.lab.results import METRICS, UNITS, describe_run, make_rows, markdown_table, read_rows
from modnb.models import list_models

ROOT = Path(__file__).parents[1]
COUNTS = {  # numbers printed in each table, standard deviations left out
    "cnnsplitter_table1": 4 * 5, "cnnsplitter_table2": 4 * 3 + 1, "cnnsplitter_table3": 2 * 11 * 3 * 2,
    "cnnsplitter_table4": 2 * 6 * 3 * 2, "cnnsplitter_table5": 2 * 12 * 2, "cnnsplitter_table6": 12 * 2,
    "cnnsplitter_table7": 16 * 2, "moda_table1": 9 * 6, "moda_table2": 80 * 2, "moda_table3": 9 * 8,
    "mwt_table1": 8 * 2, "mwt_table2": 5 * 6, "mwt_table3": 5 * 9, "mwt_table4": 4 * 9 + 6,
    "mwt_table5": 9 * 5, "mwt_table6": 9 * 5 * 2, "mwt_table7": 9 * 5 * 3, "mwt_table8": 9 * 5 * 2,
}
each_table = pytest.mark.parametrize("name", TABLES)


def one(table, **columns):
    "The one published number with these columns"
    numbers = read_published(table)
    for column, value in columns.items(): numbers = numbers[numbers[column] == value]
    assert len(numbers) == 1, numbers
    return numbers.iloc[0]


# The files


def test_the_package_ships_the_tables():
    assert sorted(path.stem for path in (ROOT / "modnb/lab/published_tables").glob("*.csv")) == sorted(TABLES)


def test_a_built_package_has_the_tables(tmp_path):
    "`pip install .` runs the same step"
    steps = ["egg_info", "-e", str(tmp_path), "build", "-b", str(tmp_path / "build")]
    command = [sys.executable, "setup.py", "-q", *steps]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    built = tmp_path / "build/lib/modnb/lab/published_tables"
    assert sorted(path.stem for path in built.glob("*.csv")) == sorted(TABLES)
    for folder in ("facts", "page"):
        there = sorted(path.name for path in (ROOT / "modnb/lab" / folder).iterdir())
        assert there and sorted(path.name for path in (built.parent / folder).iterdir()) == there
    code = (f"import sys; sys.path.insert(0, {str(built.parents[2])!r}); "
            "from importlib.resources import files; import modnb; "
            "print(modnb.__file__, len(list((files('modnb.lab') / 'published_tables').iterdir())))")
    alone = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True, "env": {}}
    found = subprocess.run([sys.executable, "-S", "-c", code], **alone).stdout.split()
    assert found == [str(built.parents[1] / "__init__.py"), str(len(TABLES))]


@each_table
def test_every_number_is_read(name):
    numbers = read_published(name)
    assert tuple(numbers.columns) == COLUMNS
    assert sum(numbers.reading != "corrected") == COUNTS[name] == published_tables().loc[name, "numbers"]
    assert numbers.value.notna().all()
    assert not numbers.duplicated(["line", "system", "details", "metric", "reading"]).any()
    paper, _, number = name.partition("_table")
    assert set(numbers.paper) == {paper} and set(numbers.table) == {int(number)}


def test_tables_of_the_papers():
    assert {name.partition("_")[0]: sum(n.startswith(name.partition("_")[0]) for n in TABLES) for name in TABLES} == {
        "cnnsplitter": 7, "moda": 3, "mwt": 8}
    assert published_tables().shows.to_dict() == TABLES


@each_table
def test_units_are_ours(name):
    numbers = read_published(name)
    assert set(numbers.metric) <= set(METRICS) and set(numbers.unit) <= set(UNITS)
    assert (numbers.unit == numbers.metric.map(lambda metric: METRICS[metric][0])).all()
    fractions = numbers[numbers.unit == "fraction"]
    assert fractions.value.between(0, 1).all()
    assert set(numbers.model) <= {*list_models(), "average"}
    assert set(numbers.dataset) <= {"cifar10", "cifar100", "svhn", "average"}
    assert set(numbers.system) <= {"plain", "mwt", "moda", "cnnsplitter"}


def test_values_by_hand():
    "One of each unit, copied from the papers by eye"
    assert one("mwt_table2", line="resnet18 svhn", system="mwt", metric="masked_retention").value == 0.2589
    assert one("mwt_table4", line="rescnn svhn", system="cnnsplitter", metric="total_time").value == 233 * 60
    assert one("mwt_table4", line="average", system="plain", metric="training_time").value == 53 * 60
    flops = one("mwt_table6", line="vgg16 cifar10, 2 classes", metric="composed_multiply_adds")
    assert flops.value == 70.97e6 and flops.unit == "multiply-adds"
    assert one("mwt_table6", line="vgg16 cifar10, 2 classes", metric="composed_flops").value == pytest.approx(0.2252)
    assert one("mwt_table7", line="vgg16 svhn, 2 classes", metric="tuned_loss").value == -0.28
    found = one("moda_table1", line="mobilenet svhn", system="mwt", metric="accuracy")
    assert (found.value, found.sd) == (pytest.approx(0.3287), pytest.approx(0.3512))
    found = one("moda_table1", line="mobilenet svhn", system="mwt", metric="training_time")
    assert found.value == pytest.approx(2.84 * 3600)
    assert one("cnnsplitter_table1", line="rescnn svhn", metric="module_kernels").value == 2317
    found = one("cnnsplitter_table3", line="rescnn cifar10, cat, weak underfitting", metric="patched_precision")
    assert found.value == 0.5638 and found["size"] == "1"
    found = read_published("moda_table3").query("line == 'resnet18 cifar100, all sub-tasks, compactness 0'")
    assert found.value.tolist() == [0.7984] and json.loads(found.details.iloc[0]) == {"compactness": "0"}


def test_only_moda_prints_a_spread():
    spread = {name: int(read_published(name).sd.notna().sum()) for name in TABLES}
    assert {name: count for name, count in spread.items() if count} == {"moda_table1": 27}


def test_unknown_tables_are_refused():
    for wrong in ("mwt_table9", "MwT table 2", "", "../setup"):
        with pytest.raises(ValueError, match="no published table"): read_published(wrong)
        with pytest.raises(ValueError, match="no published table"): beside(pandas.DataFrame(), wrong)
    with pytest.raises(ValueError, match="Did you mean 'mwt_table2'"): table_text("mwt_tabel2")


@pytest.mark.parametrize("heading", ["mwt/accuracy", "mwt/acuracy/%", "mwt/accuracy/percent", "mwt/accuracy/s", "x"])
def test_wrong_headings_are_refused(heading):
    with pytest.raises(ValueError, match="heading"): read_heading(heading)


def test_conversions():
    assert {unit for unit, _ in PRINTED.values()} <= set(UNITS)
    converted = [round(PRINTED[unit][1](30.0), 6) for unit in ("%", "% less", "min", "h", "million")]
    assert converted == [0.3, 0.7, 1800, 108000, 3e7]


# Caveats


def about(table, text):
    "Lines, systems and metrics of a table whose caveat has this text"
    numbers = read_published(table)
    return numbers[numbers.caveat.str.contains(text, regex=False)]


def test_every_caveat_is_on_some_number():
    for key, (text, where) in CAVEATS.items():
        for table in where: assert len(about(table, text)), f"{key} concerns nothing of {table}"
    texts = [text for text, _ in CAVEATS.values()]
    assert len(set(texts)) == len(texts)
    assert not any(a in b for a in texts for b in texts if a != b)


def test_caveats_are_on_the_numbers_they_concern():
    hits = about("mwt_table3", "equal to CNNSplitter's published difference")
    assert set(hits.system) == {"cnnsplitter"} and set(hits.metric) == {"coupling"} and len(hits) == 10
    hits = about("mwt_table2", "4,736 in ResNet18")
    assert set(hits.metric) == {"masked_retention"} and len(hits) == 5
    assert set(about("mwt_table2", "896 shortcut kernels").metric) == {"kernels"}
    assert set(about("mwt_table4", "up to 20 longer").metric) == {"generations", "modularizing_time", "total_time"}
    assert set(about("mwt_table4", "for the average only").line) == {"average"}
    for table in [f"mwt_table{n}" for n in range(2, 9)] + [f"cnnsplitter_table{n}" for n in (1, 2, 4, 5, 6, 7)]:
        assert set(about(table, "73,257").dataset) == {"svhn"}, table
    assert not len(about("moda_table1", "73,257"))
    assert set(about("cnnsplitter_table1", "Table 2 is about five").dataset) == {"svhn"}
    hits = about("cnnsplitter_table2", "Table 1 is about ten")
    assert set(hits.dataset) == {"svhn"} and set(hits.metric) == {"module_multiply_adds", "module_flops"}
    assert set(about("cnnsplitter_table2", "printed once").metric) == {"multiply_adds"}
    hits = about("mwt_table7", "repeats Table 2")
    assert set(hits["size"]) == {"10"} and set(hits.system) == {"mwt"}
    assert set(hits.metric) == {"accuracy", "accuracy_loss"}
    assert not set(about("mwt_table7", "best on test images")["size"]) & {"10"}
    hits = about("moda_table3", "float32")
    assert set(hits.model) == {"vgg16_4096"} and set(hits.metric) == {"overlap", "overlap_saving"}
    assert len(about("moda_table2", "those of CIFAR-10 alone")) == 160
    assert set(about("moda_table2", "all five strong classes").system) == {"cnnsplitter"}
    assert set(about("moda_table1", "4,096 neurons").system) == {"mwt"}
    assert len(about("mwt_table6", "5 instead of 2")) == 90
    assert set(about("mwt_table8", "BatchNorm").system) == {"mwt"}
    assert set(about("cnnsplitter_table3", "four convolutions on CIFAR").model) == {"simcnn"}


def test_caveats_of_follow_conditions():
    assert caveats_of("mwt_table6", {}) == [CAVEATS["flops in training mode"][0]]
    assert caveats_of("mwt_table2", {"dataset": "cifar10", "metric": "accuracy", "system": "mwt"}) == []


def test_the_coupling_that_is_a_distance():
    "MwT's printed coupling of CNNSplitter is CNNSplitter's printed difference, to the digit"
    numbers = read_published("mwt_table3").query("system == 'cnnsplitter' and metric == 'coupling'")
    printed, corrected = numbers[numbers.reading == "superseded"], numbers[numbers.reading == "corrected"]
    differences = read_published("cnnsplitter_table1").query("metric == 'difference'").value.tolist()
    assert printed.value.tolist()[:4] == differences
    assert corrected.value.tolist() == pytest.approx([0.4723, 0.3839, 0.4352, 0.3954, 0.4217])
    assert (numbers.caveat != "").all()
    others = read_published("mwt_table3").drop(numbers.index)
    assert set(others.reading) == {"printed"} and len(others) == 40


def test_notes_agree_with_the_numbers():
    "What the caveats say about retention and about the ten-class line can be computed"
    kernels = read_published("cnnsplitter_table1").query("metric == 'module_kernels'").value.tolist()
    shares = read_published("mwt_table3").query("metric == 'kernel_retention'").value.tolist()
    expected = [k / n for k, n in zip(kernels, (4224, 4224, 4288, 4288), strict=True)]
    assert shares[:4] == pytest.approx(expected, abs=5.1e-5)
    assert abs(kernels[2] / 4228 - shares[2]) > 0.005
    whole = read_published("mwt_table7").query("metric == 'accuracy' and system == 'mwt'").value.tolist()
    assert whole == read_published("mwt_table2").query("metric == 'accuracy' and system == 'mwt'").value.tolist()
    generations = read_published("cnnsplitter_table7").query("metric == 'generations'")
    ours = generations.details.str.contains('"importance", "start": "sensitivity"', regex=False)
    fourth = read_published("mwt_table4").query("metric == 'generations'")
    assert generations[ours].value.tolist() == fourth.value.tolist()


# Averages


def printed_steps(name):
    "System, metric -> half of the last printed digit, in our units; read from the text of the file"
    lines = [line.split(",") for line in table_text(name).splitlines()]
    for place, heading in enumerate(lines[0]):
        if "/" not in heading or heading.endswith(" sd"): continue
        says = read_heading(heading)
        texts = [line[place] for line in lines[1:] if line[place]]
        digits = max(len(text.partition(".")[2]) for text in texts)
        convert = PRINTED[says["unit"]][1]
        yield (says["system"], says["metric"]), abs(convert(10**-digits / 2) - convert(0.0))


@each_table
def test_printed_averages(name):
    numbers, checked = read_published(name), 0
    steps = dict(printed_steps(name))
    averages = numbers[(numbers.model == "average") | (numbers.target == "average")]
    for average in averages.to_dict("records"):
        same = numbers
        for column in ("system", "metric", "size", "details", "reading"): same = same[same[column] == average[column]]
        if average["target"]: same = same[same.model == average["model"]]
        same = same[(same.model != "average") & (same.target != "average")]
        if not len(same):
            assert average["metric"] in ("training_time", "modularizing_time"), "printed for the average only"
            continue
        checked += 1
        half = steps[average["system"], average["metric"]]
        assert abs(same.value.mean() - average["value"]) <= half * (1 + 1e-6), average
    expected = {"cnnsplitter_table2": 1, "cnnsplitter_table3": 12, "cnnsplitter_table4": 12,
                "mwt_table2": 6, "mwt_table3": 10, "mwt_table4": 3, "mwt_table5": 9, "mwt_table6": 18,
                "mwt_table7": 27, "mwt_table8": 18}
    assert checked == expected.get(name, 0)


def test_averages_printed_alone():
    "MwT's Table 4 gives three averages without their lines; they follow from times and numbers of epochs"
    numbers = read_published("mwt_table4")
    lines = numbers[numbers.model != "average"]
    lines = lines.pivot_table(index="line", columns=["system", "metric"], values="value")
    minutes = {("mwt", "training_time"): (lines["mwt", "epoch_time"] * lines["mwt", "epochs"]).mean() / 60,
               ("plain", "training_time"): (lines["plain", "epoch_time"] * lines["plain", "epochs"]).mean() / 60,
               ("cnnsplitter", "modularizing_time"):
               (lines["cnnsplitter", "generation_time"] * lines["cnnsplitter", "generations"]).mean() / 60}
    for (system, metric), value in minutes.items():
        printed = one("mwt_table4", line="average", system=system, metric=metric).value / 60
        assert abs(printed - value) <= 0.5, (system, metric, printed, value)


def test_averages_of_the_texts():
    "MODA's tables give its headline numbers, but those of Table 2 on CIFAR-10 only"
    first = read_published("moda_table1")
    mean = first.groupby(["metric", "system"])["value"].mean()
    assert [round(100 * mean["accuracy", s], 2) for s in ("plain", "mwt", "moda")] == [85.20, 68.09, 84.68]
    time = first[first.metric == "training_time"].pivot_table(index="line", columns="system", values="value")
    assert 100 * (time.moda / time.plain - 1).mean() == pytest.approx(40.67, abs=0.01)
    assert 100 * (time.mwt / time.plain - 1).mean() == pytest.approx(106.09, abs=0.01)
    assert 100 * (1 - time.moda / time.mwt).mean() == pytest.approx(29.23, abs=0.01)
    third = read_published("moda_table3")
    third = third[~third.details.str.contains("compactness")].groupby("metric")["value"].mean()
    assert [round(100 * third[m], 2) for m in ("module_size", "overlap")] == [8.84, 5.41]
    assert [round(100 * third[f"{m}_saving"], 1) for m in ("module_size", "overlap")] == [24.2, 21.8]
    second = read_published("moda_table2")
    second["weak"] = [json.loads(text)["weak"] for text in second.details]
    keys = ["system", "weak", "metric"]
    both, cifar = (frame.groupby(keys)["value"].mean() for frame in (second, second[second.dataset == "cifar10"]))
    expected = {("moda", "overfitting"): (10.11, 6.71, 0.28, 0.07), ("moda", "underfitting"): (13.97, 8.37, 6.76, 3.97),
                ("cnnsplitter", "overfitting"): (0.90, 0.37, 1.42, 1.09),
                ("cnnsplitter", "underfitting"): (0.31, -0.88, 2.56, 1.98)}
    for key, values in expected.items():
        found = [frame[*key, metric] for metric in ("target_change", "other_change") for frame in (cifar, both)]
        assert found == pytest.approx(values, abs=0.0051), key


def test_gains_of_cnnsplitter():
    "Mean gains in the text: 18.64 and 6.44 points of precision, 1.18 of accuracy on the others, by numbers of networks"
    def gain(name, kind):
        numbers = read_published(name)
        numbers = numbers[numbers.target != "average"]
        table = numbers.pivot_table(index=["line"], columns="metric", values="value")
        return 100 * (table[f"patched_{kind}"] - table[f"weak_{kind}"])
    third, fourth = gain("cnnsplitter_table3", "precision"), gain("cnnsplitter_table4", "precision")
    assert (round(third.mean(), 2), round(fourth.mean(), 2)) == (18.64, 6.44)
    assert (sum(third > 0), len(third), sum(fourth > 0), len(fourth)) == (58, 60, 30, 30)
    others = gain("cnnsplitter_table6", "other_accuracy")
    weights = [10 if "cifar10" in line else 5 for line in others.index]  # target classes
    assert numpy.average(others, weights=weights) == pytest.approx(1.18, abs=0.005)


# The bootstrap


few = st.lists(st.floats(0, 1), min_size=2, max_size=6)


@settings(deadline=None, max_examples=25)
@given(values=few, seed=st.integers(0, 2**32), level=st.sampled_from([0.5, 0.9, 0.95]))
def test_interval_against_a_loop(values, seed, level):
    generator, means = numpy.random.default_rng(seed), []
    for _ in range(200):
        drawn = [values[generator.integers(0, len(values))] for _ in values]
        means.append(sum(drawn) / len(drawn))
    means.sort()

    def quantile(q):
        place = q * (len(means) - 1)
        below = math.floor(place)
        return means[below] + (place - below) * (means[min(below + 1, len(means) - 1)] - means[below])

    low, high = bootstrap_interval(values, level, draws=200, seed=seed)
    assert low == pytest.approx(quantile((1 - level) / 2), abs=1e-12)
    assert high == pytest.approx(quantile((1 + level) / 2), abs=1e-12)
    assert min(values) - 1e-12 <= low <= high + 1e-12 <= max(values) + 2e-12
    assert (low, high) == bootstrap_interval(values, level, draws=200, seed=seed)


def test_interval_of_few_runs():
    assert all(math.isnan(bound) for bound in bootstrap_interval([0.5]) + bootstrap_interval([]))
    assert bootstrap_interval([0.2, 0.6]) == (0.2, 0.6)
    assert bootstrap_interval([0.2, 0.3, 0.6]) == pytest.approx((0.2, 0.6))
    assert bootstrap_interval([0.4] * 5) == pytest.approx((0.4, 0.4))
    for level in (0, 1, -1, 95):
        with pytest.raises(ValueError, match="level"): bootstrap_interval([0.2, 0.3], level=level)
    with pytest.raises(ValueError, match="draws"): bootstrap_interval([0.2, 0.3], draws=0)


# Ours beside theirs


FULL = {"width": 1.0, "image_size": 0, "train_limit": 0, "test_limit": 0, "augment": True, "flip": None, "epochs": 200,
        "batch_size": 128, "lr": 0.05, "schedule": "cosine", "weight_decay": 0.0, "valid": 0.0,
        "precision": "float32", "nesterov": True, "batch_norm": None, "dropout": None}
MWT = {"w_cohesion": 0.5, "w_coupling": 1.5, "generators": "released"}
SEARCH = FULL | {"lr": 0.01, "schedule": "steps", "weight_decay": 1e-4, "valid": 0.2, "nesterov": False, "keep": "best",
                 "normalisation": "imagenet", "rules": "released", "population": 100, "parents": 50, "elites": 20,
                 "generations": 200, "patience": 20, "fewest": 50, "most": 500, "mutation_rate": 0.05,
                 "keep_sensitive": "0.6,0.7,0.8", "keep_insensitive": "0.4,0.5,0.6,0.7",
                 "sensitive_layers": "0,1,2,3,4,5,6", "initial_bias": 0.1, "grouping": "importance",
                 "start": "sensitivity", "min_confidence": 0.9, "search_images": 0, "search_seed": 3}
MODA = {"affinity": 1.0, "dispersion": 1.0, "compactness": 0.3, "compactness_form": "mean"}
COUNTED = {"keep_threshold": 0.9, "empty": "top_share", "augment_counting": True}
WEAK = {"recipe": "released", "weak_width": 1.0, "weak_epochs": 0, "weak_batch_size": 128, "weak_lr": 0.01,
        "division": "released", "range_by": "minmax", "range_from": "target", "clip": False, "weak_dataset": "cifar",
        "masks": "masks.safetensors"}


def runs(values, metric="accuracy", system="mwt", model="vgg16", dataset="cifar10", classes=None, split="test",
         config=FULL | MWT, first=0):
    "Rows of one number for each seed"
    describe = lambda seed: describe_run("full", system, model, dataset, seed, config)
    return [row for seed, value in enumerate(values, first)
            for row in make_rows(describe(seed), {metric: value}, classes, split)]


def frame(*lists): return pandas.DataFrame([row for rows in lists for row in rows])


def cells(found): return found[found.n > 0]


def test_nothing_run_is_empty():
    found = beside(frame(runs([])).reindex(columns=list(runs([0.9])[0])), "mwt_table3")
    assert (found.n == 0).all() and (found.differs == "").all()
    assert found[["ours", "sd", "min", "max", "low", "high", "difference", "inside"]].isna().all(axis=None)
    assert len(found) == len(read_published("mwt_table3")) and found.published.notna().all()


def test_like_for_like():
    values = [0.905, 0.911, 0.908, 0.9]
    found = cells(beside(frame(runs(values)), "mwt_table2"))
    assert len(found) == 1
    line = found.iloc[0]
    assert (line.line, line.system, line.metric, line.n) == ("vgg16 cifar10", "mwt", "accuracy", 4)
    assert line.ours == pytest.approx(statistics.mean(values)) and line.sd == pytest.approx(statistics.stdev(values))
    assert (line["min"], line["max"]) == (0.9, 0.911)
    assert (line.low, line.high) == bootstrap_interval(values)
    assert line.difference == pytest.approx(statistics.mean(values) - 0.9086) and line.inside and line.differs == ""


def test_one_run_has_no_spread():
    line = cells(beside(frame(runs([0.905])), "mwt_table2")).iloc[0]
    assert line.n == 1 and line.ours == 0.905 and line.inside
    assert math.isnan(line.sd) and math.isnan(line.low) and math.isnan(line.high)


def test_runs_are_averaged_within_first():
    "A run with many sub-tasks weighs as much as one with few"
    config = FULL | {"subtasks_per_size": 10}
    pairs = [["a", name] for name in "bcdefghijkl"]
    test = lambda value, pair, seed: runs([value], classes=pair, config=config, system="plain", first=seed)
    rows = [row for i, pair in enumerate(pairs) for row in test(0.9 if i else 0.79, pair, 0)]
    rows += [row for pair in pairs[:10] for row in test(0.95, pair, 1)]
    line = cells(beside(frame(rows), "mwt_table7")).iloc[0]
    assert line.line == "vgg16 cifar10, 2 classes" and line.n == 2
    assert line.ours == pytest.approx(((0.79 + 10 * 0.9) / 11 + 0.95) / 2)
    few = frame(rows[:-1])  # the second run lacks a pair
    assert not len(cells(beside(few, "mwt_table7")))
    assert cells(beside(few, "mwt_table7", smaller=True)).differs.tolist() == ["9 sub-tasks instead of 10"]


@pytest.mark.parametrize("change", [
    {"width": 0.5}, {"epochs": 199}, {"train_limit": 1000}, {"test_limit": 500}, {"augment": False}, {"batch_size": 64},
    {"lr": 0.1}, {"schedule": "onecycle"}, {"weight_decay": 5e-4}, {"valid": 0.1}, {"flip": False}, {"image_size": 16},
    {"w_coupling": 3.0}, {"generators": "paper"}, {"precision": "bfloat16"}])
def test_another_recipe_is_never_compared(change):
    rows = frame(runs([0.9086] * 3, config=FULL | MWT | change))
    assert not len(cells(beside(rows, "mwt_table2")))
    shown = cells(beside(rows, "mwt_table2", smaller=True))
    assert len(shown) == 1 and next(iter(change)) in shown.differs.iloc[0]
    assert math.isnan(shown.difference.iloc[0]) and pandas.isna(shown.inside.iloc[0])
    text = beside_text(beside(rows, "mwt_table2", smaller=True), run_only=True).iloc[0]
    assert text.notes.startswith("NOT THE SAME EXPERIMENT") and text.difference == text.within == ""


@pytest.mark.parametrize("missing", FULL | MWT)
def test_a_setting_that_is_not_recorded_differs(missing):
    config = {name: value for name, value in (FULL | MWT).items() if name != missing}
    found = beside(frame(runs([0.9], config=config)), "mwt_table2")
    older = ("generators", "nesterov", "batch_norm", "dropout")  # rows from before there was a choice have none
    assert len(cells(found)) == (missing in older)


def test_models_and_datasets_are_not_swapped():
    for change in ({"model": "vgg16_4096"}, {"model": "vgg12"}, {"dataset": "digits"}, {"dataset": "cifar100"}):
        assert not len(cells(beside(frame(runs([0.9], **change)), "mwt_table2"))), change
    svhn = FULL | MWT | {"w_cohesion": 1.0, "w_coupling": 2.0}
    flipped = beside(frame(runs([0.9], dataset="svhn", config=svhn | {"flip": True})), "mwt_table2")
    assert cells(flipped).line.tolist() == ["vgg16 svhn"]
    assert not len(cells(beside(frame(runs([0.9], dataset="svhn", config=svhn)), "mwt_table2")))


def test_smaller_runs_stand_by_their_own_lines():
    small = FULL | MWT | {"width": 0.25}
    known = beside(frame(runs([0.6], config=small)), "mwt_table2", smaller=True)
    assert cells(known).line.tolist() == ["vgg16 cifar10"]
    other = beside(frame(runs([0.99], model="vgg12", dataset="digits", config=small)), "mwt_table2", smaller=True)
    assert set(cells(other).line) == {"vgg16 cifar10", "vgg16 svhn", "resnet18 cifar10", "resnet18 svhn"}
    assert cells(other).differs.str.startswith("model vgg12 instead of ").all()
    three = frame(runs([0.9]), runs([0.6], config=small), runs([0.5], config=small | {"epochs": 5}))
    both = cells(beside(three, "mwt_table2", smaller=True))
    assert both.ours.tolist() == [0.9, 0.6, 0.5] and both.differs.astype(bool).tolist() == [False, True, True]


def test_validation_and_training_accuracy_are_left_out():
    assert not len(cells(beside(frame(runs([0.9], split="valid"), runs([0.9], split="train")), "mwt_table2")))
    config = FULL | MWT | {"keep_threshold": 0.9, "empty": "relax", "augment_counting": True}
    retention = runs([0.17], metric="masked_retention", split="train", config=config)
    assert cells(beside(frame(retention), "mwt_table2")).metric.tolist() == ["masked_retention"]
    assert not len(cells(beside(frame(runs([0.17], metric="masked_retention", split="train")), "mwt_table2")))


@pytest.mark.parametrize("changed, said", [
    ({"warmup": 0.5}, "warmup 0.5 instead of 0"), ({"label_smoothing": 0.1}, "label_smoothing 0.1 instead of 0"),
    ({"dropout": 0.3}, "dropout 0.3 instead of None"), ({"head_weights": "scaled"}, "head_weights scaled instead of"),
    ({"mask_slope": 0.1}, "mask_slope 0.1 instead of 1"), ({"floor": 0.5}, "floor"), ({"max_norm": 1.0}, "max_norm")])
def test_a_run_with_something_of_ours_is_no_published_one(changed, said):
    as_published = {"warmup": 0.0, "label_smoothing": 0.0, "dropout": None, "head_weights": "published",
                    "mask_slope": 1.0, "floor": 0.0, "max_norm": None, "average": "pairs"}
    shown = [beside(frame(runs([0.9], config=FULL | MWT | as_published | more)), "mwt_table2", smaller=True)
             for more in ({}, changed)]
    assert [set(each[each.n > 0].differs) == {""} for each in shown] == [True, False]
    assert said in shown[1][shown[1].n > 0].differs.iloc[0]


@pytest.mark.parametrize("change, said", [
    ({"nesterov": False}, "nesterov False instead of True"), ({"new": 1}, "new 1, of which the recipe says nothing"),
    ({"image_size": 32}, "image_size 32, 0 in the cell")])
def test_configurations_are_never_mixed(change, said):
    rows = frame(runs([0.9, 0.92]), runs([0.5], config=FULL | MWT | change, first=2))
    found = cells(beside(rows, "mwt_table2", smaller=True))
    assert found[["ours", "differs"]].to_numpy().tolist() == [[pytest.approx(0.91), ""], [0.5, said]]
    assert cells(beside(rows, "mwt_table2")).ours.tolist() == [pytest.approx(0.91)]


def test_settings_that_decide_nothing_do_no_harm():
    "Three studies asked for the same network, and looked at it in their own ways"
    ways = ({}, {"record": True, "sizes": "2,3", "subtasks_per_size": 10}, {"how": "masked", "keep_threshold": 0.5})
    rows = frame(*(runs([0.9, 0.92], config=FULL | MWT | way) for way in ways))
    rows["study"] = [f"study {number // 2}" for number in range(6)]
    found = cells(beside(rows, "mwt_table2", smaller=True))
    assert found[["ours", "n", "differs"]].to_numpy().tolist() == [[pytest.approx(0.91), 2, ""]]


def test_two_stages_have_to_agree():
    "The same number, measured twice with the same of all that decides it"
    looked = FULL | MWT | {"keep_threshold": 0.9, "empty": "relax", "augment_counting": True}
    ways = [looked | {"sizes": sizes} for sizes in ("2,3", "5")]

    def rows(other): return frame(*(runs([value], "masked_retention", split="train", config=config)
                                    for value, config in zip((0.2, other), ways, strict=True))).assign(run="a")
    assert cells(beside(rows(0.2001), "mwt_table2")).ours.tolist() == [0.2]
    told = "a: two stages found 0.2 and 0.3 for masked_retention of all.* sizes 2,3 and 5"
    with pytest.raises(ValueError, match=told):
        beside(rows(0.3), "mwt_table2")


@pytest.mark.parametrize("change", [{"grouping": "none"}, {"rules": "paper"}, {"mutation_rate": 0.9}, {"elites": 0},
                                    {"start": "random"}, {"search_images": 150}, {"keep_sensitive": "0.9"}])
def test_a_search_by_other_choices_is_no_published_one(change):
    rows = frame(runs([0.86], "composed_accuracy", "cnnsplitter", "simcnn", config=SEARCH | change))
    assert not len(cells(beside(rows, "cnnsplitter_table1"))) and not len(cells(beside(rows, "mwt_table3")))
    rows = frame(runs([0.86], "composed_accuracy", "cnnsplitter", "simcnn", config=SEARCH))
    assert len(cells(beside(rows, "cnnsplitter_table1"))) == len(cells(beside(rows, "mwt_table3"))) == 1


def test_hashes_and_units_are_checked():
    rows = frame(runs([0.9]), runs([0.8], first=1, config=FULL))
    rows["config_hash"] = "same"
    with pytest.raises(ValueError, match="'same' stands for different"): beside(rows, "mwt_table2")
    rows = frame(runs([0.9]))
    rows["unit"] = "percentage points"
    with pytest.raises(ValueError, match="accuracy in percentage points, it is in fraction"): prepare_rows(rows)
    rows = rows.drop(columns=["seed", "config"])
    with pytest.raises(ValueError, match="rows have no seed, config: "): prepare_rows(rows)


def test_superseded_values_and_averages_are_not_compared():
    rows = frame(runs([0.47, 0.48], "coupling", "cnnsplitter", "simcnn", split="train", config=SEARCH))
    found = beside(rows, "mwt_table3")
    assert cells(found)[["line", "reading"]].to_numpy().tolist() == [["simcnn cifar10", "corrected"]]
    assert cells(found).difference.iloc[0] == pytest.approx(0.475 - 0.4723)


@pytest.mark.parametrize("ours", [{"relative_goals": True}, {"importance_images": 10_000}, {"fewest_sure": 50},
                                  {"search_precision": "bfloat16"}])
def test_a_search_with_something_of_ours_is_no_published_one(ours):
    shown = [cells(beside(frame(runs([0.47], "coupling", "cnnsplitter", "simcnn", split="train", config=SEARCH | more)),
                          "mwt_table3")) for more in ({}, ours)]
    assert [len(found) for found in shown] == [1, 0]


def test_all_sub_tasks():
    config = FULL | MODA | COUNTED | {"subtasks_per_size": 0, "sizes": "2,3,4,5,6,7,8,9,10"}
    sets = [set_ for size in range(2, 11) for set_ in itertools.combinations("abcdefghij", size)]
    about = describe_run("full", "moda", "vgg16_4096", "cifar10", 0, config)
    rows = [row for classes in sets for row in make_rows(about, {"composed_accuracy": 0.94}, classes)]
    assert not len(cells(beside(frame(rows[1:]), "moda_table3")))
    found = cells(beside(frame(rows), "moda_table3"))
    assert found.line.tolist() == ["vgg16_4096 cifar10, all sub-tasks"] and found.n.tolist() == [1]
    without = runs([0.02], "module_size", "moda", "vgg16_4096", split="train", config=config | {"compactness": 0.0})
    assert cells(beside(frame(without), "moda_table3")).line.tolist() == ["vgg16_4096 cifar10, compactness 0"]
    by_contribution = runs([0.01], "module_size", "moda", "vgg16_4096", split="train",
                           config=config | {"masks_by": "contribution"})
    assert not len(cells(beside(frame(by_contribution), "moda_table3"))), "modules found in another way"
    config |= {"subtasks_per_size": 10}
    some = runs([0.94], "composed_accuracy", "moda", "vgg16_4096", classes=sets[0], config=config)
    assert not len(cells(beside(frame(some), "moda_table3")))


def test_ten_classes_are_all():
    "Sub-tasks of all ten classes stand by their line; without them, the whole network does"
    config, names = FULL | {"subtasks_per_size": 10}, [str(n) for n in range(10)]
    whole = runs([0.92], system="plain", config=FULL)
    found = cells(beside(frame(whole), "mwt_table7"))
    assert found.line.tolist() == ["vgg16 cifar10, 10 classes"]
    found = cells(beside(frame(whole, runs([0.93], system="plain", config=config, classes=names)), "mwt_table7"))
    assert found.ours.tolist() == [0.93]


def test_targets():
    config = SEARCH | WEAK | {"weak": "simple"}
    rows = runs([0.8], "patched_precision", "cnnsplitter", "simcnn", classes=["cat"], config=config)
    found = cells(beside(frame(rows), "cnnsplitter_table3"))
    assert found.line.tolist() == ["simcnn cifar10, cat, weak simple"] and found.published.tolist() == [0.6477]
    config |= {"weak_epochs": 10}
    short = runs([0.8], "patched_precision", "cnnsplitter", "simcnn", classes=["cat"], config=config)
    assert not len(cells(beside(frame(short), "cnnsplitter_table3"))), "another weak network"


def test_networks_for_five_classes_have_their_own_recipe():
    "CNNSplitter patched weak networks for digits with modules of networks that know five of them"
    about = {"system": "cnnsplitter", "model": "simcnn", "dataset": "svhn", "classes": ["0"]}
    config = SEARCH | WEAK | {"weak": "simple", "flip": True, "accuracy_goal": 0.95, "mutation_rate": 0.1}
    five = config | {"only_classes": "0,1,2,3,4", "population": 50, "parents": 50, "generations": 100,
                     "weak_dataset": "svhn", "combination_thresholds": "2:0.95,4:0.9,5:0.85",
                     "sensitive_layers": "0,1,2,3,4", "keep_sensitive": "0.4,0.5,0.6,0.7",
                     "keep_insensitive": "0.3,0.4"}
    for recorded, n in ((config, 0), (five, 1), (five | {"only_classes": ""}, 0)):
        rows = runs([0.95], "patched_precision", **about, config=recorded)
        assert len(cells(beside(frame(rows), "cnnsplitter_table4"))) == n, recorded


TUNED = {"keep_threshold": 0.9, "empty": "relax", "augment_counting": True, "subtasks_per_size": 10, "head": "released",
         "tune_epochs": 10, "tune_lr": 0.05, "tune_batch_size": 128, "tune_falls": "to half", "tune_select": "test",
         "tune_precision": "float32"}


@pytest.mark.parametrize("change", [
    {"tune_select": "last"}, {"tune_falls": "to zero"}, {"tune_precision": "bfloat16"}, {"augment_counting": False},
    {"empty": "top_share"}, {"precision": "bfloat16"}])
def test_fine_tuning_counts_as_the_program_has_it(change):
    "MwT's program takes the epoch that is best on test images; any other rule stands apart and says so"
    pairs = list(itertools.combinations("0123456789", 2))[:10]
    rows = lambda config: frame(*(runs([0.99], "tuned_accuracy", classes=pair, config=config) for pair in pairs))
    assert cells(beside(rows(FULL | MWT | TUNED), "mwt_table7")).line.tolist() == ["vgg16 cifar10, 2 classes"]
    honest = rows(FULL | MWT | TUNED | change)
    assert not len(cells(beside(honest, "mwt_table7")))
    shown = cells(beside(honest, "mwt_table7", smaller=True))
    assert next(iter(change)) in shown.differs.iloc[0]
    both = pandas.concat([rows(FULL | MWT | TUNED), honest])
    assert len(cells(beside(both, "mwt_table7"))) == 1, "never averaged"


def test_cohesion_is_over_all_images():
    config = FULL | MWT | TUNED | {"cohesion_images": -1}
    rows = lambda images: frame(runs([0.97], "cohesion", split="train", config=config | {"cohesion_images": images}))
    assert [len(cells(beside(rows(images), "mwt_table2"))) for images in (-1, 500)] == [1, 0]


@pytest.mark.parametrize("model, dataset, weights", [
    ("vgg16_4096", "svhn", (1.0, 2.0)), ("resnet18", "svhn", (1.3, 1.5)), ("mobilenet", "svhn", (0.5, 1.5)),
    ("resnet18", "cifar100", (0.5, 1.5))])
def test_weights_of_mwt_in_the_other_paper(model, dataset, weights):
    number = one("moda_table1", system="mwt", model=model, dataset=dataset, metric="accuracy")
    wanted = recipe(number)
    assert (wanted["w_cohesion"][0], wanted["w_coupling"][0]) == weights


def test_replaced_modules():
    "MODA's second table has weak and strong models with settings of their own"
    config = {"width": 1.0, "strong_epochs": 200, "strong_batch_size": 128, "strong_lr": 0.05,
              "strong_schedule": "cosine", "strong_classes": "", "image_size": 0, "adaptation_batch_size": 128,
              "adaptation_lr": 0.05, "dispersion": 1.0, "precision": "float32", **COUNTED, "flip": None,
              "weak_system": "moda", "weak_model": "lenet5", "weak_image_share": 0.1, "weak_epochs": 200,
              "weak_batch_size": 128, "weak_lr": 0.05, "underfit_epoch": 10, "overfit_epoch": 195,
              "weak": "overfitting", "adaptation_epochs": 20, "inputs": "raw", "fed_with": "module"}
    rows = lambda system, **changes: frame(runs([3.0], "target_change", system, "vgg16_4096", classes=["cat"],
                                                config=config | changes))
    patch = {"adaptation_epochs": 0, "inputs": "none", "fed_with": "patch, range of all classes"}
    tried = (("moda", {}, 1), ("moda", {"inputs": "standardised"}, 0), ("moda", {"fed_with": "own logit"}, 0),
             ("cnnsplitter", patch, 1), ("cnnsplitter", patch | {"fed_with": "patch"}, 0))
    for system, changes, n in tried:
        assert len(cells(beside(rows(system, **changes), "moda_table2"))) == n, (system, changes)


def test_times_need_the_same_gpu():
    rows = frame(runs([24 * 200.0], "training_time", "moda", "resnet18", split="train", config=FULL | MODA))
    assert not len(cells(beside(rows, "moda_table1")))
    shown = cells(beside(rows, "moda_table1", smaller=True))
    assert shown.differs.str.contains("instead of V100").all() and len(shown) == 1
    rows["hardware"] = "Tesla V100-SXM2-32GB"
    assert cells(beside(rows, "moda_table1")).differs.tolist() == [""]
    both = pandas.concat([rows, rows.assign(hardware="Tesla V100-PCIE", value=7.0, seed=1)])
    found = cells(beside(both, "moda_table1", smaller=True))
    assert found.ours.tolist() == [4800.0, 7.0], "never averaged"
    assert found.differs.tolist() == ["", "hardware Tesla V100-PCIE, Tesla V100-SXM2-32GB in the cell"]


def test_tolerance():
    rows = frame(runs([0.9086 + 0.01]))
    check = lambda **options: bool(cells(beside(rows, "mwt_table2", **options)).inside.iloc[0])
    assert check() and TOLERANCE["fraction"] == (0.01, 0.0)
    assert not check(tolerance={"fraction": (0.005, 0.0)})
    assert check(tolerance={"fraction": (0.005, 0.0), "accuracy": (0.0, 0.02)})
    found = beside(rows, "mwt_table2", tolerance={"accuracy": (0.001, 0.01)})
    assert cells(found).tolerance.iloc[0] == pytest.approx(0.001 + 0.009086)
    with pytest.raises(ValueError, match="tolerance for percent"): check(tolerance={"percent": (1, 0)})


@each_table
def test_recipes_know_all_numbers(name):
    "Each published number has a recipe, and a row made by it is like for like"
    for number in read_published(name).to_dict("records"):
        if "average" in (number["model"], number["target"]): continue
        wanted = recipe(number)
        config = {setting: accepted[0] for setting, accepted in wanted.items()}
        row = {"model": number["model"], "dataset": number["dataset"], "hardware": "A100 V100"}
        assert what_differs(number, row, config) == [], number
        for setting in (setting for setting, accepted in wanted.items() if "any" not in accepted):
            assert what_differs(number, row, config | {setting: "else"}) != []


def test_the_measured_studies_are_small():
    "Nothing in results/ is a full run yet: it may be shown, and is not compared"
    for path in sorted((ROOT / "results").glob("*.csv")):
        rows = read_rows(path)
        config = [json.loads(text) for text in rows.config.unique()]
        if any(c.get("width") == 1 and c.get("epochs") == 200 for c in config): continue
        found = side_by_side(rows, smaller=True, draws=10)
        assert list(found) == list(TABLES)
        shown = pandas.concat(cells(table) for table in found.values())
        assert (shown.differs != "").all() and shown.inside.isna().all()
        assert len(shown) or not set(rows.system) & {"plain", "moda", "mwt", "cnnsplitter"}, f"{path.name} is not shown"


# Text


def test_text_for_people():
    assert number_text(0.9229, "fraction") == "92.29 %" and number_text(0.01, "fraction", sign=True) == "+1.00 pp"
    assert number_text(315.1e6, "multiply-adds") == "315.1 M" and number_text(4224, "count") == "4,224"
    assert number_text(-0.28, "percentage points") == "-0.28 pp" and number_text(4800.0, "seconds") == "4,800.0 s"
    found = beside(frame(runs([0.905, 0.911])), "mwt_table2")
    text = beside_text(found)
    assert len(text) == len(found) and len(beside_text(found, run_only=True)) == 1
    line = beside_text(found, run_only=True).iloc[0]
    assert (line.published, line.ours, line.n, line.interval) == ("90.86 %", "90.80 %", "2", "[90.50 %, 91.10 %]")
    assert (line.difference, line.within) == ("-0.06 pp", "inside ±1.00 pp")
    assert (text.query("ours == ''")[["n", "interval", "difference", "within"]] == "").all(axis=None)
    table = markdown_table(text, "mwt_table2")
    assert len(re.findall("^\\|", table, re.MULTILINE)) == len(text) + 2 and "<td>90.80 %</td>" in text.to_html()
    marked = beside_text(beside(frame(runs([0.9])), "mwt_table3"))
    assert marked.notes.str.startswith("as printed").sum() == marked.notes.str.startswith("corrected").sum() == 5
    assert beside_text(beside(frame(runs([0.9])), "moda_table1")).published.iloc[0] == "95.85 % ± 0.06 %"


# What is known of the others


def test_what_others_report_adds_up_to_what_their_abstracts_say():
    "Every line is complete, every table says where it is from and what to keep in mind, and means can be recomputed"
    tables = facts("family")
    for name, table in tables.items():
        assert table["shows"] and table["from"] and table["caveats"] and table["method"].lower() == name.split("_")[0]
        assert {len(line) for line in table["lines"]} == {len(table["columns"])}
    column = lambda name, *places: [numpy.array([line[p] for line in tables[name]["lines"]], float) for p in places]
    best, composed = column("gradsplitter_accuracy", 2, 3)
    assert (composed - best).mean() == pytest.approx(5.22, abs=0.005)
    numbers = column("gradsplitter_patching", *range(3, 9))
    gains = [(after - before).mean() for before, after in zip(numbers[::2], numbers[1::2])]
    assert gains == pytest.approx([17.13, 4.95, 11.47], abs=0.01)
    weights, left, removed, before, after = column("seam_problems", 3, 4, 5, 6, 7)
    assert removed.mean() == pytest.approx(89.89, abs=0.01) and (after - before).mean() == pytest.approx(5.85, abs=0.01)
    assert 100 * (1 - left / weights) == pytest.approx(removed, abs=0.025), "weights are printed in hundredths"
    twice = [line for line in tables["nemo_weights"]["lines"] if line[:2] == [1.4, 0.2]]
    assert len(twice) == 2 and abs(twice[0][2] - twice[1][2]) == pytest.approx(0.0015)
