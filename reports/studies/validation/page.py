"""`reports/studies/validation/validation.md` and its picture: how far predicted memory is from what was measured.

`python -m reports.studies.validation.page COMPARED.json ...` reads what `bench validate FILE --json COMPARED.json`
wrote. Only errors and a picture are kept: measurements of others stay where they are.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reports.errors import ReportError
from reports.render.png import INK, QUIET
from reports.tables.sizes import GIB
from reports.tables.table import Table

HERE = Path(__file__).parent
SERIES = ("#1b6ca8", "#d1495b", "#3c8d53", "#e0a030", "#7a4fa3", "#2a9d8f", "#8d6e63", "#c2185b", "#546e7a", "#9e9d24")
REPORT, FIGURE = HERE / "validation.md", HERE.parents[1] / "figures" / "validation.png"
CAUSES = HERE / "causes.md"  # why rows of others are off, and which variant closed a gap; written by hand
KINDS = ("allocated", "reserved", "process")  # what is drawn, and compared group by group
LOWEST_GIB = 0.1  # below it the scatter plot has no room
METRICS = ("allocated", "reserved", "process", "forward", "backward", "step")
LIMITS = {"allocated": "2 / 6 %", "reserved": "4 / 12 %", "process": "5 %"}  # mean / worst that are aimed at
STEPS = "zeroth-order steps"
HEAD = """# Predicted against measured

Made by `make validation FILES=...` from measurement files, each row predicted without a GPU from its architecture and
settings alone (bench/validation/predict.py, and recipes.py for recipes). Errors are (predicted - measured) / measured.

