"""`bench fit`: for every method the largest batch and the longest sequence that a memory holds."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from tabulate import tabulate

from bench.capacity.answer import answer
from bench.capacity.capacity import Capacity, Question
from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource
from bench.commands.recipe_options import chosen
from bench.worlds import plan
from qzo.errors import QzoError
from qzo.output import check_output, write_output

GIB = 1 << 30
SEQ_LEN = 512
UNITS = {"gib": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}


def run(options: argparse.Namespace) -> int:
    """Print the table; exit code 0 if a method fits, 1 if none does."""
    asked = chosen(options)
    methods = asked.methods
    gpu = gpus.get(options.gpu or gpus.DEFAULT_GPU)
    if options.memory is None and options.gpu is None:
        raise QzoError("fit needs a memory; give --memory 24GiB, or --gpu with a name from `bench list gpus`")
    memory = gpu.memory_bytes if options.memory is None else parse_memory(options.memory)
    case = BenchCase(
        asked.model(options.model), methods[0], "sim", gpu.name, 1, asked.seq_len(options.seq_len, SEQ_LEN),
        asked.attention(options.attention), options.gradient_checkpointing,
    )  # fmt: skip
    if options.json:
        check_output(options.json)  # a path that cannot be written is told before the work
    source, cases = plan.cells(case, methods)
    cases = [asked.cell(item) for item in cases]
    questions = [Question(item, memory, _positions(source), batch_only=_many_lengths(item)) for item in cases]
    report: dict[str, Any] = {
        "model": source.name, "memory": memory, "gpu": gpu.name, "seq_len": case.seq_len,
        "attention": case.attention, "gradient_checkpointing": case.gradient_checkpointing,
        "settings": asked.settings(),
        "notes": asked.notes() + list(filter(None, [gpu.context_note(any(case.first_order for case in cases))])),
        "methods": answer(questions, source),
    }  # fmt: skip
    print(table(report))
    if options.json:
        write_output(options.json, json.dumps(report, indent=2, allow_nan=False) + "\n")
    return int(all(row["status"] != "fits" for row in report["methods"]))


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24GB" (10^9 bytes each), "24576MiB", "24000MB" or a plain number of GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)?", text.strip().lower())
    nbytes = int(float(match[1]) * UNITS[match[2] or "gib"]) if match else 0
    if not nbytes:
        raise QzoError(f"memory={text!r} is no size; write 24GiB, 24GB, 24576MiB, 24000MB or 24 (GiB)")
    return nbytes


def table(report: dict[str, Any]) -> str:
    """One line a method: batch and sequence with the process bytes they take, the limit, and the change that helps."""
    lines = [_line(row, report["seq_len"]) for row in report["methods"]]
    headers = [
        "method", f"batch at {report['seq_len']} tokens", "process, GiB", "tokens at batch 1", "process, GiB",
        "limited by", "cheapest change that helps",
    ]  # fmt: skip
    head = f"{report['model']} in {report['memory'] / GIB:.2f} GiB, simulated {report['gpu']}"
    told = [f"{method}, other than in the table: {changes}" for method, changes in report["settings"].items()]
    notes = "".join(f"\n{note}" for note in told + report["notes"])
    return f"{head}\n\n{tabulate(lines, headers, tablefmt='pipe', disable_numparse=True)}\n{notes}"


def _line(row: Capacity, seq_len: int) -> list[str]:
    batch, sequence = row["batch"], row["sequence"]
    cells = [row["method"]]
    for point in (batch, sequence):
        cells += [f"{point['largest']:,}", f"{point['process'] / GIB:.2f}"] if point else ["-", "-"]
    if not batch and row["base"]:
        cells[2] = f"batch 1: {row['base']['peak']['process'] / GIB:.2f}"
    limits = dict.fromkeys(point["limited_by"] for point in (batch, sequence) if point)
    cells.append(row["message"] or ", ".join(limits))
    remedy = row["remedy"]
    checked = remedy and ("simulated" if remedy["checked"] == "simulated" else f"calculated: {remedy['checked']}")
    cells.append(f"{remedy['change']}: batch {remedy['batch']:,} ({checked})" if remedy else "none known")
    return cells


def _many_lengths(case: BenchCase) -> bool:
    """Whether rows have lengths of their own, which no longest sequence can be searched for."""
    return case.recipe is not None and len(set(case.recipe.lengths)) > 1


def _positions(source: ModelSource) -> int | None:
    return getattr(source.config.get_text_config(), "max_position_embeddings", None)
