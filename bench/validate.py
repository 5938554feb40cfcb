"""`bench validate`: every measurement of a file predicted, and how far off the predictions are."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench import recorded
from bench.measurement import METRICS, MIB, measured_bytes, parse, read_rows
from bench.record import write_json
from qzo.errors import QzoError

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24)  # where a verdict is asked: does the process fit?
WORKERS = 2
CASE = ("model_id", "method", "attention", "batch_size", "seq_len")
Row = dict[str, Any]


def run(path: str, json_path: str | None) -> int:
    """Print the comparison; exit code 1 if a row could not be predicted or a verdict is wrong."""
    rows = read_rows(path)
    results = predict_all(rows)
    report: Row = {"statistics": error_statistics(results), "verdicts": verdicts(results), "rows": results}
    print(tables(report))
    if json_path:
        write_json(Path(json_path), report)
    failed = any(result["status"] != "ok" for result in results)
    return int(failed or report["verdicts"]["wrong"] > 0)


def predict_all(rows: Sequence[Row]) -> list[Row]:
    """The result of each row, in order; simulated in two processes, with a line of progress on stderr."""
    context = multiprocessing.get_context("spawn")
    results = []
    with context.Pool(min(WORKERS, len(rows))) as pool:
        for number, result in enumerate(pool.imap(compare_row, rows), 1):
            print(f"\r[{number}/{len(rows)}] predicted", end="", file=sys.stderr, flush=True)
            results.append(result)
    print(file=sys.stderr)
    return results


def compare_row(row: Row) -> Row:
    """Predicted and measured bytes of one row, and the errors in percent; or the reason why there are none."""
    ours = recorded.is_record(row)
    measured = recorded.figures(row) if ours else measured_bytes(row)
    case = {"model_id": row["case"]["model"], **row["case"]} if ours else dict(row)
    case.pop("measured_mib", None)
    result: Row = {"case": case, "measured": measured}
    try:
        from bench.predict import predict

        predicted = recorded.predict(row) if ours else predict(parse(row))
    except Exception as error:  # also what a library raises: the other rows still count
        reason = str(error) if isinstance(error, QzoError) else f"{type(error).__name__}: {error}".split("\n")[0]
        return result | {"predicted": None, "error_percent": None, "status": "error", "message": reason}
    errors = {name: 100 * (predicted[name] / value - 1) for name, value in measured.items() if name in predicted}
    return result | {"predicted": predicted, "error_percent": errors, "status": "ok", "message": None}


def error_statistics(results: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Metric -> mean, median and worst absolute error and mean signed error, in percent."""
    found: dict[str, dict[str, float]] = {}
    for name in METRICS:
        errors = [result["error_percent"][name] for result in results if name in (result["error_percent"] or {})]
        if errors:
            sizes = [abs(error) for error in errors]
            found[name] = {
                "mean_abs_percent": statistics.fmean(sizes),
                "median_abs_percent": statistics.median(sizes),
                "worst_abs_percent": max(sizes),
                "mean_signed_percent": statistics.fmean(errors),
            }
    return found


def verdicts(results: Iterable[Row]) -> dict[str, int]:
    """How many fits/does-not-fit answers were asked for and how many are wrong; without a prediction all are."""
    asked = wrong = 0
    for result in results:
        measured, predicted = result["measured"].get("process"), result["predicted"]
        if measured is None or (predicted is not None and "process" not in predicted):
            continue  # one of the two worlds has no process bytes
        for card in CARDS_GIB:
            asked += 1
            wrong += predicted is None or (predicted["process"] <= card * GIB) != (measured <= card * GIB)
    return {"asked": asked, "wrong": wrong}


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
    return f"{rows}\n\n{summary}\n\nfits or not, at {sizes} GiB: {wrong} of {asked} verdicts wrong"
