"""Try to break it: damaged and invented files, wrong arguments, hostile names: `make hard`, or

    python tests/hard_use.py --help

Every attempt ends in one of three ways. *Right*: what came out is what comes out without the damage. *Clear*: one
error of ours, raised on purpose, which names the file where there is one. *Wrong*: anything else, be it numbers that
differ, an error out of the depth of a library, or no end. The seed decides what is tried; `tests/test_hard_use.py` has
it short."""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from test_files import FILES, JUNK, NAMES, masks_of, network, pieces

from modnb.compose import compose
from modnb.data import Split, load_dataset
from modnb.extract import extract
from modnb.files import save_tensors
from modnb.lab.matrix import read_matrix, shell_words, study_cells
from modnb.lab.results import describe_run, make_rows, read_rows, write_rows
from modnb.masks import ModuleMasks, threshold_masks
from modnb.metrics import accuracy, cohesion, count_flops, coupling, jaccard, kernel_retention, latency, overlap
from modnb.moda.decompose import decompose
from modnb.models import create_model
from modnb.prediction import evaluate
from modnb.similarity import mean_cosines
from modnb.specialize import specialize
from modnb.subtasks import compare, sample_size
from modnb.training import fit
from modnb.walk import evaluate_subtasks

PACKAGE = str(Path(read_rows.__code__.co_filename).parents[1])
CLEAR = (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) # kinds of errors that the library promises
SECONDS = 20 # of a processor that one attempt may take; six times as many by the clock


class Attempt(NamedTuple):
    "Something that may go wrong."
    what: str # for the list of failures
    call: Callable[[], Any]
    expected: Any = None # what comes out if it is right
    names: str = "" # text that a clear error has, such as a path
    must_fail: bool = False # whether no result is right


# What came of an attempt


CLOCKS = (signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, 6 * SECONDS)


class Endless(BaseException): pass


def stop(*_) -> None: raise Endless


def ours(error: BaseException) -> bool:
    "Whether it was raised on purpose in the package, or in what it is called with, and is no longer than a paragraph."
    trace = error.__traceback__
    while trace.tb_next: trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.startswith(PACKAGE) and isinstance(error, CLEAR) and len(str(error)) < 1500


