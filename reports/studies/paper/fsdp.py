"""The paper's AdamW column, measured under FSDP, beside every simulated way of sharding."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from reports.records import PAPER_BASELINE
from reports.tables.sizes import GIBI
from reports.tables.table import Table

Setting = tuple[str, str, int]  # precision, mode, GPUs
WORDS = {
    "bf16": "bf16 weights, gradients and moments, 8 bytes a parameter, fused AdamW",
    "bf16-foreach": "the same with torch's default AdamW, which makes another moment's worth of temporaries",
    "mixed": "fp32 moments, 12 bytes",
    "amp": "fp32 shards, gradients and moments, gathered in bf16, 16 bytes, fused AdamW",
    "amp-foreach": "the same with torch's default AdamW",
}


def fsdp_tables(paper: dict[str, Any], simulated: dict[str, Any]) -> list[Table]:
    """The grid, and what comes nearest."""
    printed = printed_adamw(paper)
    grid = simulated["fsdp"]
    return [_grid_table(grid, printed), nearest_table(grid, printed)]


def printed_adamw(paper: dict[str, Any]) -> dict[str, float]:
    """Model -> the AdamW figure that was printed."""
    return {
        model: entry["gb"]
        for model, content in paper["models"].items()
        for entry in content["rows"]
        if entry["method"] == PAPER_BASELINE
    }


def errors(grid: Sequence[dict[str, Any]], printed: dict[str, float]) -> dict[Setting, dict[str, float]]:
    """Setting -> model -> (process bytes of all ranks in GiB - printed) / printed."""
    found: dict[Setting, dict[str, float]] = {}
    for entry in grid:
        setting = _setting(entry)
        total = entry["gpus"] * entry["rank"]["process"] / GIBI.nbytes
        found.setdefault(setting, {})[entry["model"]] = total / printed[entry["model"]] - 1
    return found


def _grid_table(grid: Sequence[dict[str, Any]], printed: dict[str, float]) -> Table:
    off = errors(grid, printed)
    totals = {(*_setting(entry), entry["model"]): entry for entry in grid}
    rows = []
    for setting, by_model in off.items():
        cells = []
        for model in printed:
            entry = totals[(*setting, model)]
            cells.append(f"{GIBI.show(entry['gpus'] * entry['rank']['process'])} ({by_model[model]:+.1%})")
        precision, mode, gpus = setting
        rows.append([precision, mode if gpus > 1 else "not sharded", str(gpus), *cells])
    headers = ["precision", "mode", "GPUs", *(f"{model}, printed {figure}" for model, figure in printed.items())]
    notes = [f"{name}: {words}." for name, words in WORDS.items()]
    notes.append(
        "Process bytes of one simulated rank times the number of GPUs, GiB. A rank's batch is one example. Decoder "
        "layers are the wrapped units, the next layer is gathered ahead in backward, a freed gather stays in use until "
        "the limiter of two lets it go; NCCL's buffers and the separate pools of its streams are not counted."
    )
    return Table("AdamW under FSDP: the sum over all GPUs", headers, rows, notes, text_columns=2)


def nearest_table(grid: Sequence[dict[str, Any]], printed: dict[str, float]) -> Table:
    """The settings that come nearest to all printed figures at once, and to each."""
    off = errors(grid, printed)
    mean = {setting: statistics.mean(map(abs, by_model.values())) for setting, by_model in off.items()}
    ranked = sorted(off, key=lambda setting: mean[setting])
    compared = [("all, nearest first", setting) for setting in ranked[:3]]
    compared += [(f"{model} alone", min(off, key=lambda setting: abs(off[setting][model]))) for model in printed]
    rows = [
        [words, *map(str, setting), *(f"{off[setting][model]:+.1%}" for model in printed), f"{mean[setting]:.1%}"]
        for words, setting in compared
    ]
    sixteen = [entry for entry in grid if entry["bytes_per_parameter"] == 16]
    least = min(sixteen, key=lambda entry: off[_setting(entry)][entry["model"]])
    notes = [
        "A finding, and weak evidence: the paper says neither how many GPUs nor which precision or sharding mode, and "
        f"of {len(off)} settings for {len(printed)} figures one was bound to come near.",
        "Every setting with 16 bytes a parameter lies above what was printed, the nearest at "
        f"{off[_setting(least)][least['model']]:+.1%} ({least['model']}).",
    ]
    headers = ["compared with", "precision", "mode", "GPUs", *printed, "mean error"]
    return Table("Which sharding comes nearest to the AdamW column", headers, rows, notes, text_columns=3)


def _setting(entry: dict[str, Any]) -> Setting:
    return entry["precision"], entry["mode"], entry["gpus"]
