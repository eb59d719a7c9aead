"""Kills, full disks and readers that leave: what was there stays whole, and the next run clears away what is left."""

import errno
import os
import resource
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from modnb.files import atomic_path, load_tensors, save_tensors, write_text
from modnb.lab.commands import snakemake_words
from modnb.lab.results import describe_run, make_rows, write_rows
from modnb.lab.running import NotebookFailed, run_notebook

ROOT = Path(__file__).parents[1]
ALONE = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
row = make_rows(describe_run("study", "plain", "lenet5", "digits", 0, {}), {"accuracy": 0.5})[0]
needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals and locks of POSIX")


@needs_posix
def test_a_dozen_kills_change_nothing():
    "One or two of each task; `make torture` has more."
    ran = subprocess.run([sys.executable, ROOT / "tests/torture.py", "--kills", "12"], env=ALONE, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()[1:]]
    kills = [int(line[1]) for line in lines]
    assert len(kills) == 8 and sum(kills) == 12 and min(kills) == 1, ran.stdout


WRITE = """
import os, signal, sys
from modnb.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@needs_posix
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_writer_clears_away_what_a_killed_one_left(tmp_path, how):
    path, other = tmp_path / "a[1].st", tmp_path / ".a[1].st.notes"
    write_text(path, "old")
    other.write_text("somebody's own")
    killed = subprocess.run([sys.executable, "-c", WRITE, path, str(int(how))], env=ALONE)
    assert killed.returncode == -how and path.read_text() == "old" and len(list(tmp_path.iterdir())) == 3
    write_text(path, "new")
    assert path.read_text() == "new" and {*tmp_path.iterdir()} == {path, other}


def test_a_writer_at_work_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    with atomic_path(path) as first:
        first.write_text("first")
        with atomic_path(path) as second: second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


@needs_posix
@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "x" * 100_000),
    lambda path: save_tensors(path, {"x": torch.zeros(100_000)}, "test", {}),
    lambda path: write_rows(path, [row | {"dataset": "x" * 100_000}]),
])
def test_a_disk_without_room_is_told_with_the_path(tmp_path, write):
    path, (soft, hard) = tmp_path / "kept", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_tensors(path, {"x": torch.ones(2)}, "test", {})
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=str(path)): write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert load_tensors(path, "test")[0]["x"].tolist() == [1, 1] and [*tmp_path.iterdir()] == [path]


def test_no_space_left_names_the_file(tmp_path):
    with (pytest.raises(OSError, match="No space left on device: .*rows.csv") as caught,
          atomic_path(tmp_path / "rows.csv")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.errno == errno.ENOSPC and not [*tmp_path.iterdir()]
    with pytest.raises(FileNotFoundError, match="other"), atomic_path(tmp_path / "rows.csv"): open(tmp_path / "other")


@needs_posix
def test_a_reader_that_leaves_is_no_error(tmp_path):
    "As in `modnb status all | head -0`: the pipe is closed before anything is written."
    words = [sys.executable, "-m", "modnb.lab.commands", "status", "all", "--runs", tmp_path]
    reading, writing = os.pipe()
    os.close(reading)
    try: ran = subprocess.run(words, env=ALONE, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally: os.close(writing)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


def test_snakemake_keeps_its_notes_with_the_runs(tmp_path):
    runs = tmp_path / "runs"
    words = snakemake_words(Namespace(experiments="e", study="a", runs=runs, jobs=1, gpus="", per_gpu=1), [])
    assert words[words.index("--directory") + 1] == str(runs)
    assert Path(words[words.index("-s") + 1]).is_absolute(), "the folder of the runs is where relative paths begin"


def test_a_training_of_no_epochs_is_refused(tmp_path):
    with pytest.raises(NotebookFailed, match="epochs must be at least 1, not 0"):
        run_notebook(ROOT / "nbs/experiments/train.ipynb", tmp_path / "train.ipynb", {"epochs": 0})
