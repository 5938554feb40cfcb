"""`bench validate`: a file of measurements beside predictions, as tables and as JSON."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from bench.cases.recipes.files import read_recipe
from bench.cases.recipes.peft_config import read_peft_config
from bench.cases.recipes.settings import parse_settings
from bench.validation.asked import Asked
from bench.validation.compare import CARDS_GIB, Row, error_statistics, predict_all, verdicts
from bench.validation.measurement import METRICS, MIB, read_rows
from qzo.output import check_output, write_output

CASE = ("model_id", "method", "attention", "batch_size", "seq_len")


def run(options: argparse.Namespace) -> int:
    """Print the comparison; exit code 1 if a row could not be predicted or a verdict is wrong."""
    path, json_path = options.measurements, options.json
    file = read_recipe(options.recipe) if options.recipe else None
    peft = read_peft_config(options.peft_config) if options.peft_config else None
    asked = Asked(parse_settings(options.settings), peft, file.recipe if file else None)
    if json_path:
        check_output(json_path)  # before the work
    rows = [asked.completed(row) for row in read_rows(path)]
    asked.check(rows)
    results = predict_all(rows, asked)
    report: Row = {
        "file": Path(path).name,
        "notes": [*(file.notes() if file else []), *_otherwise(results)],
        "statistics": error_statistics(results),
        "verdicts": verdicts(results),
        "rows": results,
    }
    print(tables(report))
    if json_path:
        write_output(json_path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    failed = any(result["status"] != "ok" for result in results)
    return int(failed or report["verdicts"]["wrong"] > 0)


def _otherwise(results: Sequence[Row]) -> list[str]:
    """How many rows were predicted otherwise than they state, a line for each change."""
    counts = Counter(result["otherwise"] for result in results if "otherwise" in result)
    return [f"{number} of {len(results)} rows predicted with {change}" for change, number in counts.items()]


def tables(report: Row) -> str:
    """Row by row predicted against measured in MiB, then the statistics."""
    lines = []
    for result in report["rows"]:
        case = [result["case"].get(key) for key in CASE]
        if result["status"] != "ok":
            lines.append([*case, f"not predicted: {result['message']}"])
            continue
        cells = []
        for name in METRICS:
            if name in result["error_percent"]:
                predicted, measured = result["predicted"][name] / MIB, result["measured"][name] / MIB
                cells.append(f"{predicted:,.0f} / {measured:,.0f} ({result['error_percent'][name]:+.2f}%)")
            else:
                cells.append("n/a")
        lines.append([*case, *cells])
    headers = ["model", "method", "attention", "batch", "tokens", *(f"{name}, MiB" for name in METRICS)]
    rows = tabulate(lines, headers, tablefmt="pipe", disable_numparse=True)
    summary = tabulate(
        [[name, *(f"{value:.2f}" for value in values.values())] for name, values in report["statistics"].items()],
        ["error in %", "mean", "median", "worst", "mean, signed"], tablefmt="pipe", disable_numparse=True,
    )  # fmt: skip
    asked, wrong = report["verdicts"]["asked"], report["verdicts"]["wrong"]
    sizes = ", ".join(map(str, CARDS_GIB))
    notes = "".join(f"\n{note}" for note in report["notes"])
    return f"{rows}\n\n{summary}\n\nfits or not, at {sizes} GiB: {wrong} of {asked} verdicts wrong{notes}"
