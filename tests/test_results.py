"""Rows: what is written is what is read, nothing invalid gets into a file, and summaries are plain statistics."""

import csv
import json
import math
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modnb
from modnb.lab import results
from modnb.lab.results import (
    FIELDS,
    MAY_BE_EMPTY,
    METRICS,
    UNITS,
    canonical,
    class_set,
    code_version,
    compare,
    compare_systems,
    config_hash,
    count_classes,
    describe_run,
    hardware_name,
    make_rows,
    markdown_table,
    read_rows,
    spread_text,
    summarise,
    write_rows,
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1).filter(str.strip)


def row(**changes) -> dict:
    run = describe_run("study", "plain", "lenet5", "digits", 0, {"epochs": 1}, run="study/a")
    return make_rows(run, {"accuracy": 0.5})[0] | changes


# Writing and reading


@given(value=numbers | st.none(), seed=st.integers(-(2**62), 2**62), words=st.lists(words, min_size=3, max_size=3))
def test_written_rows_are_read_back(tmp_path_factory, value, seed, words):
    one = row(value=value, seed=seed, run=words[0], model=words[1], dataset=words[2])
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", [one])
    back = read_rows(path).to_dict("records")[0]
    assert math.isnan(back.pop("value")) if value is None else back.pop("value") == value
    assert math.isnan(back.pop("seconds"))
    assert back == {k: v for k, v in one.items() if k not in ("value", "seconds")}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_checked(tmp_path, field):
    path = tmp_path / "rows.csv"
    missing = {k: v for k, v in row().items() if k != field}
    with pytest.raises(ValueError, match=f"row 2, field '{field}': is missing"): write_rows(path, [row(), missing])
    with pytest.raises(ValueError, match=f"row 1, field '{field}': is b'x'"): write_rows(path, [row(**{field: b"x"})])
    if field in MAY_BE_EMPTY: write_rows(path, [row(**{field: "" if FIELDS[field][0] is str else None})])
    else:
        with pytest.raises(ValueError, match=f"row 3, field '{field}': is empty"):
            write_rows(path, [row(), row(), row(**{field: None})])
        assert not path.exists()


@pytest.mark.parametrize("wrong", [{"value": float("inf")}, {"value": True}, {"seed": 1.0}, {"seed": True},
                                   {"unit": "percent"}, {"split": "training"}, {"extra": 1}])
def test_wrong_rows_leave_the_old_file(tmp_path, wrong):
    path = write_rows(tmp_path / "rows.csv", [row()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"row 2, field '{next(iter(wrong))}'"): write_rows(path, [row(), row(**wrong)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.csv", [row()])
    before = path.read_bytes()

    class Full(csv.DictWriter):
        def writerow(self, row): raise OSError("no space left on device")

    monkeypatch.setattr(results.csv, "DictWriter", Full)
    with pytest.raises(OSError, match="no space"): write_rows(path, [row(), row()])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_writers_at_once_never_mix(tmp_path):
    path = tmp_path / "rows.csv"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: write_rows(path, [row(seed=seed)] * 50), range(16)))
    assert len(read_rows(path)) == 50 and read_rows(path).seed.nunique() == 1


def test_a_file_can_be_read_and_written_again(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [row(), row(value=None, split="")])
    before = path.read_text()
    assert write_rows(path, read_rows(path).to_dict("records")).read_text() == before


def test_reading_folders(tmp_path):
    write_rows(tmp_path / "b/rows_train.csv", [row(run="b")])
    write_rows(tmp_path / "a/rows_train.csv", [row(run="a")])
    (tmp_path / "a/other.csv").write_text("not,rows\n1,2\n")
    assert list(read_rows(tmp_path).run) == ["a", "b"]
    assert list(read_rows([tmp_path / "b", tmp_path / "a/rows_train.csv"]).run) == ["b", "a"]
    with pytest.raises(ValueError, match="there is no file of rows .*c.csv"): read_rows(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="no rows.*csv below"): read_rows([])


@pytest.mark.parametrize("old, new, message", [
    (",digits,", ",,", "row 1, field 'dataset': is empty"),
    (",0.5,", ",half,", "row 1, field 'value': is 'half'"),
    (",seed,", ",sead,", "row 1, field 'se[ae]d'"),
    ("plain", "plain,plain", "row 1, field"),
])
def test_edited_files_are_refused_by_name(tmp_path, old, new, message):
    path = write_rows(tmp_path / "rows.csv", [row()])
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"rows.csv: {message}"): read_rows(path)


