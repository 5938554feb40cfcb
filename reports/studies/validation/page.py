"""`reports/studies/validation/validation.md` and its picture: how far predicted memory is from what was measured.

`python -m reports.studies.validation.page COMPARED.json ...` reads what `bench validate FILE --json COMPARED.json`
wrote. Only errors and a picture are kept: measurements of others stay where they are.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reports.errors import ReportError
from reports.render.png import COLOURS, INK, QUIET
from reports.tables.sizes import GIB
from reports.tables.table import Table

HERE = Path(__file__).parent
REPORT, FIGURE = HERE / "validation.md", HERE.parents[1] / "figures" / "validation.png"
KINDS = {"allocated": COLOURS["weights"], "reserved": COLOURS["optimizer"]}  # what is drawn, and its colour
METRICS = ("allocated", "reserved", "process", "forward", "backward", "step")
HEAD = """# Predicted against measured

Made by `make validation FILES=...` from measurement files, each row predicted without a GPU from its architecture and
settings alone (bench/validation/predict.py, and recipes.py for recipes). Errors are (predicted - measured) / measured.

![Predicted over measured bytes, one point a row](../../figures/validation.png)
"""
Row = dict[str, Any]


def page(compared: Sequence[Row]) -> str:
    """The Markdown of one or more comparisons."""
    tables = [table for part in compared for table in (statistics_table(part), groups_table(part))]
    return "\n\n".join([HEAD.rstrip(), *(table.to_markdown() for table in tables)]) + "\n"


def title_of(part: Row) -> str:
    """The devices that the rows of a comparison were measured on, and the file that they are in."""
    devices = ", ".join(sorted({row["case"].get("gpu") or "CPU" for row in part["rows"]}))
    return f"{devices} ({part['file']})" if "file" in part else devices


def statistics_table(part: Row) -> Table:
    """Error statistics of each metric over all rows, and the verdicts."""
    names = ("mean_abs_percent", "median_abs_percent", "worst_abs_percent", "mean_signed_percent")
    rows = [
        [metric, *(f"{part['statistics'][metric][name]:.2f} %" for name in names)]
        for metric in METRICS
        if metric in part["statistics"]
    ]
    failed = sum(row["status"] != "ok" for row in part["rows"])
    verdicts = part["verdicts"]
    notes = [
        f"{len(part['rows'])} rows, {failed} of them not predicted.",
        "Fits or does not fit, at 8, 12, 16, 24, 32, 40, 48 and 80 GiB: "
        f"{verdicts['wrong']} of {verdicts['asked']} verdicts wrong.",
    ]
    reasons = Counter(row["message"].split("\n")[0] for row in part["rows"] if row["status"] != "ok")
    notes += [f"Not predicted, {count}: {_short(reason)}" for reason, count in reasons.most_common()]
    return Table(f"{title_of(part)}: all rows", ["error", "mean", "median", "worst", "mean, signed"], rows, notes)


def _short(reason: str) -> str:
    first = reason.split(". ")[0]
    return first if len(first) <= 160 else first[:157] + "..."


def groups_table(part: Row) -> Table:
    """Mean and worst error of allocated and reserved for each model, method and attention kernel."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row["case"].get(name)) for name in ("model_id", "method", "attention"))

    rows = []
    predicted = sorted((row for row in part["rows"] if row["status"] == "ok"), key=key)
    for names, group in itertools.groupby(predicted, key):
        errors = [row["error_percent"] for row in group]
        cells = [_mean_and_worst(error[kind] for error in errors if kind in error) for kind in KINDS]
        rows.append([*names, str(len(errors)), *cells])
    headers = ["model", "method", "attention", "rows", *(f"{kind}, mean (worst)" for kind in KINDS)]
    return Table(f"{title_of(part)}: by model and method", headers, rows, text_columns=3)


def picture(compared: Sequence[Row]) -> bytes:
    """Predicted over measured bytes of every row, as PNG; the line is where they are equal."""
    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    for axis, (kind, colour) in zip(figure.subplots(1, len(KINDS)), KINDS.items(), strict=True):
        points = [
            (row["measured"][kind] / GIB, row["predicted"][kind] / GIB)
            for part in compared
            for row in part["rows"]
            if row["status"] == "ok" and kind in row["error_percent"]
        ]
        ends = (0, 1.05 * max((max(point) for point in points), default=1))
        axis.plot(ends, ends, color=QUIET, linewidth=0.8)
        axis.plot(*zip(*points, strict=True) if points else ((), ()), "o", color=colour, markersize=4, alpha=0.7)
        axis.set(xlim=ends, ylim=ends, aspect="equal", xlabel="measured, GiB", ylabel="predicted, GiB")
        axis.set_title(f"{kind}, {len(points)} rows", loc="left", fontsize=11, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def _mean_and_worst(errors: Iterable[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{statistics.fmean(sizes):.2f} % ({max(sizes):.2f} %)" if sizes else "n/a"


def load(path: str) -> Row:
    """One comparison. Raises ReportError: it cannot be read, or is not what `bench validate --json` writes."""
    try:
        part = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error
    if not isinstance(part, dict) or not {"statistics", "verdicts", "rows"} <= set(part):
        raise ReportError(f"{path} is not what `python -m bench validate FILE --json` writes")
    return part


def main(paths: Sequence[str] | None = None) -> int:
    """Write page and picture; exit code 0, or 2 and one line on stderr."""
    paths = sys.argv[1:] if paths is None else paths
    try:
        if not paths:
            raise ReportError("name at least one file that `python -m bench validate FILE --json` wrote")
        compared = [load(path) for path in paths]
        text, image = page(compared), picture(compared)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    REPORT.write_text(text, encoding="utf-8")
    FIGURE.write_bytes(image)
    return 0


if __name__ == "__main__":
    sys.exit(main())