def judge(attempt: Attempt) -> str: # "right", "clear", or what is wrong
    for clock, sign, limit in CLOCKS:
        signal.signal(sign, stop)
        signal.setitimer(clock, limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attempt.call()
            if attempt.must_fail: return f"accepted: {str(found)[:100]}"
    except Endless: return f"no end within {SECONDS} s"
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        if not ours(error): return f"raw {told}"
        return "clear" if attempt.names in str(error) else f"{attempt.names} not named: {told}"
    finally:
        for clock, *_ in CLOCKS: signal.setitimer(clock, 0)
    return "right" if attempt.expected is None or same(found, attempt.expected) else "another result, in silence"


def content(value: Any) -> Any: # what can be compared: text, numbers, tensors in lists
    if isinstance(value, torch.nn.Module): return [content(value.state_dict()), str(value)]
    if isinstance(value, torch.Tensor): return [str(value.dtype), value.tolist()]
    if isinstance(value, dict): return [[str(key), content(each)] for key, each in value.items()]
    if isinstance(value, list | tuple): return [content(each) for each in value]
    return content(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else repr(value)


def same(one: Any, other: Any) -> bool: return content(one) == content(other)


# Files


def written(place: Path) -> Iterator[tuple[str, Path, Callable]]: # kind, file, reader
    model = network()
    parts = model, *masks_of(model)
    for name, make in FILES.items():
        (place / name).mkdir()
        yield name, *make(parts, place / name / "file.safetensors")


def damaged(place: Path, chance: random.Random, times: int, change: Callable) -> Iterator[Attempt]:
    "Every kind of file, changed `times` times."
    for name, path, read in written(place):
        whole = path.read_bytes()
        for number in range(times):
            bad, what = change(whole, chance, number)
            def call(path=path, read=read, bad=bad):
                path.write_bytes(bad)
                return read(path)
            yield Attempt(f"{name}, {what}", call, names=str(path), must_fail=bad != whole)
        path.write_bytes(whole)


def header_end(whole: bytes) -> int: return 8 + int.from_bytes(whole[:8], "little")


def cut(whole: bytes, chance: random.Random, number: int) -> tuple[bytes, str]:
    size = 0 if number == 0 else chance.randrange(len(whole))
    return whole[:size], f"{size} of {len(whole)} bytes"


def flip(whole: bytes, chance: random.Random, number: int, header: bool) -> tuple[bytes, str]:
    end = header_end(whole)
    place = chance.randrange(0, 8 * end) if header else chance.randrange(8 * end, 8 * len(whole))
    bad = bytearray(whole)
    bad[place // 8] ^= 1 << place % 8
    return bytes(bad), f"bit {place}"


def other_content(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    for name, path, read in written(place):
        for bad in [b"", b"hello", b"\0" * 1000, b"\x80\x04]\x94.", (2**62).to_bytes(8, "little") + b"{}", b"{}" * 50,
                    (2).to_bytes(8, "little") + b"{}", chance.randbytes(500), "\u00e9".encode("utf-16")][:2 + times]:
            def call(path=path, read=read, bad=bad):
                path.write_bytes(bad)
                return read(path)
            yield Attempt(f"{name}: {bad[:12]!r}", call, names=str(path), must_fail=True)


HARMLESS = {"preparation": dict, "network": dict, "about": dict, "run": dict, "rows": list, "history": list,
            "outputs": list, "classes": list, "generation": int, "knobs": dict} # nothing in a file tells other values


def headers(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    "With the right digest: somebody made them by hand."
    for name, path, read in written(place):
        tensors, about = pieces(path)
        header = about["header"]
        tried = [(f"without {field}", {key: value for key, value in header.items() if key != field})
                 for field in header if field not in ("preparation", "network")]
        tried += [(f"{field} = {junk!r}", header | {field: junk}) for field in header for junk in JUNK
                  if junk is not None and junk != header[field] and not isinstance(junk, HARMLESS.get(field, ()))]
        for what, changed in chance.sample(tried, min(times, len(tried))):
            def call(path=path, read=read, tensors=tensors, kind=about["kind"], changed=changed):
                save_tensors(path, tensors, kind, changed)
                return read(path)
            yield Attempt(f"{name}, {what}", call, names=str(path.parent), must_fail=True)


# Text


MATRIX = """profiles:
  small: &small {model: vgg12, epochs: 2}
studies:
  first:
    about: two ways
    vary: {system: [plain, moda], seed: [0, 1, 2]}
    train: *small
    skip: [{system: moda, seed: 2}]
    stages:
      subtasks: {sizes: "2,3"}
  second:
    train: {model: lenet5, lr: 0.1}
"""
WRONG_MATRIX = [ # old, new
    ("seed: [0, 1, 2]", "seed: 3"), ("seed: [0, 1, 2]", "seed: []"), ("seed: [0, 1, 2]", "seed: [[0]]"),
    ("seed: [0, 1, 2]", "seed: [0, 1, 2], seed: [3]"), ("lr: 0.1", "lr: .nan"), ("lr: 0.1", "lr: -.inf"),
    ("lr: 0.1", "lr: 2020-01-02"), ("lr: 0.1", "lr: {a: 1}"), ("lr: 0.1", "lr: on"), ("lr: 0.1", "lr: 010"),
    ("  second:", "  first:"), ("  second:", "  7:"), ("  second:", "  ../second:"), ("  second:", "  /second:"),
    ("  second:", "  networks:"), ("  second:", "  '':"), ("  second:", "  ~:"), ("subtasks:", "../subtasks:"),
    ("subtasks:", "3:"), ("studies:", "study:"), ("about: two ways", "abuot: two ways"), ("*small", "*smal"),
    ("&small {", "&small {<<: *small, "), ("train: *small", "train: [3]"), ("train: *small", "train: {system: x}"),
    ("{sizes: \"2,3\"}", "[1]"), ("profiles:", "profile:"), ("seed: [0, 1, 2]", "seed: !!python/name:os.system [0]"),
    ("seed: [0, 1, 2]", f"seed: [{', '.join(map(str, range(20_000)))}]"), ("  first:", "\tfirst:"),
    ("about: two ways", "about: way #2"), ("lr: 0.1", "lr: 0.1 #1\n    "), ("model: lenet5", "model: lenet5 # 5\n    "),
]


def matrices(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    path = place / "matrix.yaml"
    def call(text: str | bytes) -> list:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        studies = read_matrix(path)
        return [cell.name for study in studies for cell in study_cells(studies, study)]
    for old, new in chance.sample(WRONG_MATRIX, min(times, len(WRONG_MATRIX))):
        assert old in MATRIX, old
        yield Attempt(f"{new[:40]} for {old}", partial(call, MATRIX.replace(old, new, 1)), must_fail=True)
    for _ in range(times): # what may be another matrix, but must not end otherwise
        bad, where = bytearray(MATRIX.encode()), chance.randrange(len(MATRIX))
        how = chance.choice(["cut", "flip", "twice"])
        if how == "cut": del bad[where:where + chance.randrange(1, 30)]
        elif how == "flip": bad[where] ^= 1 << chance.randrange(8)
        else: bad[where:where] = bad[where:where + chance.randrange(1, 30)]
        yield Attempt(f"{how} at {where}", partial(call, bytes(bad)))


def rows(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    def fresh(seed: int = 0) -> dict:
        run = describe_run("study", "plain", "lenet5", "digits", seed, {"epochs": 1}, run="study/a")
        return make_rows(run, {"accuracy": 0.5})[0]
    path = write_rows(place / "rows.csv", [fresh(), fresh(1)])
    whole, good = path.read_bytes(), read_rows(path).to_dict("records")
    def call(content: bytes) -> list:
        path.write_bytes(content)
        return read_rows(path).to_dict("records")
    heading, first = whole.split(b"\r\n" if b"\r\n" in whole else b"\n")[:2]
    must = [b"", first, heading.replace(b"study", b"run", 1) + b"\n" + first, heading + b"," + b"\n" + first,
            whole.replace(b",0.5,", b",half,"), whole.replace(b",0.5,", b",inf,"), whole.replace(b",0.5,", b",,,"),
            whole.replace(b'""epochs"":1', b'""epochs"":2'), whole.replace(b'"{""epochs"":1}"', b"[]"),
            whole.replace(b'"{""epochs"":1}"', b"{bad"), whole + b"\xff\xfe", whole + b"x" * 200_000, whole[:-20],
            whole.replace(b"digits", b""), whole.replace(b"accuracy", b"")]
    for number, bad in enumerate(must[:2 * times]):
        yield Attempt(f"damage {number}", partial(call, bad), names="rows.csv", must_fail=True)
    start, end = whole.index(b'"{""epochs'), whole.index(b'1}"') + 3
    for _ in range(times): # within a configuration; a number of another row is another row
        bad, where = bytearray(whole), chance.randrange(start, end)
        bad[where] ^= 1 << chance.randrange(8)
        yield Attempt(f"bit of byte {where}", partial(call, bytes(bad)), good, "rows.csv")


# Pictures, arguments, names


def pictures(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    for name in ("ant", "bee"):
        (place / name).mkdir()
        for number in range(6):
            pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
            Image.fromarray(pixels.numpy()).save(place / name / f"{number}.png")
    file = place / "bee/3.png"
    whole = file.read_bytes()
    read = lambda: load_dataset(place, image_size=8, device="cpu").train.images
    good = read()
    def call(bad: bytes) -> torch.Tensor:
        file.write_bytes(bad)
        try: return read()
        finally: file.write_bytes(whole)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (w) file\n%%EOF\n"
    for bad in [b"", b"text", b"\0" * 100, eps, b"P5 20000 20000 255\n", whole[:60], b"GIF89a", b"\xff\xd8\xff\xe0",
                b"<svg/>", b"BM" + b"\xff" * 60][:3 + times]:
        yield Attempt(f"{bad[:20]!r}", partial(call, bad), names=str(file), must_fail=True)
    for _ in range(times):
        size, place_of_bit, bad = chance.randrange(len(whole) - 12), chance.randrange(8 * len(whole)), bytearray(whole)
        bad[place_of_bit // 8] ^= 1 << place_of_bit % 8
        yield Attempt(f"{size} bytes", partial(call, whole[:size]), names=str(file), must_fail=True)
        yield Attempt(f"bit {place_of_bit}", partial(call, bytes(bad)), good, str(file))


class Same(NamedTuple):
    "A call that is right, and what may be wrong with its arguments."
    call: Callable
    right: dict[str, Any] # argument -> value
    wrong: dict[str, list] # argument -> values


def calls() -> dict[str, Same]:
    model, example = network(), torch.zeros(1, 3, 16, 16)
    masks, split = masks_of(model)
    logits, labels, bits = torch.rand(6, 4), torch.arange(6) % 4, torch.rand(4, 9) > 0.5
    nan = torch.full((6, 4), torch.nan)
    spoilt = network()
    next(spoilt.parameters()).data[0] = torch.nan
    other = create_model("vgg12", num_classes=7, width=0.0625, seed=0).eval()
    few = ModuleMasks({name: mask[:2] for name, mask in masks.masks.items()}, NAMES[:2])
    rates = {"relu": torch.rand(4, 5)}
    bad_rates = [{"relu": torch.full((4, 5), torch.nan)}, {"relu": torch.rand(3, 5)}]
    images = lambda **change: Split(**{"images": split.images, "labels": split.labels, "classes": NAMES,
                                       "mean": (0.5,) * 3, "std": (0.25,) * 3} | change)
    usual = {"epochs": 1, "batch_size": 8, "device": "cpu", "lr": 0.1}
    train = lambda **change: fit(network(), split, **usual | change)
    odd = [["9"], [], ["1", "1"], [9], [-1], [1.5]]
    return {
        "accuracy": Same(accuracy, {"logits": logits, "labels": labels}, {"logits": [nan, logits[:5], logits[0]],
                         "labels": [labels[:3], labels - 9]}),
        "jaccard": Same(jaccard, {"first": bits}, {"first": [bits.float(), bits[0]], "second": [bits[:, :5]]}),
        "coupling": Same(coupling, {"module_masks": bits}, {"module_masks": [bits[:1], bits.float(), bits[0]]}),
        "cohesion": Same(cohesion, {"sample_masks": bits, "labels": torch.tensor([0, 0, 1, 1])},
                         {"sample_masks": [bits.float()], "labels": [torch.arange(4), torch.zeros(3).long()]}),
        "kernel retention": Same(kernel_retention, {"masks": masks}, {"classes": odd, "denominator": ["x", "paper"]}),
        "latency": Same(latency, {"model": model, "example": example, "repeats": 1, "warmup": 0},
                        {"repeats": [0, -1], "warmup": [-1]}),
        "flops": Same(count_flops, {"model": model, "example": example}, {"mode": ["x", None]}),
        "overlap": Same(overlap, {"model": model, "masks": masks, "example": example}, {}),
        "cosines": Same(mean_cosines, {"rows": [torch.rand(4, 3)], "labels": torch.tensor([0, 0, 1, 1])},
                        {"labels": [torch.zeros(3).long()]}),
        "masks": Same(threshold_masks, {"rates": rates, "classes": NAMES}, {"rates": bad_rates,
                      "keep_threshold": [0, 1.1, -1, float("nan")], "empty": ["x"], "classes": [NAMES[:3], ["a"] * 4]}),
        "compose": Same(compose, {"model": model, "masks": masks, "classes": ["1", "3"], "example": example},
                        {"classes": odd, "masks": [few]}),
        "extract": Same(extract, {"model": model, "keep": masks.keep([1]), "example": example},
                        {"keep": [{"nowhere": torch.ones(3) > 0}, {next(iter(masks.masks)): torch.ones(99) > 0}]}),
        "decompose": Same(decompose, {"model": model, "split": split}, {"model": [spoilt],
                          "keep_threshold": [0, 2, float("nan")]}),
        "evaluate": Same(evaluate, {"model": model, "split": split}, {"model": [spoilt, other]}),
        "compare": Same(compare, {"model": model, "small": compose(model, masks, ["1", "3"], example), "split": split},
                        {"model": [spoilt]}),
        "sub-tasks": Same(evaluate_subtasks, {"model": model, "masks": masks, "split": split, "subtasks": [["0", "1"]]},
                          {"model": [spoilt, other], "masks": [few], "subtasks": [[["0", "9"]], [["0", "0"]], [[]]]}),
        "specialize": Same(specialize, {"model": model, "data": {"train": split, "valid": split}, "classes": ["0", "2"],
                           "max_loss": 1.0}, {"classes": [*odd, ["1"]], "max_loss": [-1, 2, float("nan")],
                           "size": [0, 2], "ways": [["x"]], "data": [{}, {"train": split}, {"trian": split}, 7]}),
        "sample size": Same(sample_size, {"population": 100}, {"population": [0], "margin": [0, 1], "confidence": [2]}),
        "images": Same(images, {}, {"images": [split.images.float(), split.images[0]],
                       "labels": [split.labels - 1, split.labels + 9, split.labels[:3], split.labels * 10**9],
                       "classes": [["a", "a", "b", "c"], ["a"], []]}),
        "training": Same(train, {}, {"epochs": [-1, 1.5], "batch_size": [0, -1], "lr": [-1, float("nan")],
                         "schedule": ["x"], "precision": ["x"], "device": ["gpu"]}),
        "models": Same(create_model, {"name": "vgg12"}, {"name": ["vgg", ""], "num_classes": [0, 1.5, -1],
                       "width": [0, -1, float("nan"), float("inf")], "image_size": [1, 0, 15.5], "wdith": [1]}),
    }


def misuse(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    tried = []
    for name, one in calls().items():
        tried.append(Attempt(f"{name}, as it should be", partial(one.call, **one.right)))
        for argument, values in one.wrong.items():
            tried += [Attempt(f"{name}: {argument} = {str(value)[:60]!r}", must_fail=True,
                              call=partial(one.call, **one.right | {argument: value})) for value in values]
    yield from chance.sample(tried, min(10 * times, len(tried)))


SHELL = ["$(touch broken)", "`touch broken`", "; touch broken", "| touch broken", "&& touch broken", "\ntouch broken\n",
         "' ; touch broken ; '", '"; touch broken; "', "> broken", "{x}", "~", "*", "!!",
         "-rf", "\\", "a b\tc", "$HOME", "#x", "a #b"]


def shells(place: Path, chance: random.Random, times: int) -> Iterator[Attempt]:
    "A parameter of a cell goes through a shell as it is."
    def call(text: str) -> list:
        line = f"printf '%s\\0' {shell_words({'name': text})}"
        said = subprocess.run(["bash", "-c", line], cwd=place, capture_output=True, check=True).stdout.decode()
        return [*said.split("\0")[:-1], (place / "broken").exists()]
    for text in SHELL[:4 * times]: yield Attempt(repr(text), partial(call, text), ["-p", "name", text, False])


KINDS = { # kind -> attempts
    "truncated files": lambda place, chance, n: damaged(place, chance, n, cut),
    "bit flips in headers": lambda place, chance, n: damaged(place, chance, 2 * n, partial(flip, header=True)),
    "bit flips in data": lambda place, chance, n: damaged(place, chance, n, partial(flip, header=False)),
    "other content": other_content, "hand-made headers": lambda place, chance, n: headers(place, chance, 2 * n),
    "matrix.yaml": lambda place, chance, n: matrices(place, chance, 3 * n),
    "rows": lambda place, chance, n: rows(place, chance, 3 * n), "pictures": pictures, "arguments": misuse,
    "words for a shell": shells,
}


def try_all(times: int, seed: int, kinds: list[str]) -> tuple[dict[str, Counter], list[str]]: # counts, what is wrong
    counts, wrong = {}, []
    for kind in kinds:
        counts[kind] = Counter()
        with tempfile.TemporaryDirectory() as folder:
            for attempt in KINDS[kind](Path(folder), random.Random(f"{seed} {kind}"), times):
                end = judge(attempt)
                counts[kind].update(["tried", end if end in ("right", "clear") else "wrong"])
                if end not in ("right", "clear"): wrong.append(f"{kind}: {attempt.what}: {end}")
    return counts, wrong


def main() -> int: # 1 where something went wrong
    parser = argparse.ArgumentParser(description="Try to break it.")
    parser.add_argument("--times", type=int, default=20, help="how much of each kind (20)")
    parser.add_argument("--seed", type=int, default=0, help="of what is tried (0)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this one; may be said several times (all)")
    parser.add_argument("--write", type=Path, help="write the counts there, as JSON")
    options = parser.parse_args()
    counts, wrong = try_all(options.times, options.seed, options.kind or list(KINDS))
    print("\n".join(wrong))
    print(f"{'kind':22}" + "".join(f"{word:>8}" for word in ("tried", "right", "clear", "wrong")))
    for kind, found in counts.items():
        print(f"{kind:22}" + "".join(f"{found[word]:8}" for word in ("tried", "right", "clear", "wrong")))
    if options.write: options.write.write_text(json.dumps(counts, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__": sys.exit(main())
