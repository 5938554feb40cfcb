"""`bench run`: check, run the cells, write records and summary, print the tables."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.cases import gpus, weights
from bench.cases.case import BenchCase
from bench.cases.methods import BY_NAME
from bench.cases.models import ModelSource
from bench.commands.recipe_options import Chosen, chosen
from bench.records.files import SUMMARY, make_folder, read_record, write_json
from bench.records.record import Record
from bench.records.summary import summarise
from bench.worlds import plan
from bench.worlds.runner import Progress, run_cells
from bench.worlds.watch import case_of

SEQ_LEN = 128


def run(options: argparse.Namespace) -> int:
    """Exit code 0 if every cell ran or does not apply to the model, 1 if one failed, ran out of memory, or none ran."""
    asked = chosen(options)
    methods = asked.methods
    source, cases = cells_of(options, asked)
    for note in asked.notes():
        print(note, file=sys.stderr)
    out = Path(options.out or Path("results") / source.name)
    make_folder(out)
    if options.device == "auto" and cases[0].device == "cuda":
        gpu = options.gpu or gpus.DEFAULT_GPU
        cases = plan.fitting(cases, gpu, lambda predicted: _run(source, predicted, out))
    forget_other_cases(out, cases)
    records = {record["case"]["method"]: record for record in _earlier(out)}
    try:
        for record in _run(source, cases, out):
            records[record["case"]["method"]] = record
    finally:
        records |= {record["case"]["method"]: record for record in _earlier(out)}
        if records:
            write_json(out / SUMMARY, summarise(records))
    shown = subprocess.run([sys.executable, "-m", "reports", str(out)])
    statuses = [records[method]["status"] for method in methods]
    failed = "error" in statuses or "oom" in statuses or "ok" not in statuses
    return shown.returncode or int(failed)


def cells_of(options: argparse.Namespace, asked: Chosen) -> tuple[ModelSource, list[BenchCase]]:
    """The model, and a checked case for each method."""
    case = BenchCase(
        asked.model(options.model), asked.methods[0], options.device, options.gpu, asked.batch_size(options.batch_size),
        asked.seq_len(options.seq_len, SEQ_LEN), asked.attention(options.attention), options.gradient_checkpointing,
        options.group_size, options.steps, quantization=options.quantization,
    )  # fmt: skip
    source, cases = plan.cells(case, asked.methods)
    return source, [asked.cell(case) for case in cases]


def _run(source: ModelSource, cases: Sequence[BenchCase], out: Path) -> list[Record]:
    """Run the cases with the weights unpacked once, if there are packed ones; report progress."""
    records: list[Record] = []
    progress = Progress(len(cases))

    def done(record: Record) -> None:
        records.append(record)
        progress(record)

    with tempfile.TemporaryDirectory(prefix="qzo-bench-") as folder:
        if any(case.device != "sim" for case in cases) and weights.kind(source) == "gguf":
            print(f"unpacking {source.weights} once for all cells", file=sys.stderr, flush=True)
            weights.unpack(source, Path(folder))
            cases = [case if case.device == "sim" else replace(case, weights=folder) for case in cases]
        run_cells(cases, out, done)
    return records


def forget_other_cases(out: Path, cases: Sequence[BenchCase]) -> None:
    """Remove records of an earlier run with other settings: one folder holds cells that can be compared."""
    first = case_of(cases[0])
    same = ["model", "batch_size", "seq_len"]
    same += ["attention"] if cases[0].attention else []
    for record in _earlier(out):
        case = record["case"]
        other = [key for key in same if case[key] != first[key]]
        if record["world"] == "simulated" and case["gpu"] != (cases[0].gpu or case["gpu"]):
            other.append("gpu")
        if case["gradient_checkpointing"] != replace(cases[0], method=case["method"]).recomputes:
            other.append("gradient_checkpointing")
        if other:
            path = out / f"{case['method']}.json"
            print(f"removing {path}: made with another {', '.join(other)}", file=sys.stderr)
            path.unlink()


def _earlier(out: Path) -> list[Record]:
    return [read_record(path) for path in sorted(out.glob("*.json")) if path.stem in BY_NAME]
