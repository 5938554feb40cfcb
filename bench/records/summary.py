"""The summary of a folder of records: their order, and how many times smaller each method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cases.methods import BASELINES, METHODS
from bench.records.record import Record

SAME_CASE = ("model", "batch_size", "seq_len", "gpu")  # what two methods must share for their ratio to mean anything


def in_order(records: Mapping[str, Record]) -> dict[str, Record]:
    """The records in the order of `METHODS`, others after them by name."""
    rank = {method: index for index, method in enumerate(METHODS)}
    return dict(sorted(records.items(), key=lambda item: (rank.get(item[0], len(rank)), item[0])))


def summarise(records: Mapping[str, Record]) -> dict[str, Any]:
    """The content of `summary.json`: the records, and how many times smaller each method is than full fine-tuning.

    `reductions[baseline][method][kind]` is peak(baseline) / peak(method) for kind allocated and process. It is None
    where either is unknown, where they come from different worlds, and where `SAME_CASE` differs.
    """
    records = in_order(records)
    return {
        "records": list(records.values()),
        "reductions": {
            baseline: {
                method: {kind: _ratio(records.get(baseline), record, kind) for kind in ("allocated", "process")}
                for method, record in records.items()
            }
            for baseline in BASELINES
        },
    }


def _ratio(baseline: Record | None, record: Record, kind: str) -> float | None:
    if baseline is None or baseline["world"] != record["world"]:
        return None
    if any(baseline["case"][key] != record["case"][key] for key in SAME_CASE):
        return None
    above, below = baseline["peak"][kind], record["peak"][kind]
    return above / below if above is not None and below else None
