"""Predicted against really measured peaks on this machine's CPU: `python -m bench.studies.validation_cpu`.

Every method on three architectures of under 200M parameters, once simulated (`--device sim --gpu cpu`) and once run
(`--device cpu`), each run in a process of its own. Takes about half an hour on two cores and 3 GiB of memory. The table
becomes the section of this kind of CPU, told apart by its instructions for bf16 products; those of others stay.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.cases import gpus, weights
from bench.cases.case import BenchCase, choose
from bench.cases.methods import BY_NAME, QUANTIZABLE
from bench.cases.models import resolve
from bench.cases.quantizations import FORMATS, named
from bench.records.files import make_folder
from bench.records.record import Record
from bench.worlds.plan import parse_methods
from bench.worlds.runner import Progress, run_cells
from qzo.errors import QzoError
from qzo.kernels import instructions

MODELS = ("smollm2-135m", "gpt2", "opt-125m")
STEPS = 3  # one to make the optimizer's state, two that are watched
LIMIT_PERCENT = 0.5
TITLE = """# Predicted against measured on the CPU

Peak allocated bytes. Predicted: the step on tensors without data (`--device sim --gpu cpu`). Measured: the step run on
a CPU (`--device cpu`), by PyTorch's allocation events. `python -m bench.studies.validation_cpu`.
"""

Pair = tuple[Record, Record]  # simulated, measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table; exit code 0 if every peak is within `LIMIT_PERCENT`, 1 if one is not, 2 for a bad option."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.validation_cpu", description=__doc__)
    parser.add_argument("--out", default="reports/studies/validation/validation_cpu.md", help="file for the table")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--methods", help="comma-separated; default all")
    parser.add_argument("--quantizations", help="comma-separated, for qzo (`bench list quantizations`)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args(arguments)
    try:
        methods = parse_methods(options.methods)
        formats = [choose("quantization", name, FORMATS) for name in (options.quantizations or "").split(",") if name]
        make_folder(Path(options.out).parent)
        pairs = []
        for model in options.models.split(","):
            case = BenchCase(
                model, methods[0], batch_size=options.batch_size, seq_len=options.seq_len, steps=STEPS,
                gradient_checkpointing=options.gradient_checkpointing,
            )  # fmt: skip
            if options.methods or not formats:
                pairs += compare(case, methods)
            for name in formats:
                pairs += compare(replace(case, method="qzo", quantization=name), ["qzo"])
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, out = section(pairs), Path(options.out)
    before = out.read_text(encoding="utf-8-sig") if out.exists() else TITLE
    out.write_text(document(before, text), encoding="utf-8")
    print(text)
    return int(any(error is None or abs(error) > LIMIT_PERCENT for error in map(error_percent, pairs)))


def compare(case: BenchCase, methods: Sequence[str]) -> list[Pair]:
    """The records of each method, simulated and measured."""
    found: dict[str, dict[str, Record]] = {"simulated": {}, "measured-cpu": {}}
    progress = Progress(2 * len(methods))

    def done(record: Record) -> None:
        found[record["world"]][record["case"]["method"]] = record
        progress(record)

    with tempfile.TemporaryDirectory(prefix="qzo-bench-") as folder:
        out, unpacked = Path(folder) / "records", Path(folder) / "weights"
        out.mkdir()
        source = resolve(case.model)
        if weights.kind(source) == "gguf":
            weights.unpack(source, unpacked)
        there = str(unpacked) if unpacked.exists() else None
        simulated = [replace(case, method=method, device="sim", gpu=gpus.CPU) for method in methods]
        measured = [replace(case, method=method, device="cpu", weights=there) for method in methods]
        run_cells(simulated + measured, out, done)
    return [(found["simulated"][method], found["measured-cpu"][method]) for method in methods]


def error_percent(pair: Pair) -> float | None:
    """How much more was predicted than measured; None where one of the two failed."""
    predicted, measured = (record["peak"]["allocated"] for record in pair)
    return None if predicted is None or measured is None else 100 * (predicted / measured - 1)


def document(before: str, section: str) -> str:
    """The Markdown file with this section in the place of the one with its heading, or as the last."""
    sections = {part.splitlines()[0]: part.strip() for part in before.split("\n## ")[1:]}
    sections[section.splitlines()[0].removeprefix("## ")] = section.removeprefix("## ").strip()
    return "\n## ".join([TITLE, *(f"{part}\n" for part in sections.values())])


def section(pairs: Sequence[Pair]) -> str:
    """This CPU's table in Markdown, with the case, the versions and the error statistics."""
    case, environment = pairs[0][1]["case"], pairs[0][1]["environment"]
    errors = [error for error in map(error_percent, pairs) if error is not None]
    sizes = [abs(error) for error in errors]
    asked = [record["case"] for _, record in pairs if not BY_NAME[record["case"]["method"]].checkpointed]
    checkpointing = ", gradient checkpointing" if any(case["gradient_checkpointing"] for case in asked) else ""
    notes = sorted({note for pair in pairs for note in pair[1]["notes"] if "instructions" in note})
    lines = [
        f"## A CPU with {instructions.described()}",
        "",
        f"{case['batch_size']} x {case['seq_len']} tokens{checkpointing}, {torch.get_num_threads()} threads; torch "
        f"{environment['torch']} with {torch.backends.cpu.get_cpu_capability()}, transformers "
        f"{environment['transformers']}.",
        *notes,
        "",
        table(pairs),
        "",
    ]
    if errors:
        lines.append(
            f"Error in %: mean {statistics.fmean(sizes):.4f}, median {statistics.median(sizes):.4f}, "
            f"worst {max(sizes):.4f}, mean signed {statistics.fmean(errors):+.4f}; {len(errors)} of {len(pairs)} cells."
        )
    return "\n".join(lines) + "\n"


def table(pairs: Sequence[Pair]) -> str:
    """One row for each cell: exact bytes, and the error in percent or why there is none."""
    rows = []
    for pair in pairs:
        case, error = pair[1]["case"], error_percent(pair)
        peaks = [record["peak"]["allocated"] for record in pair]
        if error is None:
            rows.append([case["model"], titled(case), *peaks, pair[0]["message"] or pair[1]["message"]])
        else:
            rows.append([case["model"], titled(case), *(f"{nbytes:,}" for nbytes in peaks), f"{error:+.4f}"])
    headers = ["model", "method", "predicted, bytes", "measured, bytes", "error, %"]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", "left", *["right"] * 3))


def titled(case: dict[str, Any]) -> str:
    """The method, with the format where it is not that of a default run."""
    name = named(case["quantization"] or {}) if case["method"] in QUANTIZABLE else None
    return str(case["method"]) if name is None else f"{case['method']} ({name})"


if __name__ == "__main__":
    sys.exit(main())