![Predicted over measured bytes, one point a row](../../figures/validation.png)
"""
Row = dict[str, Any]


def page(compared: Sequence[Row]) -> str:
    """The Markdown of one or more comparisons."""
    tables = [table for part in compared for table in (statistics_table(part), groups_table(part))]
    sources = sources_table(compared).to_markdown()
    return (
        "\n\n".join(
            [
                HEAD.rstrip(),
                others_table(compared).to_markdown(),
                *(table.to_markdown() for table in zeroth_order_tables(compared)),
                sources,
                CAUSES.read_text(encoding="utf-8").strip(),
                *(table.to_markdown() for table in tables),
            ]
        )
        + "\n"
    )


def sources_table(compared: Sequence[Row]) -> Table:
    """Rows, and mean, worst and mean signed error of each kind of bytes, by source, card and method."""
    rows = []
    for part in compared:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in part["rows"]:
            case = row["case"]
            groups.setdefault((case.get("gpu") or "CPU", str(case.get("method"))), []).append(row)
        for (gpu, method), group in sorted(groups.items()):
            said = [row["error_percent"] for row in group if row["status"] == "ok"]
            cells = [_mean_worst_signed([error[kind] for error in said if kind in error]) for kind in KINDS]
            unsaid = len(group) - len(said)
            rows.append([_source(part), gpu, method, str(len(group)), str(unsaid) if unsaid else "", *cells])
    headers = ["source", "card", "method", "rows", "not said", *(f"{kind}, mean / worst / signed" for kind in KINDS)]
    total = sum(len(part["rows"]) for part in compared)
    failed = sum(row["status"] != "ok" for part in compared for row in part["rows"])
    notes = [f"{total} rows, {failed} of them not said ({100 * failed / max(total, 1):.1f} %); why stands below."]
    return Table("All sources", headers, rows, notes, text_columns=3)


def others_table(compared: Sequence[Row]) -> Table:
    """Errors over the rows of others that state their whole recipe, and over all of them, beside what is aimed at."""
    others = [(part, row) for part in compared for row in part["rows"] if not row.get("ours")]
    stated = [(part, row) for part, row in others if not row.get("unstated")]
    rows = [["aimed at, mean / worst", "", "", *(LIMITS[kind] for kind in KINDS)]]
    for name, group in (("whole recipe stated", stated), ("all", others)):
        said = [row["error_percent"] for _, row in group if row["status"] == "ok"]
        cells = [_mean_worst_signed([error[kind] for error in said if kind in error]) for kind in KINDS]
        rows.append([name, str(len(group)), str(len(group) - len(said)), *cells])
    missing: dict[tuple[str, str], int] = Counter(
        (_source(part), row["unstated"]) for part, row in others if row.get("unstated")
    )
    notes = [f"{source}, {count} rows, do not state {what}." for (source, what), count in sorted(missing.items())]
    headers = ["rows", "number", "not said", *(f"{kind}, mean / worst / signed" for kind in KINDS)]
    return Table("Rows of others", headers, rows, notes)


def zeroth_order_tables(compared: Sequence[Row]) -> list[Table]:
    """Of each source with zeroth-order steps its process bytes, by what was run: as they are, and beyond what the
    source's own rounding explains.
    """
    tables = []
    for part in compared:
        groups: dict[str, list[Row]] = {"all": []}
        for row in part["rows"]:
            if row["status"] == "ok" and "process" in row["error_percent"]:
                groups.setdefault(_run_of(row["case"]), []).append(row)
                groups["all"].append(row)
        if STEPS not in groups or any(row.get("ours") for row in part["rows"]):
            continue
        rows = []
        for name, group in sorted(groups.items(), key=lambda item: (item[0] == "all", item[0])):
            plain = _mean_worst_signed([row["error_percent"]["process"] for row in group])
            rows.append([name, str(len(group)), plain, _mean_worst_signed([_beyond(row) for row in group])])
        headers = ["what was run", "rows", "process, mean / worst / signed", "beyond the source's rounding"]
        notes = ["Where a source tells no more than whole GiB, what it measured may be half of one more or less."]
        tables.append(Table(f"Rows of {_source(part)}", headers, rows, notes))
    return tables


def _run_of(case: Row) -> str:
    method = str(case.get("method"))
    if not method.startswith("mezo"):
        return "training by Adam" if "Adam" in method else "evaluations without training"
    return STEPS if (case.get("source") or {}).get("repo") else f"{STEPS}, on a card that others may have used"


def _beyond(row: Row) -> float:
    """The error in percent to the nearest number of bytes that the source would have rounded to its own."""
    error = row["predicted"]["process"] - row["measured"]["process"]
    left = max(abs(error) - row.get("rounding", 0), 0)
    return 100 * math.copysign(left, error) / row["measured"]["process"]


def _source(part: Row) -> str:
    return str(part.get("file", "")).removesuffix(".jsonl")


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
    """Predicted over measured bytes of every row, a colour and mark a source; on the line they are equal. A PNG."""
    figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    looks = itertools.product(("o", "^"), SERIES)
    look = dict(zip(map(_source, compared), itertools.cycle(looks), strict=False))
    for axis, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        count = 0
        ends = [LOWEST_GIB, 2 * LOWEST_GIB]
        for part in compared:
            points = [
                (row["measured"][kind] / GIB, row["predicted"][kind] / GIB)
                for row in part["rows"]
                if row["status"] == "ok" and kind in row["error_percent"]
            ]
            count += len(points)
            ends[1] = max([ends[1], *(1.3 * value for point in points for value in point)])
            mark, colour = look[_source(part)]
            options = {"color": colour, "label": _source(part), "markersize": 3.5, "alpha": 0.6}
            axis.plot(*zip(*points, strict=True) if points else ((), ()), mark, markeredgewidth=0, **options)
        axis.plot(ends, ends, color=QUIET, linewidth=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
        axis.set(xlabel="measured, GiB", ylabel="predicted, GiB")
        axis.set_title(f"{kind}, {count} rows", loc="left", fontsize=11, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8, markerscale=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight")
    return buffer.getvalue()


def _mean_worst_signed(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    sizes = [abs(error) for error in errors]
    return f"{statistics.fmean(sizes):.1f} / {max(sizes):.1f} / {statistics.fmean(errors):+.1f} %"


def _mean_and_worst(errors: Iterable[float]) -> str:
    sizes = [abs(error) for error in errors]
    return f"{statistics.fmean(sizes):.2f} % ({max(sizes):.2f} %)" if sizes else "n/a"


def load(path: str) -> Row:
    """One comparison. Raises ReportError: it cannot be read, or is not what `bench validate --json` writes."""
    try:
        part = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}; run `python -m bench validate FILE --json` again") from error
    if not isinstance(part, dict) or not {"statistics", "verdicts", "rows"} <= set(part):
        raise ReportError(f"{path} is not what `python -m bench validate FILE --json` writes; run that")
    return part


def main(paths: Sequence[str] | None = None) -> int:
    """Write page and picture; exit code 0, or 2 and one line on stderr."""
    paths = sys.argv[1:] if paths is None else paths
    try:
        if not paths:
            raise ReportError(
                "nothing to show; name at least one file that `python -m bench validate FILE --json` wrote"
            )
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