@pytest.mark.parametrize("change, message", [
    (lambda text: text.replace('"{""epochs"":1}"', "{bad"), "row 1, field 'config': is no JSON .* \\(line 2\\)"),
    (lambda text: text.replace('"{""epochs"":1}"', "[]"), "row 1, field 'config': is '\\[\\]', not a JSON object"),
    (lambda text: text.replace('""epochs"":1', '""epochs"":9'), "row 1, field 'config': does not fit config_hash"),
    (lambda text: text.replace(config_hash({"epochs": 1}), "0123456789"),
     "row 1, field 'config': does not fit .* '01234"),
    (lambda text: "", "the file is empty, not even a heading"),
    (lambda text: text.replace("study,", "run,", 1), "the heading names a column twice"),
    (lambda text: text + "x" * 200_000, "field larger than field limit .*line"),
])
def test_damaged_files_are_refused_with_their_line(tmp_path, change, message):
    path = write_rows(tmp_path / "rows.csv", [row(), row(seed=2)])
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"rows.csv: {message}"): read_rows(path)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [row(), row(dataset="gar\u00e7on")])
    path.write_bytes(path.read_bytes().replace("\u00e7".encode(), b"\xe7"))
    with pytest.raises(ValueError, match="rows.csv: line 3 is no UTF-8 text"): read_rows(path)


# Making rows


def test_every_metric_has_a_known_unit():
    assert {unit for unit, _ in METRICS.values()} <= set(UNITS)


def test_a_new_metric_brings_its_unit():
    run = describe_run("study", "plain", "lenet5", "digits", 0, {})
    with pytest.raises(ValueError, match="no unit for the metric 'watts'"): make_rows(run, {"watts": 3.0})
    made = make_rows(run, {"watts": 3.0}, units={"watts": "ratio"})[0]
    assert (made["metric"], made["unit"]) == ("watts", "ratio")


def test_rows_have_the_fields_in_order():
    assert all(list(r) == list(FIELDS) for r in make_rows(describe_run("s", "p", "m", "d", 0, {}), {"accuracy": 1.0}))


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none() | numbers))
def test_config_hash_ignores_order_and_sees_changes(config):
    backwards = dict(reversed(list(config.items())))
    assert config_hash(config) == config_hash(backwards) and len(config_hash(config)) == 10
    assert json.loads(canonical(config)) == config
    assert config_hash(config | {"one more": 1}) != config_hash({k: v for k, v in config.items() if k != "one more"})


@given(st.lists(st.text().filter(lambda s: "|" not in s), min_size=1, max_size=12, unique=True))
def test_class_sets_are_counted(classes):
    if classes != ["all"]: assert count_classes(class_set(classes)) == len(classes)


def test_class_names_cannot_hide_a_separator():
    with pytest.raises(ValueError, match="must not contain"): class_set(["a|b"])
    assert count_classes(class_set(None)) == 0


# Where it ran


def checkout(folder, monkeypatch) -> None:
    "A package in a git checkout of its own, with no configuration of git"
    for variable in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"): monkeypatch.setenv(variable, "/dev/null")
    (folder / "modnb").mkdir()
    (folder / "modnb/__init__.py").write_text("")
    monkeypatch.setattr(modnb, "__file__", str(folder / "modnb/__init__.py"))


