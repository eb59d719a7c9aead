"""Running notebooks: what is not declared is refused, however a notebook is started; a failure leaves its notebook."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modnb.lab.matrix import cell_name, check_cells, read_matrix, shell_words, study_cells
from modnb.lab.running import (
    ANY,
    NotebookFailed,
    check_names,
    check_parameters,
    check_types,
    declared_parameters,
    kernel_settings,
    main,
    notebook_parameters,
    read_value,
    run_notebook,
)
from modnb.lab.samples import draw_images
from modnb.subtasks import draw_subtasks, read_sizes

IMPORTS = "from modnb.lab.running import check_parameters"
PARAMETERS = "epochs = 5  # passes\nlr = 0.1  # rate\nname = 'a'  # text\nflip = None  # or a truth value"
CHECK = "knobs = check_parameters(In, globals())"


def write(path: Path, *sources: str, parameters: int | None = 1) -> Path:
    cells = [{"cell_type": "code", "id": f"c{i}", "source": source, "outputs": [], "execution_count": None,
              "metadata": {"tags": ["parameters"]} if i == parameters else {}} for i, source in enumerate(sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def notebook(tmp_path) -> Path:
    return write(tmp_path / "small.ipynb", "import json\n" + IMPORTS, PARAMETERS, CHECK, "print(json.dumps(knobs))")


def outputs(path: Path, kind: str = "text") -> str:
    found = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get(kind, "")) for output in found)


# Reading what is declared

scalars = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.none()
names = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True).filter(lambda n: not __import__("keyword").iskeyword(n))


@given(st.dictionaries(names, scalars, min_size=1))
def test_literals_are_read_as_they_are_written(parameters):
    source = "\n".join(f"{name} = {value!r}  # comment" for name, value in parameters.items())
    assert declared_parameters(source) == parameters
    check_types(parameters, declared_parameters(source))


def test_papermill_reads_the_same_names(notebook):
    "The other runner's view of a notebook does not differ from ours"
    from papermill import inspect_notebook

    assert list(inspect_notebook(notebook)) == list(notebook_parameters(notebook)) == ["epochs", "lr", "name", "flip"]


@pytest.mark.parametrize("source", [
    "import torch", "x = 1\nprint(x)", "x[0] = 1", "x.y = 2", "(", "%time x = 1", "x += 1", ""])
def test_cells_that_do_more_declare_nothing(source):
    assert declared_parameters(source) == {}


def test_computed_defaults_and_annotations():
    assert declared_parameters("a = 2 * 3\nb: int = 4\nc: float\nd = e = 'x'") == \
        {"a": ANY, "b": 4, "c": ANY, "d": "x", "e": "x"}


@pytest.mark.parametrize("value, default, fits", [
    (1, 2, True), (1, 2.0, True), (1.0, 2, False), (True, 2, False), (1, True, False), (0, 1.0, True), ("a", 1, False),
    (1, "a", False), ("", "a", True), (None, 1, False), (3, None, True), ("x", None, True), ([1], ANY, True)])
def test_types(value, default, fits):
    if fits: check_types({"knob": value}, {"knob": default})
    else:
        with pytest.raises(ValueError, match="parameter 'knob' is"): check_types({"knob": value}, {"knob": default})


def test_unknown_names_get_a_hint_and_the_list():
    with pytest.raises(ValueError, match="nb has no parameter 'epoch'. Did you mean 'epochs'. It has: epochs, lr"):
        check_names(["lr", "epoch"], ["epochs", "lr"], where="nb")
    with pytest.raises(ValueError, match="no parameter 'x'. It has: none"): check_names(["x"], [])


@given(scalars.filter(lambda v: not isinstance(v, str) or v.lower() not in ("true", "false", "none", "null")))
def test_values_survive_the_command_line(value):
    if isinstance(value, str): assert read_value(value, "text") == value
    else: assert read_value(str(value), value) == value and type(read_value(str(value), value)) is type(value)


# Inside a notebook

DECLARED = "epochs = 5\nlr = 0.1"


def history(*cells: str) -> list[str]: return ["", "import torch", *cells, CHECK]


@pytest.mark.parametrize("cells, values, message", [
    ([DECLARED, "# Parameters\nepoch = 3"], {"epochs": 5, "lr": 0.1, "epoch": 3}, "no parameter 'epoch'"),
    ([DECLARED, "# Parameters\nlr = 'fast'"], {"epochs": 5, "lr": "fast"}, "'lr' is 'fast'"),
    ([DECLARED], {"epochs": True, "lr": 0.1}, "'epochs' is True"),
    ([DECLARED, "\n# Parameters  \nlr = 1\nseed = 2\n"], {"epochs": 5, "lr": 1, "seed": 2}, "no parameter 'seed'"),
])
def test_the_check_refuses(cells, values, message):
    with pytest.raises(ValueError, match=message): check_parameters(history(*cells), values)


def test_the_check_passes_and_returns_what_is_set():
    values = {"epochs": 5, "lr": 1, "other": 3}
    for cells in ([DECLARED], [DECLARED, "# Parameters\nlr = 1\n"], [DECLARED, "lr = 1", "# a comment", DECLARED]):
        assert check_parameters(history(*cells), values) == {"epochs": 5, "lr": 1}


def test_a_second_run_of_the_cells_is_checked_again():
    again = history(DECLARED, "# Parameters\nlr = 1") + history(DECLARED, "# Parameters\nlrr = 1")[1:]
    with pytest.raises(ValueError, match="no parameter 'lrr'"): check_parameters(again, {"epochs": 5, "lr": 1})


def test_plain_papermill_is_stopped(notebook, tmp_path):
    import papermill
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    config = Config(KernelManager=kernel_settings(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter 'epoch'. Did you mean 'epochs'"):
        papermill.execute_notebook(notebook, tmp_path / "out.ipynb", {"epoch": 3}, progress_bar=False, config=config)
    papermill.execute_notebook(notebook, tmp_path / "good.ipynb", {"epochs": 3}, progress_bar=False, config=config)
    assert json.loads(outputs(tmp_path / "good.ipynb"))["epochs"] == 3


def test_jupyter_and_the_test_runner_are_not_stopped(notebook):
    import nbformat
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbclient import NotebookClient

    done = NotebookClient(nbformat.read(notebook, 4), kernel_name="python3").execute()
    assert json.loads(done.cells[3].outputs[0].text)["epochs"] == 5
    book = read_nb(notebook)
    CaptureShell(notebook).run_all(book, exc_stop=True)
    assert json.loads("".join(book.cells[3].outputs[0].text)) == {"epochs": 5, "lr": 0.1, "name": "a", "flip": None}


# Running


def test_values_arrive_and_the_folder_is_made(notebook, tmp_path):
    given = {"epochs": 7, "lr": 1, "name": "it's \"quoted\" {x} \\ ü #2", "flip": True}
    out = run_notebook(notebook, tmp_path / "new/folder/out.ipynb", given)
    assert json.loads(outputs(out)) == given


@pytest.mark.parametrize("parameters, message", [({"epoch": 3}, "small.ipynb has no parameter 'epoch'"),
                                                 ({"epochs": 0.5}, "'epochs' is 0.5")])
def test_nothing_starts_with_wrong_parameters(notebook, tmp_path, parameters, message):
    with pytest.raises(ValueError, match=message): run_notebook(notebook, tmp_path / "out.ipynb", parameters)
    assert not (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("content, message", [
    (None, "there is no notebook"), ("{", "not a notebook"), ("[]", "not a notebook"),
    ('{"cells": []}', "no cell tagged 'parameters'")])
def test_what_is_no_experiment(tmp_path, content, message):
    if content is not None: (tmp_path / "x.ipynb").write_text(content)
    with pytest.raises(ValueError, match=message): notebook_parameters(tmp_path / "x.ipynb")


@pytest.mark.parametrize("name", ["{x}", "{", "{{epochs}}"])
def test_braces_in_a_folder_are_only_braces(notebook, tmp_path, name):
    "papermill would put a parameter there, or find none of that name."
    run_notebook(notebook, tmp_path / name / "done.ipynb", {"epochs": 7})
    assert '"epochs": 7' in outputs(tmp_path / name / "done.ipynb")
    assert [path.name for path in (tmp_path / name).iterdir()] == ["done.ipynb"]


def test_a_failing_notebook_is_kept(tmp_path):
    book = write(tmp_path / "bad.ipynb", IMPORTS, "x = 0", CHECK, "print('before')", "1 / x", "print('after')")
    with pytest.raises(NotebookFailed, match=r"bad.ipynb, cell \[6\]: ZeroDivisionError: division by zero\n.*out.ip"):
        run_notebook(book, tmp_path / "out.ipynb", {"x": 0})
    kept = json.loads((tmp_path / "out.ipynb").read_text())
    assert "An Exception was encountered" in "".join(kept["cells"][0]["source"])
    assert outputs(tmp_path / "out.ipynb") == "before\n"


def test_a_killed_kernel_and_a_slow_cell_are_failures(tmp_path):
    dead = write(tmp_path / "dead.ipynb", IMPORTS, "x = 0", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(NotebookFailed, match="(?i)kernel died"): run_notebook(dead, tmp_path / "out.ipynb")
    assert (tmp_path / "out.ipynb").exists()
    slow = write(tmp_path / "slow.ipynb", IMPORTS, "x = 0", "import time; time.sleep(60)")
    with pytest.raises(NotebookFailed, match="(?i)timed? ?out"): run_notebook(slow, tmp_path / "out.ipynb", timeout=1)


def test_the_folder_in_which_it_runs(tmp_path):
    book = write(tmp_path / "where.ipynb", IMPORTS, "x = 0", "import os; print(os.getcwd())")
    (tmp_path / "inner").mkdir()
    ran = run_notebook(book, tmp_path / "out.ipynb", cwd=tmp_path / "inner")
    assert outputs(ran).strip() == str(tmp_path / "inner")


def test_kernels_need_no_ports_and_leave_nothing(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    assert len(str(tmp_path)) > 80 or kernel_settings(tmp_path)["transport"] == "ipc"
    assert kernel_settings("/" + "x" * 100) == {}, "a socket's path is limited"
    command = [sys.executable, "-m", "modnb.lab.running", notebook]
    runs = [subprocess.Popen([*command, f"{i}.ipynb", "-p", "epochs", str(i)], cwd=tmp_path) for i in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert [json.loads(outputs(tmp_path / f"{i}.ipynb"))["epochs"] for i in range(2)] == [0, 1]
    assert not list(tmp_path.glob("kernel*")) and not list((tmp_path / "t").iterdir())


def test_exit_codes(notebook, tmp_path, capsys):
    out = str(tmp_path / "out.ipynb")
    assert main([str(notebook)]) == 0 and "epochs = 5  # passes" in capsys.readouterr().out
    assert main([str(notebook), out, "-p", "epochs", "-3", "-p", "name", "5", "-p", "flip", "false"]) == 0
    assert json.loads(outputs(Path(out))) == {"epochs": -3, "lr": 0.1, "name": "5", "flip": False}
    assert main([str(notebook), out, "-p", "epoch", "3"]) == 2 and "no parameter 'epoch'" in capsys.readouterr().err
    bad = write(tmp_path / "bad.ipynb", IMPORTS, "x = 0", "1 / x")
    assert main([str(bad), out]) == 1 and "ZeroDivisionError" in capsys.readouterr().err


def test_an_interrupted_run_stops_its_kernel(tmp_path):
    work = "import os, pathlib, time\npathlib.Path(x).write_text(str(os.getpid()))\ntime.sleep(120)"
    book, mark = write(tmp_path / "long.ipynb", IMPORTS, "x = ''", work), tmp_path / "pid"
    command = [sys.executable, "-m", "modnb.lab.running", book, tmp_path / "out.ipynb", "-p", "x", str(mark)]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(300):
        if mark.exists() and mark.read_text(): break
        time.sleep(0.1)
    kernel = int(mark.read_text())
    runner.send_signal(signal.SIGTERM)
    runner.wait(20)
    for _ in range(100):
        if not Path(f"/proc/{kernel}").exists(): break
        time.sleep(0.1)
    alive = Path(f"/proc/{kernel}").exists()
    if alive: os.kill(kernel, signal.SIGKILL)
    assert not alive or not Path("/proc").exists()


# The matrix


def matrix(tmp_path: Path, text: str) -> Path:
    (tmp_path / "matrix.yaml").write_text(text)
    return tmp_path / "matrix.yaml"


GOOD = "studies:\n  a:\n    vary: {system: [plain, moda], lr: [0.1, 0.2], seed: [0, 1, 2]}\n    train: {model: vgg12}\n"


def test_every_combination_has_its_own_folder(tmp_path):
    cells = study_cells(read_matrix(matrix(tmp_path, GOOD)), "a")
    assert len(cells) == 12 and len({cell.name for cell in cells}) == 12 == len({cell.network for cell in cells})
    assert cells[0].name == "plain-vgg12-lr0.1-seed0" and cells[-1].name == "moda-vgg12-lr0.2-seed2"
    assert all(cell.train["model"] == "vgg12" for cell in cells)


@pytest.mark.parametrize("text, message", [
    ("studies:\n  a:\n    vary: {seed: [0, 1}\n", "matrix.yaml, line 3, column 23"),
    ("studies:\n  a:\n\tvary: 3\n", "matrix.yaml, line 3"),
    ("study: 3", "'studies' is expected"),
    ("", "'studies' is expected"),
    ("studies: {a: 3}", "study 'a': expected a mapping"),
    ("studies: {a: {verry: 3}}", "study 'a': unknown verry"),
    ("studies: {a: {vary: {seed: 3}}}", "study 'a': 'seed' under 'vary' must be a list"),
    ("studies: {a: {vary: {seed: []}}}", "must be a list"),
    ("studies: {a: {train: [3]}}", "'train' must be a dict"),
    ("studies: {a: {vary: {seed: [3]}, train: {seed: 3}}}", "'seed' stands under 'vary' and under 'train'"),
    ("studies:\n  a: {}\n  b: {}\n  a: {}\n", "matrix.yaml, line 4: 'a' stands in line 2 already"),
    ("studies:\n  a:\n    train: {lr: 0.1, lr: 0.2}\n", "matrix.yaml, line 3: 'lr' stands in line 3 already"),
    ("studies:\n  7: {}\n", "matrix.yaml, line 2: the key '7' is no text; put quotes"),
    ("studies:\n  a:\n    stages: {3: {}}\n", "matrix.yaml, line 3: the key '3' is no text; put quotes"),
    ("studies:\n  a:\n    train:\n      lr: .nan\n", "matrix.yaml, line 4: .nan is no finite number"),
    ("studies: {a: {train: {lr: -.inf}}}", "matrix.yaml, line 1: -.inf is no finite number"),
    ("studies: {a: {train: {day: 2020-01-02}}}", "2020-01-02 would be a timestamp, which no parameter can be; text"),
    ("studies: {a: {train: {seed: 010}}}", "010 is not how everybody writes a number"),
    ("studies: {a: {train: {seed: 1:30}}}", "1:30 is not how everybody writes a number"),
    ("studies: {a: {train: {augment: on}}}", "on would be true or false, so say that"),
    ("studies:\n  a:\n    train:\n      model: net #2\n", "line 4: '#2' behind 'net' would be a comment"),
    ("studies: {a: {train: {model: net  # which\n}}}", "'# which' behind 'net' would be a comment"),
    ("studies:\n  a:\n    report: #2\n", "matrix.yaml, line 3: '#2' behind '' would be a comment"),
    ("studies: {a: {train: {seed: 3 #2\n}}}", "'#2' behind '3' would be a comment"),
    ("studies:\n  a:\n    fills:\n      - [table4]\n", "line 4, study 'a': 'fills' names \\['table4'\\], no published"),
    ("studies:\n  a:\n\n    vary: {seed: [[3]]}\n", "line 4, study 'a': 'seed' is \\[3\\], but a parameter is"),
    ("studies: {a: {train: {lr: {a: 3}}}}", "'lr' is {'a': 3}, but a parameter"),
    ("studies: {a: {stages: {s: {lr: [3]}}}}", "'lr' is \\[3\\], but a parameter"),
    ("studies:\n  ../esc: {}\n", "line 2, study '../esc': '../esc' cannot be the name of a study"),
    ("studies:\n  /tmp/esc: {}\n", "'/tmp/esc' cannot be the name of a study"),
    ("studies: {networks: {}}", "'networks' cannot be the name of a study"),
    ("studies: {a: {stages: {../s: {}}}}", "'../s' cannot be the name of a stage"),
    ("studies: {a: {report: ../x}}", "'../x' cannot be the name of a report"),
    ("studies: &a {a: *a}", "contains itself"),
    ("studies: {a: " + "[" * 5000 + "]" * 5000 + "}", "too deep within each other"),
    ("studies: {a: \x07}", "matrix.yaml is no YAML text"),
])
def test_wrong_matrices_say_where(tmp_path, text, message):
    with pytest.raises(ValueError, match=message): read_matrix(matrix(tmp_path, text))


@pytest.mark.parametrize("vary, count", [
    (f"{{seed: [{', '.join(map(str, range(100_000)))}]}}", "100,000 cells"),
    ("{" + ", ".join(f"k{n}: [{', '.join(map(str, range(1000)))}]" for n in range(3)) + "}", "1,000,000,000 cells"),
])
def test_products_are_counted_before_they_are_made(tmp_path, vary, count):
    with pytest.raises(ValueError, match=f"line 2, study 'a': the lists under 'vary' multiply to {count}, more than"):
        read_matrix(matrix(tmp_path, f"studies:\n  a: {{vary: {vary}}}\n"))


def test_references_to_references_end(tmp_path):
    letters = "abcdefghijklmnop"
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip(letters, letters[1:], strict=False)]
    text = "\n".join(["profiles:", "  a: &a [1]", *(f"  {line}" for line in lines), "studies: {s: {skip: *p}}"])
    with pytest.raises(ValueError, match="matrix.yaml, line 8: what stands here comes to [0-9,]+ values"):
        read_matrix(matrix(tmp_path, text))


def test_unknown_studies_list_the_others(tmp_path):
    studies = read_matrix(matrix(tmp_path, GOOD + "  demo: {}\n"))
    with pytest.raises(ValueError, match="no study 'demos'. Did you mean 'demo'. There is: a, demo"):
        study_cells(studies, "demos")
    assert [cell.name for cell in study_cells(studies, "demo")] == ["run"]


def test_conditions_that_choose_nothing_are_refused(tmp_path):
    for wrong in ("skip: [{sytem: plain}]", "adjust: [{when: {sytem: plain}, train: {}}]",
                  "stages: {s: {only: {sytem: plain}}}"):
        studies = read_matrix(matrix(tmp_path, f"studies: {{a: {{vary: {{system: [plain]}}, {wrong}}}}}"))
        with pytest.raises(ValueError, match="study 'a': .* has no parameter 'sytem'. Did you mean 'system'"):
            study_cells(studies, "a", {"lr": 0.1})


def test_repeated_values_are_refused(tmp_path):
    studies = read_matrix(matrix(tmp_path, "studies: {a: {vary: {seed: [1, 1]}}}"))
    with pytest.raises(ValueError, match="two runs would be called 'seed1'"): study_cells(studies, "a")


def test_cells_are_checked_against_the_notebooks(tmp_path, notebook):
    notebook.rename(notebook.with_name("train.ipynb"))

    def cells(train): return study_cells(read_matrix(matrix(tmp_path, f"studies: {{a: {{train: {train}}}}}")), "a")

    check_cells(cells("{epochs: 3}"), notebook.parent)
    with pytest.raises(ValueError, match="study 'a': train.ipynb has no parameter 'epoch'"):
        check_cells(cells("{epoch: 3}"), notebook.parent)
    with pytest.raises(ValueError, match="study 'a': train.ipynb: parameter 'lr' is '1e-3'"):
        check_cells(cells("{lr: 1e-3}"), notebook.parent)


@given(st.dictionaries(names, st.text(st.characters(codec="ascii", exclude_characters="\0\r\n"))))
def test_shell_words_are_read_back(parameters):
    import shlex

    words = shlex.split(shell_words(parameters))
    assert dict(zip(words[1::3], words[2::3], strict=True)) == parameters and set(words[::3]) <= {"-p"}


def test_cell_names_are_folders():
    assert cell_name({"dataset": "/my data/x", "model": "m"}, {}) == "m-_my_data_x"
    assert "/" not in cell_name({"system": "a/b"}, {"knob": "../x"})


# Samples

classes = [f"class {i}" for i in range(10)]


@given(size=st.integers(1, 10), count=st.integers(0, 30), seed=st.integers(0, 5))
def test_subtasks_are_different_and_repeatable(size, count, seed):
    drawn = draw_subtasks(classes, size, count, seed)
    assert drawn == draw_subtasks(classes, size, count, seed)
    assert all(chosen == sorted(set(chosen), key=classes.index) and len(chosen) == size for chosen in drawn)
    assert len(set(map(tuple, drawn))) == len(drawn)
    everything = len(draw_subtasks(classes, size, 0))
    assert len(drawn) == (min(count, everything) or everything)


def test_subtasks_of_many_classes():
    assert len(draw_subtasks([str(i) for i in range(100)], 50, 20)) == 20
    assert draw_subtasks(classes, 3, 5, 1) != draw_subtasks(classes, 3, 5, 2)
    for size in (0, 11): pytest.raises(ValueError, draw_subtasks, classes, size, 1)


def test_sizes():
    assert read_sizes("3, 2,2") == [2, 3] and read_sizes("") == []
    with pytest.raises(ValueError, match="whole numbers with commas, not '2;3'"): read_sizes("2;3")


def test_a_part_of_the_images_keeps_the_shares():
    from modnb.data import load_dataset

    train = load_dataset("digits", device="cpu").train
    part = draw_images(train, 200)
    shares = train.labels.bincount() * 200 / len(train)
    assert abs(len(part) - 200) <= 5 and (part.labels.bincount() - shares).abs().max() <= 1
    assert draw_images(train, len(train)) is train and draw_images(train, 0) is train
    assert len(draw_images(train, len(train) - 1)) >= len(train) - 10 and len(draw_images(train, 1)) == 10
    assert len(draw_images(train.select(train.labels == 3), 20)) == 20, "classes without images are left alone"
