"""Every measurement of a file predicted, and how far off the predictions are."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from bench.validation import recorded
from bench.validation.asked import AS_STATED, Asked
from bench.validation.measurement import METRICS, measured_bytes, parse
from bench.validation.published.readers import is_published, rounding_bytes, unstated
from bench.worlds.workers import workers
from qzo.errors import QzoError

GIB = 1 << 30
CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80)  # where a verdict is asked: does the process fit?
Row = dict[str, Any]


def predict_all(rows: Sequence[Row], asked: Asked = AS_STATED) -> list[Row]:
    """The result of each row, in order; simulated in several processes, with a line of progress on stderr."""
    results = []
    with workers(len(rows)) as in_order:
        for number, result in enumerate(in_order(partial(compare_row, asked=asked), rows), 1):
            print(f"\r[{number}/{len(rows)}] predicted", end="", file=sys.stderr, flush=True)
            results.append(result)
    print(file=sys.stderr)
    return results


def compare_row(row: Row, asked: Asked = AS_STATED) -> Row:
    """Predicted and measured bytes of one row, and the errors in percent; or the reason why there are none.

    `ours` is there for rows that were measured for this package, `unstated` where one of others does not state all of
    its recipe.
    `rounding` is there where the source's numbers are rounded by so many bytes that it matters.
    `otherwise` is there where options changed what the row states.
    """
    ours = recorded.is_record(row)
    measured = recorded.figures(row) if ours else measured_bytes(row)
    result: Row = {"case": _case(row), "measured": measured}
    result |= {"ours": True} if ours or "recipe" in row else {}
    missing = unstated(row)
    result |= {"unstated": missing} if missing else {}
    rounding = rounding_bytes(row)
    result |= {"rounding": rounding} if rounding else {}
    otherwise = asked.told(row)
    result |= {"otherwise": otherwise} if otherwise else {}
    try:
        predicted = _predicted(row, asked)
    except Exception as error:  # also what a library raises: the other rows still count
        reason = str(error) if isinstance(error, QzoError) else f"{type(error).__name__}: {error}".split("\n")[0]
        return result | {"predicted": None, "error_percent": None, "status": "error", "message": reason}
    errors = {name: 100 * (predicted[name] / value - 1) for name, value in measured.items() if name in predicted}
    return result | {"predicted": predicted, "error_percent": errors, "status": "ok", "message": None}


def _case(row: Row) -> Row:
    if recorded.is_record(row):
        return {"model_id": row["case"]["model"], **row["case"]}
    if "recipe" in row:
        from bench.validation.recipes import described

        return described(row)
    return {name: value for name, value in row.items() if name != "measured_mib"}


def _predicted(row: Row, asked: Asked) -> dict[str, int]:
    if recorded.is_record(row):
        return recorded.predict(row, asked.changed)
    if "recipe" in row:
        from bench.validation.recipes import predict_row

        return predict_row(row, asked)
    if is_published(row):
        from bench.validation.recipes import predict_published

        return predict_published(row, asked)
    from bench.validation.predict import predict

    return predict(parse(row))


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
