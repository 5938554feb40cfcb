"""How many times smaller each method is than full fine-tuning, in the three conventions that people quote."""

from __future__ import annotations

from collections.abc import Sequence

from reports.records import BASELINES, CPU, RSS_NOTE, Record, find, label_of, ratio
from reports.tables.sizes import NOT_KNOWN
from reports.tables.table import Table

KINDS = ("allocated", "process")
CONVENTIONS = (
    "ft-bf16: bf16 weights, gradients and AdamW moments, 8 bytes a parameter. ft-mixed: bf16 weights and gradients, "
    "fp32 moments, 12 bytes. ft-amp: fp32 weights, gradients and moments under bf16 autocast, 16 bytes. Activations "
    "and temporaries come on top."
)


def reduction_table(records: Sequence[Record]) -> Table:
    """One row a method: the baseline's peak over the method's, for each baseline, by allocated and by process bytes."""
    rows = []
    for record in records:
        ratios = [ratio(find(records, baseline), record, kind) for kind in KINDS for baseline in BASELINES]
        rows.append([label_of(record), *map(times, ratios)])
    cases = dict.fromkeys((record["case"]["batch_size"], record["case"]["seq_len"]) for record in records)
    shapes = "; ".join(f"batch {batch_size}, {seq_len} tokens a sequence" for batch_size, seq_len in cases)
    notes = [CONVENTIONS, f"At {shapes}."]
    if any(record["world"] == CPU for record in records):
        notes.append(RSS_NOTE)
    if any(NOT_KNOWN in row for row in rows):
        notes.append(
            f"{NOT_KNOWN}: the method or the baseline failed, is missing or unknown, or the two come from different "
            "worlds or cases."
        )
    headers = ["method", *(f"{kind}, vs {baseline}" for kind in KINDS for baseline in BASELINES)]
    return Table("Times smaller than full fine-tuning with AdamW", headers, rows, notes)


def times(value: float | None) -> str:
    """ "19.80x", or "n/a"."""
    return NOT_KNOWN if value is None else f"{value:.2f}x"
