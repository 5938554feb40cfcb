"""What a GPU says: `python -m reports.studies.gpu.page` writes gpu.md from what `make gpu` left behind.

Of one card: `NAME.jsonl` (records, each with what was predicted before), `NAME.facts.json`, `NAME.seconds.json`,
`NAME.kernels.json`, `NAME.recipes.jsonl`, and `NAME.left-out.json` (records that count for nothing, each with the
reason). What is calculated is in `roofline.json` beside this file, made by `python -m bench.studies.roofline`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.errors import ReportError
from reports.studies.gpu.seconds import launches, products, steps
from reports.tables.sizes import GIB
from reports.tables.table import Table

HERE = Path(__file__).parent
MEASUREMENTS = HERE.parents[1] / "measurements"
METRICS = ("allocated", "reserved", "process")
MIB = 1 << 20
FORWARDS = "two bf16 forward passes"
# Bytes and dense bf16 operations (sums in fp32) a second, of the data sheets.
CARDS = {"RTX 4090": (1.008e12, 165.2e12), "A100 80GB": (2.039e12, 312e12)}
Row = Mapping[str, Any]
HEAD = """# Measured on a GPU

`make gpu` on a machine with the card, then `make gpu-report`. Every number here is measured-cuda but those that are
called predicted, which were simulated without a GPU and committed before the first measurement, and those of the last
table, which are calculated. Models have random weights and random tokens: memory and seconds do not depend on them.
"""


def page(
    name: str, records: Sequence[Row], facts: Row, seconds: Row, left_out: Sequence[Row], measured: Sequence[Row],
    multiplied: Row, counted: Row,
) -> str:  # fmt: skip
    """The Markdown of one card's measurements; `measured` are recipes, `multiplied` products with packed weights,
    `counted` launches and bytes of a step.
    """
    tables = [card(name, facts, records), errors(records), cells(records, left_out), steps(seconds)]
    tables += [launches(seconds), products(multiplied)]
    if measured:
        tables.append(recipes(measured))
    tables.append(calculated(counted, facts))
    return "\n\n".join([HEAD.rstrip(), *(table.to_markdown() for table in tables)]) + "\n"


def card(name: str, facts: Row, records: Sequence[Row]) -> Table:
    """What the card is, and what a process takes outside PyTorch's allocator."""
    environment = facts["environment"]
    contexts: dict[int, set[str]] = {}
    for record in records:
        peak = record["peak"]
        contexts.setdefault((peak["process"] - peak["reserved"]) // MIB, set()).add(record["case"]["method"])
    rows = [
        ["card", f"{facts['name']}, {facts['memory_bytes'] / GIB:.1f} GiB, {facts['multiprocessors']} multiprocessors"],
        ["software", f"driver {environment['driver']}, CUDA {facts['cuda']}, PyTorch {environment['torch']}, "
                     f"transformers {environment['transformers']}"],
        ["bandwidth of a copy, read and written", f"{facts['copy_bytes_a_second'] / 1e12:.2f} TB/s"],
        ["bf16 product of 8192 x 8192 x 8192", f"{facts['bf16_operations_a_second'] / 1e12:.0f} TFLOP/s"],
        ["a launch from Python, one after the other", f"{facts['seconds_a_launch'] * 1e6:.1f} µs"],
        ["context before the first kernel", f"{facts['context_bytes'] / MIB:.0f} MiB"],
        *([f"context after steps of {', '.join(sorted(methods))}", f"{mib} MiB"]
          for mib, methods in sorted(contexts.items())),
    ]  # fmt: skip
    return Table(name, ["", "measured"], rows, text_columns=2)


def errors(records: Sequence[Row]) -> Table:
    """How far the predictions were that nobody could adapt to what was measured, session by session."""
    sessions: dict[str, list[Row]] = {}
    for record in records:
        sessions.setdefault(record["environment"]["commit"], []).append(record)
    rows = []
    for number, session in enumerate(sessions.values(), 1):
        for metric in METRICS:
            found = [error(record, metric) for record in session]
            sizes = [abs(value) for value in found]
            exact = sum(_close(record, metric) for record in session)
            rows.append(
                [str(number), metric, *(f"{value:.3f} %" for value in (statistics.fmean(sizes),
                 statistics.median(sizes), max(sizes), statistics.fmean(found))), f"{exact} of {len(session)}"]
            )  # fmt: skip
    notes = [
        "Errors are (predicted - measured) / measured.",
        "Session 1 predicted all process bytes too low: nobody had measured the CUDA context of this card, and the "
        "estimate took the kernels of a T4 for those of every card. Session 2 has cells that were not measured in "
        "session 1, predicted anew with that context; session 3 two that kernels in Triton computed, with z of Philox, "
        "where what no tensor takes (the rest of blocks that are not divided) lay otherwise than predicted.",
        "What is predicted today, of all of them: [validation.md](../validation/validation.md).",
    ]
    headers = ["session", "predicted before", "mean", "median", "worst", "mean, signed", "within 64 KiB"]
    return Table("Memory, predicted and then measured", headers, rows, notes, text_columns=2)


def cells(records: Sequence[Row], left_out: Sequence[Row]) -> Table:
    """Every cell."""
    rows = []
    for record in records:
        case = record["case"]
        size = f"{case['batch_size']} x {case['seq_len']}" + (", checkpointing" * case["gradient_checkpointing"])
        peaks = [f"{record['peak'][metric] / MIB:,.0f}" for metric in METRICS]
        far = [f"{error(record, metric):+.2f} %" for metric in METRICS]
        method = case["method"] + (" by kernels" if record["environment"].get("kernels") else "")
        rows.append([case["model"], method, _format(case), size, *peaks, *far])
    notes = [
        "In most cells of session 1 16 KiB more were allocated than predicted: the tokens of the two steps to come, "
        "which were on the GPU already (they no longer are).",
        *(f"Left out: {_name(item['record']['case'])}: {item['why']}." for item in left_out),
    ]  # fmt: skip
    headers = ["model", "method", "format", "tokens", *(f"{metric}, MiB" for metric in METRICS), *METRICS]
    return Table("Cells: measured peaks, and how far the prediction was", headers, rows, notes, text_columns=4)


def recipes(measured: Sequence[Row]) -> Table:
    """Published recipes as the Trainer of transformers runs them: peaks of loading and of the steps."""
    rows = []
    for row in measured:
        recipe, peaks = row["recipe"], row["measured_mib"]
        tokens = f"{recipe['batch_size']} x {max(recipe['lengths'])}"
        loading = [row["loading"][f"peak_{metric}"] / MIB for metric in METRICS[:2]]
        figures = [*loading, peaks["peak_allocated"], peaks["peak_reserved"], peaks["process"]]
        rows.append([row["model_id"], recipe["name"], tokens, *(f"{mib:,.0f}" for mib in figures)])
    libraries = ", ".join(f"{name} {version}" for name, version in measured[0]["versions"].items() if name != "driver")
    notes = [
        f"Nothing of ours takes part: `from_pretrained`, PEFT and `Trainer`, {libraries}. Each recipe is in its "
        "libraries' own words in the file of measurements, and is predicted in "
        "[validation.md](../validation/validation.md).",
        "Loading: until the Trainer is made; a model whose weights are all trained is moved to the GPU by the Trainer.",
    ]
    headers = [
        "model", "recipe", "tokens", "loading: allocated, MiB", "reserved, MiB", "steps: allocated, MiB",
        "reserved, MiB", "process, MiB",
    ]  # fmt: skip
    return Table("Recipes as others publish them", headers, rows, notes, text_columns=3)


def calculated(counted: Row, facts: Row) -> Table:
    """What a step launches and moves, counted without a GPU, and the least seconds that cards take for it."""
    cards = {**CARDS, facts["name"]: (facts["copy_bytes_a_second"], facts["bf16_operations_a_second"])}
    plain = {_place(row): row for row in counted["rows"] if row["way"] == FORWARDS}
    rows = []
    for row in counted["rows"]:
        figures = [f"{row['launches']:,}", f"{row['forward_launches']:,}", f"{row['bytes'] / 1e9:.1f}"]
        figures.append(f"{row['bytes'] / plain[_place(row)]['bytes']:.2f}")
        figures += [f"{max(row['bytes'] / speed, row['operations'] / rate):.3f}" for speed, rate in cards.values()]
        rows.append([row["model"], f"{row['batch_size']} x {row['seq_len']}", row["way"], *figures])
    notes = [
        "Calculated, not measured: operators counted on tensors without data, each reading its inputs and writing its "
        "outputs once (`python -m bench.studies.roofline`). Seconds: of the memory or of products, whichever takes "
        "longer, on the H100 at its measured bandwidth and rate, on others as their data sheets have them.",
        "QZO by PyTorch's operators; by weights that a kernel in Triton rebuilds, for cuBLAS to multiply with; and by "
        "kernels that multiply with the codes, which is for few tokens. By kernels z is of Philox, and what is not of "
        "the forward passes is two launches to perturb all scales, one to update them, and the reading of two losses.",
    ]
    headers = [
        "model", "tokens", "way", "launches", "of the forwards", "GB", "of two forwards",
        *(f"{card}, s" for card in cards),
    ]  # fmt: skip
    return Table("Calculated: launches and bytes of a step", headers, rows, notes, text_columns=3)


def _place(row: Row) -> tuple[Any, ...]:
    return row["model"], row["batch_size"], row["seq_len"]


def error(record: Row, metric: str) -> float:
    """Percent."""
    return 100 * (record["predicted"][metric] / record["peak"][metric] - 1)


def _close(record: Row, metric: str) -> bool:
    return abs(record["predicted"][metric] - record["peak"][metric]) <= 64 << 10


def _name(case: Row) -> str:
    return " ".join(filter(None, [case["model"], case["method"], _format(case)]))


def _format(case: Row) -> str:
    quantization = case["quantization"]
    return "" if quantization is None else f"{quantization['format']}, {quantization['bits']} bits"


def load(path: Path) -> Any:
    """The content of a JSON file. Raises ReportError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as problem:
        raise ReportError(f"cannot read {path}: {problem}; run `make gpu` again") from problem


def render(folder: Path = MEASUREMENTS) -> str:
    """The page of the first card whose measurements are in the folder. Raises ReportError."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ReportError(f"{folder} has no measurements; run `make gpu` on a machine with a GPU")
    name = files[0].stem
    records = lines_of(files[0])
    facts, seconds, multiplied = (load(folder / f"{name}.{part}.json") for part in ("facts", "seconds", "kernels"))
    left_out, measured = folder / f"{name}.left-out.json", folder / f"{name}.recipes.jsonl"
    return page(
        name, records, facts, seconds, load(left_out) if left_out.exists() else [],
        lines_of(measured) if measured.exists() else [], multiplied, load(HERE / "roofline.json"),
    )  # fmt: skip


def lines_of(path: Path) -> list[Any]:
    """The JSON objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]


def main() -> int:
    """Write the page; exit code 0, or 2 and one line on stderr."""
    try:
        text = render()
    except ReportError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    (HERE / "gpu.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
