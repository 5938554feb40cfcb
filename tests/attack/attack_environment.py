"""What surrounds a command: disks that are full or read-only, strange names and places, streams and variables, JSON.

    python tests/attack/attack_environment.py [GROUP ...]

Each case is a command that either works or says in one line why it does not (exit code 2), makes its result whole or
leaves nothing, and does not touch what it reads. Where no file system may be mounted, the cases that need one are told
to be not run; `attack_run_folder.py` limits the size of files instead.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import figures
import hostile
import torch
from crash_works import TRAIN, works
from crashes import alive
from trainer_lives import live

from qzo.commands.main import main

SECONDS = 5  # of the processor, for a command on a tiny model, beyond what a new process needs to start
KILLED_AFTER = 20  # seconds by the clock, for a command that waits for something
STARTED_AFTER = 60  # for a process that is to start first, on a busy machine
WRONG = ("tracebacks", "wrong_codes", "more_than_a_line", "half", "changed", "silent", "slow", "hangs")


class Case(NamedTuple):
    """A command in a child process; `out`: absent afterwards where it fails; `must`: it has to be refused.

    `run` is None where it cannot be run here. `starts`: it starts a process of its own.
    """

    name: str
    run: Callable[[], int] | None
    out: Path | None = None
    must: bool = False
    starts: bool = False


def commands(place: Path, out: Path) -> dict[str, list[str]]:
    """Name -> a command that makes `out`."""
    packed, trained = str(place / "packed"), str(place / "trained")
    return {
        "export": ["export", trained, str(out)],
        "quantize": ["quantize", str(place / "plain"), str(out), "--group-size", "32"],
        "replay": ["replay", packed, f"{trained}/run.journal", str(out)],
        "train": ["train", packed, *TRAIN, "--out", str(out)],
        "inspect": ["inspect", packed, "--json", f"{out}.json"],
    }


def running(command: list[str]) -> Callable[[], int]:
    return lambda: main(command)


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[bool]:
    """A small file system at a place; whether there could be one."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(place)], check=True)


def disks(place: Path) -> Iterator[Case]:
    """Full ones of several sizes, where each command and the Trainer write; and a read-only one."""
    for size in ("4k", "16k", "32k", "64k", "128k", "256k"):
        for name in (*commands(place, place), "trainer", "journal"):
            with mounted(place / "disk", size) as there:
                out = place / "disk/out"
                made = {"trainer": _trainer(place), "journal": _journal(place)}
                run = made[name] if name in made else running(commands(place, out)[name])
                kept = name in ("train", "journal", "trainer")  # what was saved before the disk was full
                yield Case(f"disk of {size}, {name}", run if there else None, None if kept else out)
            (place / "disk").rmdir()
    with mounted(place / "disk", "1m") as there:
        if there:
            subprocess.run(["mount", "-o", "remount,ro", str(place / "disk")], check=True)
        for name, command in commands(place, place / "disk/out").items():
            yield Case(f"read-only, {name}", running(command) if there else None, place / "disk/out", must=True)
    (place / "disk").rmdir()


def _trainer(place: Path) -> Callable[[], int]:
    def run() -> int:
        try:
            live(place / "packed", place / "disk")
        except ValueError as error:  # QzoError
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def _journal(place: Path) -> Callable[[], int]:
    def run() -> int:
        try:
            return works_of[place]["journal"].begin(place / "disk")
        except (ValueError, RuntimeError, OSError) as error:  # its own files are the loop's
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


works_of: dict[Path, dict] = {}


