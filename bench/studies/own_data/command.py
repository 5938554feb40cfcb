"""`qzo train` as a user runs it: killed in its midst, begun again, and gone on with as the command says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qzo.errors import QzoError
from qzo.training.run import METRICS, RESULT, RUN

QZO = (sys.executable, "-m", "qzo")
POLL_SECONDS = 0.2


@dataclass
class Spent:
    """Of all processes of a run together."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    killed_at: int | None = None  # steps that metrics.jsonl held


def trained(model: str, data: Path, run: Path, more: Sequence[str] = ()) -> Spent:
    """Train, killed by SIGKILL after half of the steps; what is done already is not done again.

    No number is given by hand, but where a trial of this study brings `more` options.

    Raises QzoError where a process ends in another way than it should.
    """
    notes = run.with_suffix(".spent.json")
    spent = Spent(**json.loads(notes.read_text(encoding="utf-8"))) if notes.exists() else Spent()
    command = [*QZO, "train", model, "--data", str(data), "--out", str(run), *more]
    log = run.with_suffix(".log")
    if spent.killed_at is None:
        again = ["--resume"] if (run / RUN).exists() else []
        spent.killed_at = _killed([*command, *again], run, log, spent)
        notes.write_text(json.dumps(vars(spent)), encoding="utf-8")
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        if told.returncode != 2 or "--resume" not in told.stderr:
            raise QzoError(
                f"{run}: the command after a SIGKILL ends with {told.returncode}: {told.stderr.strip()}; run it by "
                "hand to see"
            )
    if not (run / RESULT).exists():
        code = _watched([*command, "--resume"], log, spent, lambda: False)
        notes.write_text(json.dumps(vars(spent)), encoding="utf-8")
        if code:
            raise QzoError(f"{run}: gone on with, the command ends with {code}; read what it said in {log}")
    return spent


def _killed(command: list[str], run: Path, log: Path, spent: Spent) -> int:
    """Kill a run when half of its steps are taken; returns how many were."""
    code = _watched(command, log, spent, lambda: _is_half(run))
    if code != -signal.SIGKILL:
        raise QzoError(f"{run}: ended with {code} before half of its steps; read what it said in {log}")
    return _steps(run)


def _watched(command: list[str], log: Path, spent: Spent, is_due: Callable[[], bool]) -> int:
    """Run a command, kill it once `is_due()`; returns its exit code, minus the number of a signal."""
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as opened:
        process = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT)
    try:
        while True:
            number, status, usage = os.wait4(process.pid, os.WNOHANG)
            if number:
                break
            if is_due():
                process.kill()
            time.sleep(POLL_SECONDS)
    except BaseException:
        process.kill()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    spent.wall_seconds += time.monotonic() - started
    spent.cpu_seconds += usage.ru_utime + usage.ru_stime
    return process.returncode


def _steps(run: Path) -> int:
    """Steps whose lines are on the disk."""
    if not (run / METRICS).exists():
        return 0
    return sum('"lr"' in line for line in (run / METRICS).read_text(encoding="utf-8").splitlines())


def _is_half(run: Path) -> bool:
    """Whether half of the steps that a run was asked for are taken."""
    if not (run / RUN).exists():
        return False
    return _steps(run) >= json.loads((run / RUN).read_text(encoding="utf-8"))["settings"]["steps"] // 2
