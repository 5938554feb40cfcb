"""Reading a results folder, and the questions that several tables ask of its records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.errors import ReportError

Record = dict[str, Any]

ROLES = ("weights", "quantization", "gradients", "optimizer", "activations", "noise", "temporaries", "unattributed")
METHODS = ("ft-bf16", "ft-mixed", "ft-amp", "ft-sgd", "lora", "qlora", "qlora-lean", "peqa-lean", "mezo", "qzo",
           "qzo-full", "qzo-2bit")  # fmt: skip
FRUGAL = ("qlora-lean", "peqa-lean")  # backpropagation with all that saves memory
QUANTIZABLE = ("qzo", "qzo-full")  # methods whose format is a choice
BASELINES = ("ft-bf16", "ft-mixed", "ft-amp")
PAPER_BASELINE = "ft-mixed"  # the one that the paper measured: its AdamW column
SAME_CASE = ("model", "batch_size", "seq_len", "gpu")  # what two methods must share for their ratio to mean anything
CPU = "measured-cpu"
RSS_NOTE = f"Process bytes in the world {CPU} are the process's peak RSS: Python and all libraries are in it."

_VERSION = 1
_KEYS = {
    "": ("schema_version", "status", "message", "world", "case", "parameters", "peak", "at_peak", "floor", "phases",
         "step_seconds", "environment"),
    "case": ("model", "method", "batch_size", "seq_len", "dtype", "attention", "gradient_checkpointing", "optimizer",
             "quantization", "gpu"),
    "parameters": ("total", "trainable"),
    "peak": ("allocated", "reserved", "process"),
    "environment": ("torch", "transformers", "python", "platform", "gpu", "driver", "commit", "dirty"),
}  # fmt: skip


def load(folder: str | Path) -> list[Record]:
    """The records of a results folder in the order of `METHODS`; `summary.json` holds the same and is not read.

    Raises:
        ReportError: no such folder, no records in it, or a damaged record; the path is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"no folder {folder}; give one that `python -m bench run` wrote")
    records = [_read(path) for path in sorted(folder.glob("*.json")) if path.name != "summary.json"]
    if not records:
        raise ReportError(f"no records in {folder}; run `python -m bench run MODEL --out {folder}` first")
    rank = {method: index for index, method in enumerate(METHODS)}
    return sorted(records, key=lambda record: rank.get(method_of(record), len(rank)))


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
        _check(record)
        if method_of(record) != path.stem:
            raise ValueError(f"the method is {method_of(record)!r}, and a file is named after its method")
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}; name another folder") from error
    except ValueError as error:
        raise ReportError(
            f"{path} is not a record of schema version {_VERSION}: {error}; run `python -m bench run` again"
        ) from error
    return record


def _check(record: Any) -> None:
    """Raise ValueError for what a table would stumble over; the full schema is checked where records are written."""
    for name, keys in _KEYS.items():
        part = record[name] if name else record
        missing = [key for key in keys if not isinstance(part, dict) or key not in part]
        if missing:
            raise ValueError(f"{name or 'it'} has no {missing[0]!r}")
    if record["schema_version"] != _VERSION:
        raise ValueError(f"schema_version is {record['schema_version']!r}")
    sizes = {**record["peak"], "floor": record["floor"]}
    if is_ok(record):
        if record["peak"]["allocated"] is None or not isinstance(record["at_peak"], dict):
            raise ValueError("status is ok, but peak.allocated or at_peak is null")
        sizes.update({role: record["at_peak"].get(role, "missing") for role in ROLES})
    for name, nbytes in sizes.items():
        if nbytes is not None and (not isinstance(nbytes, int) or nbytes < 0):
            raise ValueError(f"{name} is {nbytes!r}, not integer bytes")


def method_of(record: Record) -> str:
    """Name of the method."""
    return str(record["case"]["method"])


def label_of(record: Record) -> str:
    """Name of the method, with the format of `--quantization` where it is not the 4-bit GPTQ of a default run."""
    about, method = record["case"]["quantization"], method_of(record)
    if method not in QUANTIZABLE or not about or (about["format"], about["bits"]) == ("gptq", 4):
        return method
    name = str(about["format"])
    return f"{method} ({name}-{about['bits']})" if name in ("gptq", "hqq") else f"{method} ({name})"


def is_ok(record: Record) -> bool:
    """Whether the cell ran to its end and has numbers."""
    return bool(record["status"] == "ok")


def find(records: Sequence[Record], method: str) -> Record | None:
    """The record of a method, or None."""
    return next((record for record in records if method_of(record) == method), None)


def ratio(baseline: Record | None, record: Record, kind: str) -> float | None:
    """Peak bytes of `baseline` over those of `record`, for kind "allocated" or "process".

    None where either is unknown, where the two come from different worlds, and where `SAME_CASE` differs.
    """
    if baseline is None or baseline["world"] != record["world"]:
        return None
    if any(baseline["case"][key] != record["case"][key] for key in SAME_CASE):
        return None
    above, below = baseline["peak"][kind], record["peak"][kind]
    return above / below if above is not None and below else None


def needed_bytes(record: Record) -> tuple[int | None, str]:
    """What a card must hold, and which measure that is: process bytes, or allocated where those are unknown."""
    kind = "allocated" if record["peak"]["process"] is None else "process"
    return record["peak"][kind], kind


def world_of(record: Record) -> str:
    """The world in words, with the GPU where there is one: "simulated rtx-4090"."""
    gpu = record["case"]["gpu"]
    return f"{record['world']} {gpu}" if gpu else str(record["world"])