def places(place: Path) -> Iterator[Case]:
    """Output folders that are what is read, lie within it, hold it, or are links in a circle; and missing folders."""
    for name in ("export", "quantize", "replay", "train"):
        for what in ("packed", "plain", "trained"):
            yield Case(f"{name} to {what}", running(commands(place, place / what)[name]), must=True)
            inner = place / what / "inner"
            yield Case(f"{name} into {what}", running(commands(place, inner)[name]), inner)
            shutil.rmtree(inner, ignore_errors=True)
        yield Case(f"{name} to what holds all", running(commands(place, place)[name]), must=True)
        (place / "circle").symlink_to("circle2")
        (place / "circle2").symlink_to("circle")
        for out in (place / "circle", place / "circle/out"):
            yield Case(f"{name} to {out.name} of a circle of links", running(commands(place, out)[name]), must=True)
        (place / "circle").unlink()
        (place / "circle2").unlink()
    (place / "circle").symlink_to("circle")
    for command in (
        ["inspect", str(place / "circle")],
        ["inspect", str(place / "packed"), "--json", str(place / "circle")],
        ["export", str(place / "circle"), str(place / "out")],
        ["replay", str(place / "packed"), str(place / "circle")],
        ["train", str(place / "circle"), *TRAIN, "--out", str(place / "out")],
        ["quantize", str(place / "plain"), str(place / "out"), "--method", "gptq", "--calibration", f"{place}/circle"],
    ):
        yield Case(" ".join(command)[:80], running(command), place / "out", must=True)
    (place / "circle").unlink()


NAMES = (
    *("with space", "two\nlines", "\x1b[31mred", "ünïcødé 模型", "-dash", "--help", "%s{}", "a'b\"c", "*", "$(x)", "~"),
    *(
        "x" * 255,
        "x" * 250,
        "x" * 237,
        "é" * 127,
        "é" * 100,
        "...",
        " ",
        "a.part",
        ".hidden",
        "x.GGUF",
        "\u202egnp",
        "\udcff",
    ),
)


def names(place: Path) -> Iterator[Case]:
    """Names of folders that are read and written."""
    for name in NAMES:
        home = place / "named"
        for what in ("export", "quantize", "replay", "train"):
            yield Case(f"{what} to {name!r:.40}", running(commands(place, home / name)[what]), home / name)
            shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        with contextlib.suppress(OSError):
            shutil.copytree(place / "packed", home / name)
            yield Case(f"inspect of {name!r:.40}", running(["inspect", str(home / name)]))
            yield Case(
                f"train of {name!r:.40}", running(["train", str(home / name), *TRAIN, "--out", str(home / "run")])
            )
            yield Case(f"export of {name!r:.40}'s run", running(["export", str(home / "run"), str(home / "out")]))
        yield Case(f"inspect nothing at {name!r:.40}", running(["inspect", str(home / f"no{name}")]), must=True)
        shutil.rmtree(home, ignore_errors=True)
    for text in ("x" * 5000, "a/" * 3000, "\0", "", "\ud800", "-", "--"):
        for command in (
            ["inspect", text],
            ["export", str(place / "trained"), text],
            ["replay", str(place / "packed"), text],
        ):
            if text != "-" or command[0] == "inspect":  # else a folder of that name, in the one we are in
                yield Case(f"{command[0]} {text!r:.30}", running(command), must=True)


TWICE = {  # file -> what stands there first, and is then said again with another value
    "config.json": ('"hidden_size": 64,', '"vocab_size": 1,', '"model_type": "gpt2",', '"quantization_config": {},'),
    "tokenizer_config.json": ('"tokenizer_class": "Nothing",',),
    "generation_config.json": ('"eos_token_id": 77,',),
}


