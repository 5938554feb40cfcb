"""memory.png: one bar a method, stacked by role, so that one sees which part of the memory a method does away with."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reports.records import CPU, ROLES, Record, is_ok, label_of, method_of
from reports.tables.sizes import GIB, Unit, unit_for

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
COLOURS = {
    "weights": "#0072b2",
    "quantization": "#56b4e9",
    "gradients": "#e69f00",
    "optimizer": "#d55e00",
    "activations": "#009e73",
    "noise": "#f0e442",
    "temporaries": "#cc79a7",
    "unattributed": "#7f7f7f",
    "allocator slack": "#b4bcc6",
    "CUDA context": "#dfe3e8",
}
CARDS_GIB = (24, 80)  # the consumer and the data-centre card that people ask about
ZOOM = 8  # the second panel holds the methods of up to this many times the smallest
INK = "#22272e"
QUIET = "#5a6572"
SUBTITLE: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": QUIET, "pad": 16}
LABEL: dict[str, Any] = {
    "va": "center", "fontsize": 9, "color": INK, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1},
}  # fmt: skip
ROW_INCHES = 0.34


def to_png(records: Sequence[Record], title: str, setting: str) -> bytes:
    """The figure as PNG; a second panel enlarges the small methods where the large ones would hide their parts."""
    unit = unit_for(records)
    totals = {method_of(record): sum(segments(record).values()) for record in records if is_ok(record)}
    small = [r for r in records if totals.get(method_of(r), float("inf")) <= ZOOM * min(totals.values(), default=0)]
    panels = [list(records), small] if 1 < len(small) < len(totals) else [list(records)]

    heights = [len(panel) + 1.2 for panel in panels]
    figure = Figure(figsize=(11, ROW_INCHES * sum(heights) + 1.7), dpi=150, layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, unit)
    axes[0].set_title(f"{unit.name} at the peak, {setting}", **SUBTITLE)
    if len(panels) > 1:
        axes[1].set_title("the small methods, enlarged", **SUBTITLE)
    figure.suptitle(title, x=0.008, ha="left", fontsize=13, fontweight="bold", color=INK)
    used = [name for name in COLOURS if any(name in segments(record) for record in records if is_ok(record))]
    if used:
        handles = [Patch(facecolor=COLOURS[name], label=name) for name in used]
        figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=9)

    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def segments(record: Record) -> dict[str, int]:
    """Bytes of the roles, then reserved over allocated and process over reserved where those are known."""
    peak = record["peak"]
    parts = {role: record["at_peak"][role] for role in ROLES}
    if peak["reserved"] is not None:
        parts["allocator slack"] = peak["reserved"] - peak["allocated"]
        if peak["process"] is not None:
            parts["CUDA context"] = peak["process"] - peak["reserved"]
    return {name: nbytes for name, nbytes in parts.items() if nbytes > 0}


def _draw(axis: Axes, records: Sequence[Record], unit: Unit) -> None:
    """One panel; the first record is the topmost bar."""
    longest = max([sum(segments(record).values()) for record in records if is_ok(record)], default=0) / unit.nbytes or 1
    right = 1.36 * longest
    for row, record in enumerate(records):
        end = 0.0
        for name, nbytes in segments(record).items() if is_ok(record) else ():
            axis.barh(row, nbytes / unit.nbytes, left=end, height=0.72, color=COLOURS[name])
            end += nbytes / unit.nbytes
        style = "normal" if is_ok(record) else "italic"
        axis.text(end + 0.006 * right, row, _label(record, unit), style=style, **LABEL)
    for card in (card * GIB / unit.nbytes for card in CARDS_GIB):
        if card < right:
            axis.axvline(card, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=0)
            axis.text(card, -0.66, f"{card * unit.nbytes / GIB:.0f} GiB card", ha="center", fontsize=8, color=QUIET)
    axis.set_xlim(0, right)
    axis.set_ylim(len(records) - 0.4, -0.6)
    axis.set_yticks(range(len(records)), [label_of(record) for record in records])
    axis.xaxis.set_major_formatter("{x:,g}")
    axis.tick_params(length=0, colors=INK, labelsize=10)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color("#d5d9de")


def _label(record: Record, unit: Unit) -> str:
    """What stands at the end of a bar: the totals, or why there is no bar."""
    if not is_ok(record):
        return textwrap.shorten(f"{record['status']}: {record['message']}", 100)
    allocated, process = record["peak"]["allocated"], record["peak"]["process"]
    label = f"{unit.show(allocated)} {unit.name} allocated"
    if process is None:
        return label
    return f"{label}, {unit.show(process)} {'peak RSS' if record['world'] == CPU else 'process'}"