def test_code_version(tmp_path, monkeypatch):
    checkout(tmp_path, monkeypatch)  # a run asks once and remembers; here it is asked anew
    assert code_version.__wrapped__() == modnb.__version__, "no checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert code_version.__wrapped__() == modnb.__version__, "not tracked: a checkout of something else"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    commit = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert code_version.__wrapped__() == f"{modnb.__version__}+g{commit}"
    (tmp_path / "modnb/__init__.py").write_text("changed = 1")
    assert code_version.__wrapped__() == f"{modnb.__version__}+g{commit}.dirty"


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code_version.__wrapped__() == modnb.__version__


def test_hardware_names_threads(monkeypatch):
    monkeypatch.setattr(results.torch, "get_num_threads", lambda: 1)
    assert hardware_name("cpu").endswith(", 1 thread")
    monkeypatch.setattr(results.torch, "get_num_threads", lambda: 7)
    assert hardware_name().endswith(", 7 threads")
    monkeypatch.setattr(results.torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    assert hardware_name("cuda:1") == "GPU cuda:1"


# Summaries


def frame(values: dict) -> pandas.DataFrame:
    "Rows from {(system, run, classes): value}"
    return pandas.DataFrame([row(system=s, run=r, classes=c, value=v) for (s, r, c), v in values.items()])


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), min_size=2, max_size=5))
def test_summaries_are_means_within_and_spread_over_runs(runs):
    values = {("plain", f"run {i}", f"set {j}"): v for i, many in enumerate(runs) for j, v in enumerate(many)}
    line = summarise(frame(values)).iloc[0]
    means = [statistics.fmean(many) for many in runs]
    assert line["n"] == len(runs)
    assert line["mean"] == pytest.approx(statistics.fmean(means), abs=1e-6)
    assert line["sd"] == pytest.approx(statistics.stdev(means), abs=1e-3, rel=1e-6)
    assert (line["min"], line["max"]) == pytest.approx((min(means), max(means)), abs=1e-6)


def test_one_run_has_no_spread():
    line = summarise(frame({("plain", "a", "all"): 0.5})).iloc[0]
    assert line["n"] == 1 and math.isnan(line["sd"]) and line["mean"] == 0.5


def test_what_was_not_measured_is_no_zero():
    line = summarise(frame({("plain", "a", "all"): 0.5, ("plain", "b", "all"): math.nan})).iloc[0]
    assert line["n"] == 1 and line["mean"] == 0.5
    line = summarise(frame({("plain", "a", "all"): math.nan})).iloc[0]
    assert line["n"] == 0 and math.isnan(line["mean"])


def test_different_units_are_never_averaged():
    rows = pandas.DataFrame([row(), row(metric="parameters", unit="count", value=10.0)])
    assert len(summarise(rows)) == 2
    with pytest.raises(ValueError, match="different units in one group"): summarise(rows, by=["system"])
    with pytest.raises(ValueError, match="no column 'sistem'"): summarise(rows, by=["sistem"])


def test_a_table_for_people():
    rows = frame({("plain", "a", "1|2"): 0.9, ("plain", "b", "1|2"): 0.91,
                  ("moda", "c", "1|2"): 0.8, ("moda", "c", "all"): 1.0})
    table = compare(rows, [("two", "accuracy", 2), ("all", "accuracy", 0), ("none", "overlap", 2)])
    assert table.loc["two"].tolist() == ["90.5 [90.0 91.0] %", "80.0 %"]
    assert table.loc["all"].tolist() == ["", "100.0 %"]
    assert table.loc["none"].tolist() == ["", ""]
    text = markdown_table(table).splitlines()
    assert text[0] == "|  | plain | moda |" and text[2] == "| two | 90.5 [90.0 91.0] % | 80.0 % |" and len(text) == 5


def test_validation_images_do_not_count_as_test():
    rows = pandas.DataFrame([row(value=0.5), row(value=0.9, split="valid")])
    assert compare_systems(rows).loc["accuracy", "plain"] == "50.0 %"


@pytest.mark.parametrize("value, unit, text", [(0.123, "fraction", "12.3 %"), (1234.0, "count", "1,234"),
                                               (1.5, "milliseconds", "1.5 ms"), (math.nan, "fraction", "")])
def test_numbers_for_people(value, unit, text):
    assert spread_text(value, value, value, unit) == text
