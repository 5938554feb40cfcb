"""Evidence from a real device: cells from 0.1B to 13B with random weights, each measured beside its prediction.

`python -m bench.validation.measure` (what `make gpu` calls) writes one file of records for `bench validate`, each with
a key `predicted`: the figures of the same case, simulated before the measurement on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.methods import METHODS
from bench.records.record import Record
from bench.validation.recorded import figures
from bench.worlds import plan
from bench.worlds.runner import run_cells
from qzo.errors import QzoError

MODELS = ("opt-125m", "llama3.2-1b", "llama2-7b", "llama2-13b")
SECONDS = 400  # no cell is started after these: on one H100 the whole target stays under 8 minutes
SEQ_LEN = 512
STEPS = 4


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser(
        prog="python -m bench.validation.measure", description=(__doc__ or "").splitlines()[0]
    )
    found.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    found.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    found.add_argument("--methods", help="comma-separated; default all ten")
    found.add_argument("--batch-size", type=int, default=1)
    found.add_argument("--seq-len", type=int, default=SEQ_LEN, help="default: %(default)s")
    found.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no cell after these (default: %(default)s)"
    )
    found.add_argument("--out", default="reports/measurements", help="folder (default: %(default)s)")
    return found


def run(options: argparse.Namespace) -> int:
    """Predict, then measure what fits, smallest models first; exit code 0, or 1 if a cell failed."""
    end = time.monotonic() + options.seconds
    target, memory = device_at_hand(options.device)
    methods = plan.parse_methods(options.methods)
    cases = [
        case for model in options.models.split(",") for case in plan.cells(_case(options, model, target), methods)[1]
    ]
    out = Path(options.out) / f"{target}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="qzo-measure-") as folder:
        for predicted, case in zip(predictions(cases, Path(folder)), cases, strict=True):
            name = f"{case.model} {case.method}"
            reason = why_not(predicted, memory, time.monotonic() > end)
            if reason:
                print(f"{name}: not measured, {reason}", file=sys.stderr, flush=True)
                continue
            record = _one(replace(case, device=options.device, gpu=None), Path(folder))
            failed += record["status"] not in ("ok", "unsupported")
            print(f"{name}: {record['status']} {record['message'] or ''}", file=sys.stderr, flush=True)
            if record["status"] == "ok":
                lines.append(json.dumps({**record, "predicted": figures(predicted)}))
                write_lines(out, lines)
    print(f"{len(lines)} cells in {out}; next: python -m bench validate {out}")
    return int(failed > 0 or not lines)


def device_at_hand(device: str) -> tuple[str, int]:
    """Name of what `sim` stands for, and its memory in bytes. Raises QzoError without a GPU, or for an unknown one."""
    if device == "cpu":
        return gpus.CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        raise QzoError("no NVIDIA GPU that this PyTorch can use; --device cpu makes a dry run")
    return gpus.find(torch.cuda.get_device_name()).name, int(torch.cuda.get_device_properties().total_memory)


def predictions(cases: Sequence[BenchCase], folder: Path) -> list[Record]:
    """The simulated record of each case, in order."""
    by_case: dict[tuple[str, str], Record] = {}

    def keep(record: Record) -> None:
        by_case[record["case"]["model"], record["case"]["method"]] = record

    run_cells(cases, folder, keep)
    return [by_case[case.model, case.method] for case in cases]


def why_not(predicted: Record, memory: int, late: bool) -> str | None:
    """Why a cell is not measured; None if it is."""
    if predicted["status"] != "ok":
        return str(predicted["message"])
    needed = predicted["peak"]["process"] or predicted["peak"]["allocated"]
    if needed > memory:
        return f"it needs {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"
    return "the time is over" if late else None


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Replace the file as a whole: an interrupted run leaves the cells that were finished."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


def _case(options: argparse.Namespace, model: str, target: str) -> BenchCase:
    return BenchCase(
        model, METHODS[0], device="sim", gpu=target, batch_size=options.batch_size, seq_len=options.seq_len, steps=STEPS
    )


def _one(case: BenchCase, folder: Path) -> Record:
    records: list[Record] = []
    run_cells([case], folder, records.append)
    return records[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if every cell was measured, 1 if one failed, 2 and one line on stderr for bad input."""
    try:
        return run(parser().parse_args(arguments))
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
