"""One cell in a process of its own: cases come in as JSON lines on stdin, records leave as JSON lines on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import bench
import qzo
from bench.cases.case import BenchCase
from bench.cases.gpus import CPU
from bench.records.record import Record

HERE = Path(bench.__file__).parent
OURS = {HERE, Path(qzo.__file__).parent}
SEEING = {HERE / "ledger", HERE / "simulator"}
# Of tensors without data: `nonzero`, `tolist`, and the autocast of a device that has none
NO_NUMBERS = ("register_meta function", "Cannot copy out of meta tensor", "unsupported scalarType")
PAST_FORWARD = r"'(\w+)' object has no attribute 'weight'"
WORLD_OF = {"sim": "simulated", "cpu": "measured-cpu", "cuda": "measured-cuda"}


def run(case: BenchCase) -> Record:
    """The record of a case; whatever goes wrong becomes a record with the reason."""
    from bench.records.environment import environment
    from bench.records.record import failed_record
    from bench.worlds.watch import case_of
    from qzo.errors import QzoError

    try:
        return _world(case)(case)
    except QzoError as error:
        status, message = "unsupported", str(error)
    except ImportError as error:
        status, message = "unsupported", f"{case.method} needs the package {error.name}: pip install {error.name}"
    except Exception as error:
        memory = "out of memory" in str(error).lower() or isinstance(error, MemoryError)
        status, message = "oom" if memory else "error", f"{type(error).__name__}: {error}".strip().split("\n")[0]
        place = None if memory else _place_in_model(error)
        if place is None:
            traceback.print_exc(file=sys.stderr)
        else:
            status, message = "unsupported", _told(place, message)
    return failed_record(case_of(case), WORLD_OF[case.device], environment(), status=status, message=message)


def _told(place: str, message: str) -> str:
    """Why a model's own code ended in an error: because of what the bench gave it, where it is that, or by itself."""
    if any(words in message for words in NO_NUMBERS):
        return f"{place} asks for what only tensors with data can tell; choose --device cuda or cpu"
    if match := re.search(PAST_FORWARD, message):
        return f"{place} reads the weight of a layer past its forward, and a {match[1]} has none; choose another method"
    return f"the model's own code cannot do it ({place}): {message}"


def _place_in_model(error: Exception) -> str | None:
    """File and line of transformers' model that an error comes from; None where the bench or qzo made it themselves.

    The ledger and the simulator see every operator of a model, so they are passed by.
    """
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    for path, line in reversed(frames):
        parts = path.parts
        if "transformers" in parts and "models" in parts:
            return f"{path.name}, line {line}"
        if OURS.isdisjoint(path.parents):
            continue
        if not SEEING & set(path.parents):
            return None
    return None


def _world(case: BenchCase) -> Any:
    if case.device == "sim" and case.gpu == CPU:
        from bench.worlds import sim_cpu

        return sim_cpu.run
    if case.device == "sim":
        from bench.worlds import sim

        return sim.run
    if case.device == "cpu":
        from bench.worlds import cpu

        return cpu.run
    from bench.worlds import cuda

    return cuda.run


def serve() -> None:
    """Answer each line on stdin until it is closed; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        record = run(BenchCase.from_json(json.loads(line)))
        answers.write(json.dumps(record) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
