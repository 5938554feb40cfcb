"""curves.png: the panels of the page, for where a page cannot be shown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from qzo.errors import printable, required
from qzo.report.axis import labels, ticks, whole_ticks
from qzo.report.curves import Curve, Panel

# Okabe and Ito's palette, told apart with every common kind of colour blindness
BLUE, ORANGE, GREEN, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#9aa4af", "#22272e"


def is_drawable() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def curves_png(panels: Sequence[Panel], title: str, passes_a_step: int, passes: str) -> bytes:
    """The picture, two panels a row. Raises QzoError where matplotlib is not installed."""
    figures: Any = required("matplotlib.figure", "matplotlib")
    rows = max(1, -(-len(panels) // 2))
    figure = figures.Figure(figsize=(11, 3.4 * rows + 0.5), dpi=130, layout="constrained")
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel, passes_a_step, passes)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _draw(axis: Any, panel: Panel, passes_a_step: int, passes: str) -> None:
    for level in panel.levels:
        colour = ORANGE if level.kind == "baseline" else GREY
        axis.axhline(level.y, color=colour, lw=1.2, ls=(0, (5, 3)), label=level.name)
    for curve in panel.curves:
        _curve(axis, curve)
    if panel.best is not None:
        ring = {"ms": 11, "mfc": "none", "mec": GREEN, "mew": 1.5, "ls": "none"}
        axis.plot(*([value] for value in panel.best), marker="o", label="best", **ring)
    axis.set_title(_plain(panel.title), loc="left", fontsize=10.5, color=INK)
    low, high = panel.limits
    axis.set_ylim(low, high if high > low else low + 1)
    places = [value for value in ticks(low, high) if low <= value <= high]
    axis.set_yticks(places, labels(places, panel.percent))
    axis.set_xlim(0, panel.end)
    axis.set_xticks(whole_ticks(panel.end), [f"{value:,}" for value in whole_ticks(panel.end)])
    axis.set_xlabel("steps", fontsize=8.5, color=INK)
    upper = axis.secondary_xaxis("top", functions=(lambda x: x * passes_a_step, lambda x: x / passes_a_step))
    passed = whole_ticks(panel.end * passes_a_step)
    upper.set_xticks(passed, [f"{value:,}" for value in passed])
    upper.set_xlabel(passes, fontsize=8.5, color=INK)
    for each in (axis, upper):
        each.tick_params(labelsize=8.5, colors=INK, length=2)
        each.spines[:].set_visible(False)
    axis.grid(axis="y", color="#e3e7eb", lw=0.8)
    axis.set_axisbelow(True)
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="best")


def _curve(axis: Any, curve: Curve) -> None:
    if curve.style == "dots":
        axis.plot(curve.xs, curve.ys, ".", color=BLUE, ms=2.5, alpha=0.45, label=curve.name)
    elif curve.style == "range":
        axis.fill_between(curve.xs, curve.ys, curve.tops, color=BLUE, alpha=0.2, lw=0, label=curve.name)
    elif curve.style == "marks":
        axis.plot(curve.xs, curve.ys, "o-", color=GREEN, ms=4, lw=1.4, label=curve.name)
    else:
        axis.plot(curve.xs, curve.ys, color=BLUE, lw=1.5, label=curve.name)


def _plain(title: str) -> str:
    """A dollar sign would begin a formula."""
    return printable(title).replace("$", r"\$")