def settings(place: Path) -> Iterator[Case]:
    """A key twice, and values that no configuration has."""
    values = ("null", "true", "[]", "{}", '"x"', "-1", "1e999", "9" * 400, "9" * 5000, "[" * 10**5 + "]" * 10**5, "NaN")
    values += ('{"a":' * 10**5 + "1" + "}" * 10**5, '"' + "x" * 10**6 + '"', "1e-320", "[[[[1]]]]", '"\\ud800"')
    keys = ("hidden_size", "model_type", "torch_dtype", "rope_parameters", "architectures", "vocab_size", "auto_map")
    keys += ("quantization_config", "tie_word_embeddings", "eos_token_id", "num_hidden_layers", "hidden_act", "unknown")
    copied = place / "copied"
    for file, lines in TWICE.items():
        for line in lines:
            shutil.copytree(place / "packed", copied)
            text = (copied / file).read_text() if (copied / file).exists() else '{"eos_token_id": 1}'
            (copied / file).write_text("{" + line + text.lstrip()[1:])
            train = ["train", str(copied), *TRAIN, "--out", str(place / "out")]
            yield Case(f"{file}: {line} first", running(train), must=True)
            shutil.rmtree(place / "out", ignore_errors=True)
            shutil.rmtree(copied)
    for file, wanted in {
        "config.json": keys,
        "tokenizer_config.json": ("tokenizer_class", "model_max_length", "eos_token", "added_tokens_decoder"),
        "generation_config.json": ("eos_token_id", "temperature", "max_length"),
    }.items():
        for key in wanted:
            for value in values:
                shutil.copytree(place / "packed", copied)
                text = (copied / file).read_text() if (copied / file).exists() else "{}"
                (copied / file).write_text(
                    "{" + f'"{key}": {value}' + "}" if key == "unknown" else _with(text, key, value)
                )
                yield Case(f"{file}: {key} = {value:.20}", running(["inspect", str(copied)]))
                reading = ["train", str(copied), *TRAIN, "--out", str(place / "out")]
                yield Case(f"{file}: {key} = {value:.20}, train", running(reading))
                shutil.rmtree(place / "out", ignore_errors=True)
                shutil.rmtree(copied)


def _with(text: str, key: str, value: str) -> str:
    """JSON with one value of its top level replaced by text that need not be JSON."""
    import json

    content = json.loads(text)
    content.pop(key, None)
    return json.dumps(content)[:-1] + f', "{key}": {value}' + "}"


