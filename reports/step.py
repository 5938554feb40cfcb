"""What a QZO step costs on a CPU: `python -m reports.step` writes step.md from step.json, both beside it."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.table import Table

HERE = Path(__file__).parent
FORWARDS, QZO, RELEASED = "two forward passes", "qzo", "mezo-reference"
# of a QZO step to each of these in bf16, at most; and of its peak memory to what it cannot do without
LIMITED, LIMITS = "bfloat16", {FORWARDS: 0.95, RELEASED: 0.25}
MEMORY_LIMIT = 1.10
MEANING = {
    FORWARDS: "two full-logits forward passes of the unquantized model",
    QZO: "QZO step: 4 bits, group size 64, logits only at the labels",
    "mezo": "MeZO step of this package: in place, exact undo, logits only at the labels",
    RELEASED: "MeZO step as released: out of place, noise for every weight, full logits",
}
SLOW = (
    "without them PyTorch's bf16 products are several times slower than fp32 ones; a QZO step rebuilds its weights in "
    "fp32 there and does not pay for that. A CPU that has them is nearer to the fp32 table, where no limit is asked"
)
Seconds = Mapping[str, Sequence[float]]


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    environment = record["environment"]
    commit = f", commit {environment['commit'][:12]}" if environment["commit"] else ""
    instructions = "has" if record["bf16_instructions"] else "lacks"
    parts = [
        f"# {record['model']}: what a QZO step costs on a CPU",
        "\n".join(
            [
                f"- {record['batch_size']} sequences of {record['seq_len']} tokens, {record['threads']} threads; "
                f"this CPU {instructions} instructions for bf16 products",
                f"- torch {environment['torch']}, transformers {environment['transformers']}, Python "
                f"{environment['python']}, {environment['platform']}{commit}; measured-cpu",
                *([] if record["bf16_instructions"] else [f"- {SLOW}"]),
                "- actions take turns; medians over the turns, and medians of the ratios within a turn",
                "- made by `make bench-step`",
            ]
        ),
        *(_times(dtype, taken).to_markdown() for dtype, taken in record["seconds"].items()),
        _memory(record["memory"]).to_markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def ratio(taken: Seconds, reference: str) -> float:
    """Median over the turns of a QZO step's seconds to those of a reference."""
    return statistics.median(a / b for a, b in zip(taken[QZO], taken[reference], strict=True))


def memory_ratio(memory: Mapping[str, int]) -> float:
    """Peak of a QZO step to the sum of what it cannot do without."""
    return memory["peak"] / (memory["floor"] + memory["layer"] + memory["activations"])


def _times(dtype: str, taken: Seconds) -> Table:
    rows = []
    for name, meaning in MEANING.items():
        to = f"{ratio(taken, name):.2f}" if name != QZO else ""
        limit = f"{LIMITS[name]:.2f}" if dtype == LIMITED and name in LIMITS else ""
        rows.append([meaning, f"{statistics.median(taken[name]):.3f}", to, limit])
    return Table(f"Seconds in {dtype}", ["action", "seconds", "QZO step to it", "asked: at most"], rows)


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


def main() -> int:
    """Write the report again."""
    record = json.loads((HERE / "step.json").read_text(encoding="utf-8"))
    (HERE / "step.md").write_text(render(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
