"""Every file operation of train, own-loop journal, export, quantize and replay as the moment of a SIGKILL.

    python tests/attack/attack_crash_points.py [WORK ...]

For each operation a new folder, killed there, then taken up again: counted is what did not come to the end of a work
that was never killed, what was half made, and tracebacks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import figures
import torch
from crash_works import works
from crashes import alive, kill_at, operations


def main(wanted: list[str]) -> NoReturn:
    torch.set_num_threads(1)
    counts = {"killed": 0, "lost": 0, "different": 0, "half": 0, "tracebacks": 0}
    with tempfile.TemporaryDirectory() as folder:
        made = works(Path(folder))
        for name in wanted or list(made):
            _attack(name, made[name], Path(folder), counts)
    figures.finish("crash points", counts.pop("killed"), **counts)


def _attack(name, work, folder: Path, counts: dict[str, int]) -> None:
    (whole := folder / f"{name}-whole").mkdir()
    operation = operations(whole, lambda: work.begin(whole))
    wanted = work.result(whole)
    for number, what in enumerate(operation):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            problems = _life(work, Path(place), number, wanted)
        counts["killed"] += 1
        for problem in problems:
            counts[problem] += 1
            print(f"{name}, {what}: {problem}", file=sys.stderr)


def _life(work, place: Path, number: int, wanted: dict[str, object]) -> list[str]:
    if not kill_at(place, number, lambda: work.begin(place)):
        return ["different"]  # it is not the same operations again
    left = work.result(place) if work.whole else None
    if left == wanted:
        return []
    problems = [] if left is None else ["half"]
    code, text = alive(lambda: work.go_on(place))
    problems += ["tracebacks"] if "Traceback" in text else []
    problems += ["lost"] if code else []
    return problems + (["different"] if not code and work.result(place) != wanted else [])


if __name__ == "__main__":
    main(sys.argv[1:])
