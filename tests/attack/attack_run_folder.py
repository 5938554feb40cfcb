"""Damage to what a run and its journal keep, and full disks, as attacks on resume, export and replay.

    python tests/attack/attack_run_folder.py [FLIPS]

Bits: one flipped bit in each of FLIPS places of every file of a run folder. Afterwards a resume and an export of the
best state are made; either ends in one line of error (exit code 2), or comes to the very end of the undamaged run.
Disks: each command on a disk that takes so many bytes a file and no more; it says so in one line, and nothing is left.
"""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import figures
import torch
from crash_works import Work, works
from crashes import alive

from qzo.commands.main import main as qzo

HARMLESS = ("result.json",)  # nobody reads it


def main(flips: int) -> NoReturn:
    torch.set_num_threads(1)
    counts = {"silent": 0, "tracebacks": 0, "half": 0, "wrong_codes": 0}
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        made = works(Path(folder))
        for name in ("train", "first order"):
            tried += _bits(made[name], Path(folder), name, flips, counts)
        for name, work in made.items():
            if name == "journal":  # a program of a user's own, to which the error is raised
                continue
            tried += _disks(work, Path(folder), name, counts)
    figures.finish("run folders", tried, **counts)


def _bits(work: Work, folder: Path, name: str, flips: int, counts: dict[str, int]) -> int:
    whole, dice, tried = folder / f"{name}-bits", random.Random(name), 0
    whole.mkdir()
    assert alive(lambda: work.begin(whole))[0] == 0
    more = _further(work, whole, folder / f"{name}-further")
    for file in sorted((whole / "run").iterdir()):
        if not file.is_file() or file.name in HARMLESS:
            continue
        data = file.read_bytes()
        for _ in range(flips):
            place, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
            damaged = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
            with tempfile.TemporaryDirectory(dir=folder) as life:
                copied = shutil.copytree(whole, Path(life) / "w")
                (copied / "run" / file.name).write_bytes(damaged)
                for what, (code, text, result) in _taken_up(work, copied).items():
                    _count(counts, f"{name}: {file.name}, byte {place}, {what}", code, text, result, more[what])
            tried += 1
    return tried


def _count(counts: dict[str, int], where: str, code: int, text: str, result: Any, wanted: Any) -> None:
    wrong = [
        ("tracebacks", "Traceback" in text),
        ("wrong_codes", code not in (0, 2)),
        ("silent", code == 0 and result != wanted),
    ]
    for what, is_wrong in wrong:
        counts[what] += is_wrong
        if is_wrong:
            print(f"{where}: {what} {text[-300:]!r}", file=sys.stderr)


def _taken_up(work: Work, place: Path) -> dict[str, tuple[int, str, Any]]:
    """Export of the best state, then a resume with two steps more: exit code, what was printed, and what came of it."""
    out = place / "out"
    code, text = alive(lambda: qzo(["export", str(place / "run"), str(out)]))
    exported = {file.name: file.read_bytes() for file in out.iterdir()} if out.exists() else None
    again, shown = alive(lambda: work.go_on(place))
    return {"export": (code, text, exported), "resume": (again, shown, work.result(place) if again == 0 else None)}


def _further(work: Work, whole: Path, place: Path) -> dict[str, Any]:
    copied = shutil.copytree(whole, place)
    found = _taken_up(work, copied)
    assert all(code == 0 for code, _, _ in found.values()), found
    return {what: result for what, (_, _, result) in found.items()}


def _disks(work: Work, folder: Path, name: str, counts: dict[str, int]) -> int:
    """A limit on the size of a file stands for a disk that fills up."""
    tried = 0
    for room in (0, 50, 300, 1000, 3000, 10_000, 20_000, 40_000):
        place = folder / f"{name}-{room}"
        place.mkdir()

        def limited(room: int = room, place: Path = place) -> int:
            shown = sys.stdout = sys.stderr = io.StringIO()  # what is printed goes to a file that has room
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            try:
                return work.begin(place)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                os.write(1, shown.getvalue().encode())

        code, text = alive(limited)
        half = work.whole and code != 0 and any(place.iterdir())
        counts["tracebacks"] += "Traceback" in text
        counts["half"] += half
        counts["wrong_codes"] += code not in (0, 2)
        if "Traceback" in text or half or code not in (0, 2):
            print(f"{name}, files of {room} bytes: {code} {text[-300:]!r} {sorted(place.rglob('*'))}", file=sys.stderr)
        tried += 1
    return tried


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
