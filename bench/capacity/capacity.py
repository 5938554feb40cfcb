"""How much of a step one method fits into a memory: the largest batch, the longest sequence, and what limits them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bench.capacity.search import largest
from bench.cases.case import BenchCase
from bench.records.record import Record
from bench.worlds import cell

SHORTEST = 2  # tokens: one to read and one to predict
HELD = ("weights", "quantization", "gradients", "optimizer")  # roles that no smaller batch or sequence makes smaller
POSITIONS = "positions of the model"
Capacity = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked of one method.

    Attributes:
        case: batch size 1 and the sequence length for which the largest batch is wanted.
        memory_bytes: what the process may take: reserved and the CUDA context.
        longest: positions of the model, None if it has no end. batch_only: leave the longest sequence out.
    """

    case: BenchCase
    memory_bytes: int
    longest: int | None
    batch_only: bool = False


class _Failed(Exception):
    """A simulation that gave a record without numbers."""


def capacity(question: Question) -> Capacity:
    """Largest batch and longest sequence by simulation; every reported size was simulated, and so was the next one.

    Keys: method, gradient_checkpointing, status ("fits", "does not fit", or that of a record without numbers), message,
    base (the record at batch 1), batch and sequence: {largest, process, next_process, limited_by} or None.
    """
    case = question.case
    shown: Capacity = {
        "method": case.method, "gradient_checkpointing": case.recomputes,
        "status": "does not fit", "message": None, "base": None, "batch": None, "sequence": None,
    }  # fmt: skip
    try:
        base = _simulate(case)
        shown["base"] = base
        shown["batch"] = _largest(question, "batch_size", base, 1, None)
        held = sum(base["at_peak"][role] for role in HELD)
        if held > question.memory_bytes:
            largest_held = max(HELD, key=lambda role: base["at_peak"][role])
            weights = base["at_peak"]["weights"] + base["at_peak"]["quantization"] > question.memory_bytes
            shown["message"] = "weights do not fit" if weights else f"held for every batch, most of it {largest_held}"
        elif not question.batch_only:
            shortest = case.seq_len if shown["batch"] else SHORTEST
            shown["sequence"] = _largest(question, "seq_len", base, shortest, question.longest)
        if not shown["batch"] and shown["message"] is None:
            shown["message"] = f"most of batch 1 is {max(base['at_peak'], key=base['at_peak'].__getitem__)}"
    except _Failed as failed:
        record: Record = failed.args[0]
        return shown | {"status": record["status"], "message": record["message"]}
    return shown | ({"status": "fits"} if shown["batch"] or shown["sequence"] else {})


def _simulate(case: BenchCase) -> Record:
    record = cell.run(case)
    if record["status"] != "ok":
        raise _Failed(record)
    return record


def _largest(question: Question, size: str, base: Record, lowest: int, highest: int | None) -> dict[str, Any] | None:
    """The largest `size` (a field of the case) that fits, the next one, and the role that grew most up to there."""
    case = question.case
    records = {getattr(case, size): base}

    def process(value: int) -> int:
        if value not in records:
            change: dict[str, Any] = {size: value}
            records[value] = _simulate(replace(case, **change))
        return records[value]["peak"]["process"]

    value = largest(process, question.memory_bytes, lowest, highest)
    if value is None:
        return None
    beyond = records.get(value + 1) if value != highest else None
    return {
        "largest": value,
        "process": process(value),
        "next_process": beyond and beyond["peak"]["process"],
        "limited_by": _growing(records[min(records)], beyond) if beyond else POSITIONS,
    }


def _growing(small: Record, large: Record) -> str:
    """The role whose bytes at the peak grew most; fragmentation where only the reserve grew."""
    grown = {role: nbytes - small["at_peak"][role] for role, nbytes in large["at_peak"].items()}
    role = max(grown, key=grown.__getitem__)
    return role if grown[role] > 0 else "fragmentation"
