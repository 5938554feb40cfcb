"""Every file operation of train, export, quantize and replay as the moment of a SIGTERM or SIGINT.

    python tests/attack/attack_signals.py [WORK ...]

For each operation a new folder. Afterwards the exit code is 143 or 130, or 0 where the work was done by then, with one
line that says what to do; what is made is whole or absent, and the same command (with --resume) comes to the same end.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import figures
import torch
from crash_works import works
from crashes import alive, operations, signal_at

SIGNALS = (signal.SIGTERM, signal.SIGINT)
OWN = ("journal",)  # a program of a user's own, with handlers of its own or none


def main(wanted: list[str]) -> NoReturn:
    torch.set_num_threads(1)
    counts = {"lost": 0, "different": 0, "half": 0, "tracebacks": 0, "wrong_codes": 0, "untold": 0}
    tried = 0
    for number in SIGNALS:  # of a shell in the background, SIGINT is ignored by its children
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        made = works(Path(folder))
        for name in wanted or [name for name in made if name not in OWN]:
            (whole := Path(folder) / f"{name}-whole").mkdir()
            operation = operations(whole, lambda: made[name].begin(whole))  # noqa: B023
            expected = made[name].result(whole)
            for number, what in enumerate(operation):
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    problems = _life(made[name], Path(place), number, SIGNALS[number % 2], expected)
                tried += 1
                for problem, about in problems.items():
                    counts[problem] += 1
                    print(f"{name}, {what}: {problem} {about[-300:]!r}", file=sys.stderr)
    figures.finish("signals", tried, **counts)


def _life(work, place: Path, number: int, sent: signal.Signals, wanted: dict[str, object]) -> dict[str, str]:
    code, text = signal_at(place, number, sent, lambda: work.begin(place))
    problems = {"tracebacks": text} if "Traceback" in text else {}
    if code not in (0, 128 + sent):
        problems["wrong_codes"] = f"{code} {text}"
    if code == 128 + sent and not any(line.startswith("error: ") for line in text.splitlines()):
        problems["untold"] = text
    left = work.result(place) if work.whole or code == 0 else None
    if left is not None and left != wanted:
        problems["half"] = text
    if code == 0 or left == wanted:
        return problems
    again, shown = alive(lambda: work.go_on(place))
    if "Traceback" in shown:
        problems["tracebacks"] = shown
    if again:
        problems["lost"] = shown
    elif work.result(place) != wanted:
        problems["different"] = shown
    return problems


if __name__ == "__main__":
    main(sys.argv[1:])
