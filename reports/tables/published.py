"""The paper's printed memory beside ours; `paper.json` holds what it printed, nothing is fitted to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reports.records import PAPER_BASELINE, Record, find, method_of, ratio, world_of
from reports.tables.reduction import times
from reports.tables.sizes import GIGA, NOT_KNOWN
from reports.tables.table import Table

PAPER = Path(__file__).with_name("paper.json")
KINDS = ("allocated", "reserved", "process")


def published_table(records: Sequence[Record]) -> Table | None:
    """One row for each printed number whose method was run; None where the paper does not have the model.

    Sizes in GB of 1e9 bytes; the difference is ours minus the paper's in percent of the paper's.
    """
    paper = json.loads(PAPER.read_text(encoding="utf-8-sig"))
    models = {record["case"]["model"] for record in records}
    if len(models) != 1 or (printed := paper["models"].get(models.pop())) is None:
        return None
    rows, ours = [], []
    for entry in printed["rows"]:
        record = find(records, entry["method"])
        if record is not None:
            cells = [_beside(record["peak"][kind], entry["gb"]) for kind in KINDS]
            rows.append([entry["method"], entry["column"], entry["where"], f"{entry['gb']}", *cells])
            ours.append(record)
    if not rows:
        return None
    headers = ["method", "the paper's column", "where printed", "paper", *(f"our {kind}" for kind in KINDS)]
    shown = {method_of(record) for record in ours}
    caveats = [caveat["text"] for caveat in paper["caveats"] if shown & set(caveat["methods"])]
    notes = [f"{paper['source']}; {paper['protocol']}.", *caveats, *_protocols(ours)]
    if printed["adamw_over_qzo"] is not None:
        notes.append(_ratios(records, printed["adamw_over_qzo"]))
    return Table("Beside the paper, GB of 1e9 bytes", headers, rows, notes, text_columns=3)


def _beside(nbytes: int | None, paper_gb: float) -> str:
    if nbytes is None:
        return NOT_KNOWN
    return f"{GIGA.show(nbytes)} ({nbytes / GIGA.nbytes / paper_gb - 1:+.1%})"


def _protocols(records: Sequence[Record]) -> list[str]:
    """What was run here, one line for each kind of case."""
    cases: dict[str, list[str]] = {}
    for record in records:
        case: dict[str, Any] = record["case"]
        checkpointing = "with" if case["gradient_checkpointing"] else "without"
        line = (
            f"batch {case['batch_size']}, {case['seq_len']} tokens, {case['attention'] or 'unknown'} attention, "
            f"{checkpointing} gradient checkpointing, {world_of(record)}"
        )
        cases.setdefault(line, []).append(method_of(record))
    return [f"Ours ({', '.join(methods)}): {line}." for line, methods in cases.items()]


def _ratios(records: Sequence[Record], printed: float) -> str:
    record = find(records, "qzo")
    ours = None if record is None else ratio(find(records, PAPER_BASELINE), record, "allocated")
    return f"AdamW over QZO: the paper {printed}x, our {PAPER_BASELINE} over qzo by allocated bytes {times(ours)}."