READ = {  # command -> files that it has to read
    "inspect": {"config.json", "model.safetensors"},
    "train": {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"},
    "export": {"config.json", "model.safetensors", "run.json", "best.safetensors", "run.journal"},
    "resume": {"run.json", "best.safetensors", "metrics.jsonl", "run.journal"},
}


def nodes(place: Path) -> Iterator[Case]:
    """A FIFO, a socket, a device or a circle of links in the place of every file of a model and of a run."""
    kinds = {"FIFO": os.mkfifo, "socket": hostile.a_socket, "device": hostile.a_link("/dev/zero")}
    kinds |= {"folder": Path.mkdir, "circle": lambda path: path.symlink_to(path.name)}
    copied = place / "copied"
    for source in ("packed", "trained"):
        for file in sorted(path.name for path in (place / source).iterdir() if path.is_file()):
            for kind, make in kinds.items():
                shutil.copytree(place / source, copied)
                (copied / file).unlink()
                make(copied / file)
                for name, command in (
                    ("inspect", ["inspect", str(copied)]),
                    ("export", ["export", str(copied), str(place / "out")]),
                    ("train", ["train", str(copied), *TRAIN, "--out", str(place / "out")]),
                    ("resume", ["train", str(place / "packed"), *TRAIN, "--out", str(copied), "--resume"]),
                ):
                    if (name == "resume") == (source == "trained") or name == "export":
                        yield Case(f"{source}/{file} is a {kind}, {name}", running(command), must=file in READ[name])
                        shutil.rmtree(place / "out", ignore_errors=True)
                shutil.rmtree(copied)


def processes(place: Path) -> Iterator[Case]:
    """Variables and streams of new processes."""
    packed, trained = place / "packed", place / "trained"
    variables = ("-u HOME", "HOME=/nonexistent", "HOME=/proc", "TMPDIR=/nonexistent", "LC_ALL=C", "LC_ALL=POSIX")
    variables += (
        "PYTHONIOENCODING=ascii",
        "PYTHONIOENCODING=ascii LC_ALL=C PYTHONUTF8=0",
        "-u PATH",
        "TERM=",
        "COLUMNS=1",
    )
    variables += ("TMPDIR=/proc", "HF_HOME=/proc/nothing", "LANG=xx_YY.nothing")
    for variable in variables:
        for command in (f"inspect {packed}", f"export {trained} {place}/ünï", f"inspect {place}/nö"):
            run = _shell(f"env {variable} {sys.executable} -m qzo {command}")
            yield Case(f"{variable} {command.split()[0]}", run, starts=True)
            shutil.rmtree(place / "ünï", ignore_errors=True)
    for stream in (">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true"):
        for command in (f"inspect {packed}", f"export {trained} {place}/out", "--help", "--version", "inspect nothing"):
            run = _shell(f"{sys.executable} -m qzo {command} {stream}")
            full = stream.startswith(">/dev/full") and not command.startswith("export")  # whose files are whole
            yield Case(f"{command.split()[0]} {stream}", run, must=full, starts=True)
            shutil.rmtree(place / "out", ignore_errors=True)


def _shell(command: str) -> Callable[[], int]:
    limited = ["timeout", "--signal", "KILL", str(STARTED_AFTER), "bash", "-c", command]  # with all that it starts
    return lambda: subprocess.run(limited, cwd=figures.ROOT, check=False).returncode


GROUPS = {group.__name__: group for group in (places, names, settings, nodes, disks, processes)}


def problems(case: Case, start_seconds: float) -> dict[str, str]:
    """What is wrong with what a case did."""
    assert case.run is not None

    def limited() -> int:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process wherever it waits
        signal.alarm(STARTED_AFTER + KILLED_AFTER if case.starts else KILLED_AFTER)
        return case.run()

    before = _processor_seconds()
    code, text = alive(limited)
    seconds = _processor_seconds() - before - start_seconds * case.starts
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    hangs = code in (-signal.SIGALRM, -signal.SIGKILL, 128 + signal.SIGKILL)
    wrong = {
        "tracebacks": "Traceback" in text or "Exception ignored" in text,
        "wrong_codes": code not in (0, 2) and not hangs,
        "more_than_a_line": code == 2 and len(errors) > 1,
        "half": code != 0 and not hangs and case.out is not None and case.out.exists(),
        "silent": code == 0 and case.must,
        "slow": seconds > SECONDS,
        "hangs": hangs,
    }
    return {name: f"{code} {seconds:.1f} s {text[-300:]!r}" for name, is_wrong in wrong.items() if is_wrong}


def _processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _start_seconds(place: Path) -> float:
    """What a new process needs to import all that reading a model takes: a command that nothing is in the way of."""
    before = _processor_seconds()
    command = [sys.executable, "-m", "qzo", "inspect", str(place / "packed")]
    subprocess.run(command, cwd=figures.ROOT, capture_output=True, check=True)
    return _processor_seconds() - before


def attack(group: str) -> Counter[str]:
    """Try the cases of a group; how many were tried, not run, and wrong in which way."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        works_of[place] = works(place)
        read = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        start_seconds = _start_seconds(place) if group == "processes" else 0.0
        for case in GROUPS[group](place):
            if case.run is None:
                counts["not_run"] += 1
                continue
            found = problems(case, start_seconds)
            if any(not path.is_file() or path.read_bytes() != data for path, data in read.items()):
                found["changed"] = "what was there before"
            counts.update(["tried", *found])
            for what, about in found.items():
                print(f"{group}: {case.name}: {what} {about}", file=sys.stderr, flush=True)
            if counts["tried"] % 50 == 0:
                print(f"{group}: {counts['tried']} so far", file=sys.stderr, flush=True)
    not_run = f", {counts['not_run']} NOT RUN: no file system can be mounted here" if counts["not_run"] else ""
    wrong = ", ".join(f"{counts[what]} {what.replace('_', ' ')}" for what in WRONG)
    print(f"{group}: {counts['tried']} tried{not_run}, {wrong}", flush=True)
    return counts


def main_attack(wanted: list[str]) -> NoReturn:
    """All groups, or those named."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for group in wanted or GROUPS:
        counts += attack(group)
    figures.finish("environment", counts["tried"], **{what: counts[what] for what in WRONG})


if __name__ == "__main__":
    main_attack(sys.argv[1:])
