"""What a QZO step costs on a CPU: `python -m reports.studies.step.page` writes step.md from step.json beside it."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.tables.table import Table

HERE = Path(__file__).parent
FORWARDS, BODIES = "two forward passes", "two forward passes without the head"
QZO, PHILOX, OPERATORS, PANELS = "qzo", "qzo along z of Philox", "qzo by operators", "qzo by panels"
RELEASED = "mezo-reference"
# of a QZO step to each of these in bf16, at most; and of its peak memory to what it cannot do without
LIMITED, LIMITS = "bfloat16", {FORWARDS: 0.95, RELEASED: 0.25}
MEMORY_LIMIT = 1.10
SAME, FORMAT_LIMIT = "gptq", 1.10  # what a step takes in each format, to one in GPTQ's, at most
MEANING = {
    FORWARDS: "two full-logits forward passes of the unquantized model",
    BODIES: "the same without the head",
    QZO: "QZO step: 4 bits, group size 64, logits only at the labels",
    PHILOX: 'the same along z of Philox, noise="philox"',
    OPERATORS: "the same by PyTorch's operators, as where installing the package found no compiler",
    PANELS: "the same with products by compiled code, which rebuilds a layer in parts within the cache (AVX512-BF16)",
    "mezo": "MeZO step of this package: in place, exact undo, logits only at the labels",
    RELEASED: "MeZO step as released: out of place, noise for every weight, full logits",
}
SLOW = (
    "without them PyTorch's bf16 products are several times slower than fp32 ones; a QZO step rebuilds its weights in "
    "fp32 there and does not pay for that"
)
Seconds = Mapping[str, Sequence[float]]
Record = Mapping[str, Any]


def render(records: Sequence[Record]) -> str:
    """The report as Markdown, of one record for each kind of CPU."""
    first = records[0]
    head = [
        f"# {first['model']}: what a QZO step costs on a CPU",
        f"- {first['batch_size']} sequences of {first['seq_len']} tokens, {first['threads']} threads; measured-cpu\n"
        "- actions take turns; medians over the turns, and medians of the ratios within a turn\n"
        "- made by `make bench-step`",
    ]
    return "\n\n".join([*head, *(part for record in records for part in _of(record))]) + "\n"


def _of(record: Record) -> list[str]:
    """Heading, setting and tables of one CPU."""
    environment, has, tiles = record["environment"], record["bf16_instructions"], record.get("tiles", False)
    commit = f", commit {environment['commit'][:12]}" if environment["commit"] else ""
    setting = [
        f"- torch {environment['torch']}, transformers {environment['transformers']}, Python {environment['python']}, "
        f"{environment['platform']}{commit}; {len(next(iter(record['seconds'].values()))[QZO])} turns",
        f"- packed layers multiplied by {_multiplied(record)}",
        *([] if has else [f"- {SLOW}"]),
    ]
    tables = [_times(dtype, taken) for dtype, taken in record["seconds"].items()] + [_memory(record["memory"])]
    tables += [_formats(record["formats"])] if record.get("formats") else []
    heading = f"## A CPU {'with' if has else 'without'} instructions for bf16 products{', and tiles (AMX)' * tiles}"
    return [heading, "\n".join(setting), *(f"#{table.to_markdown()}" for table in tables)]


def _multiplied(record: Record) -> str:
    if record.get("compiled_products", record["compiled"]):
        return "compiled code"
    return "PyTorch operators" + ", once compiled code has rebuilt them" * record["compiled"]


def ratio(taken: Seconds, reference: str) -> float:
    """Median over the turns of a QZO step's seconds to those of a reference."""
    return statistics.median(a / b for a, b in zip(taken[QZO], taken[reference], strict=True))


def memory_ratio(memory: Mapping[str, int]) -> float:
    """Peak of a QZO step to the sum of what it cannot do without."""
    return memory["peak"] / (memory["floor"] + memory["layer"] + memory["activations"])


def _times(dtype: str, taken: Seconds) -> Table:
    rows = []
    for name, meaning in MEANING.items():
        if name not in taken:
            continue
        to = f"{ratio(taken, name):.2f}" if name != QZO else ""
        limit = _judged(taken, name) if dtype == LIMITED and name in LIMITS else ""
        rows.append([meaning, f"{statistics.median(taken[name]):.3f}", to, limit])
    return Table(f"Seconds in {dtype}", ["action", "seconds", "QZO step to it", "asked: at most"], rows)


def _judged(taken: Seconds, reference: str) -> str:
    return f"{LIMITS[reference]:.2f}: {'' if ratio(taken, reference) <= LIMITS[reference] else 'not '}reached"


def _memory(memory: Mapping[str, int]) -> Table:
    names = {
        "peak": "peak of a QZO step",
        "floor": "codes, scales, unquantized weights",
        "layer": "the largest layer, rebuilt",
        "activations": "what a forward pass of the unquantized model rises by",
    }
    rows = [[meaning, f"{memory[name]:,}"] for name, meaning in names.items()]
    note = f"the peak is {memory_ratio(memory):.3f} times the sum of the other three (asked: at most {MEMORY_LIMIT})"
    return Table("Memory in bfloat16", ["what", "bytes"], rows, [note])


def to_same(taken: Seconds) -> dict[str, float]:
    """Format -> the median over the turns of a step's seconds to those of one in GPTQ's."""
    pairs = {name: zip(found, taken[SAME], strict=True) for name, found in taken.items()}
    return {name: statistics.median(a / b for a, b in pair) for name, pair in pairs.items()}


def _formats(taken: Seconds) -> Table:
    """Steps of each format beside one of GPTQ's."""
    to = to_same(taken)
    rows = [[name, f"{statistics.median(taken[name]):.3f}", f"{to[name]:.2f}"] for name in taken]
    above = [name for name in taken if to[name] > FORMAT_LIMIT]
    judged = f"not by {', '.join(above)}" if above else "reached by all"
    note = f"asked: at most {FORMAT_LIMIT} of {SAME}'s time; {judged}"
    return Table("A QZO step in bfloat16 in each format", ["format", "seconds", f"to {SAME}"], rows, [note])


def main() -> int:
    """Write the report again."""
    records = json.loads((HERE / "step.json").read_text(encoding="utf-8-sig"))
    (HERE / "step.md").write_text(render(records), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
