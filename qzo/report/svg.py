"""A panel as SVG that stands in the page: colours are those of the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence

from qzo.report.axis import labels, ticks, whole_ticks
from qzo.report.curves import Curve, Panel
from qzo.report.html import Html, element, join, legend

WIDTH, HEIGHT = 440, 232
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 24, 22
BASE = HEIGHT - BOTTOM
STEPS, PASSES = HEIGHT - 5, 11  # lines of the two axes' numbers


class _Frame:
    """From numbers to places; what lies outside the limits is put on the border."""

    def __init__(self, panel: Panel) -> None:
        self.low, self.high = panel.limits
        self.end = panel.end

    def x(self, value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * value / self.end:.1f}"

    def y(self, value: float) -> str:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return f"{BASE - (BASE - TOP) * min(1.0, max(0.0, share)):.1f}"

    def point(self, x: float, y: float) -> str:
        return f"{self.x(x)},{self.y(y)}"


def drawing(panel: Panel, passes_a_step: int) -> Html:
    """The panel, steps below and forward passes above it."""
    frame = _Frame(panel)
    return element(
        "svg",
        element("title", f"{panel.title}: {panel.text}"),
        *_grid(panel, frame),
        *_steps_axis(panel, frame, passes_a_step),
        *(_level(level.name, level.y, level.kind, frame) for level in panel.levels),
        *(_drawn(curve, frame) for curve in panel.curves),
        None if panel.best is None else element(
            "circle", element("title", "best"), cx=frame.x(panel.best[0]), cy=frame.y(panel.best[1]), r=7, klass="best"
        ),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{panel.title}: {panel.text}",
    )  # fmt: skip


def keys(panel: Panel) -> Html:
    """What is what, under a drawing."""
    found = [(curve.name, curve.style if curve.style != "range" else "area") for curve in panel.curves]
    found += list(dict.fromkeys((level.name, level.kind) for level in panel.levels))
    return legend([*found, *([] if panel.best is None else [("best", "ring")])])


def _grid(panel: Panel, frame: _Frame) -> list[Html]:
    values = [value for value in ticks(*panel.limits) if panel.limits[0] <= value <= panel.limits[1]]
    made = []
    for value, label in zip(values, labels(values, panel.percent), strict=True):
        y = frame.y(value)
        kind = "zero" if value == 0 and panel.limits[0] < 0 else "grid"
        made.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, klass=kind))
        made.append(element("text", label, x=LEFT - 6, y=float(y) + 4, text_anchor="end"))
    return made


def _steps_axis(panel: Panel, frame: _Frame, passes_a_step: int) -> list[Html]:
    made = [element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=BASE, y2=BASE, klass="axis")]
    for value in whole_ticks(panel.end):
        made.append(_label(f"{value:,}", frame.x(value), STEPS, value, panel.end))
    for value in whole_ticks(panel.end * passes_a_step, 4):
        made.append(_label(f"{value:,}", frame.x(value / passes_a_step), PASSES, value / passes_a_step, panel.end))
    for name, y in (("steps", STEPS), ("passes", PASSES)):
        made.append(element("text", name, x=LEFT - 8, y=y, text_anchor="end", klass="unit"))
    return made


def _label(label: str, x: str, y: float, value: float, end: float) -> Html:
    """Centred on its place, but for the last, which would stand out."""
    anchor = "end" if value > 0.97 * end else "middle"
    return element("text", label, x=x, y=y, text_anchor=anchor)


def _level(name: str, value: float, kind: str, frame: _Frame) -> Html | None:
    if not frame.low <= value <= frame.high:
        return None
    y = frame.y(value)
    return element("line", element("title", f"{name}: {value:.6g}"), x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, klass=kind)


def _drawn(curve: Curve, frame: _Frame) -> Html:
    if curve.style == "dots":
        places = "".join(f"M{frame.point(x, y)}h0" for x, y in zip(curve.xs, curve.ys, strict=True))
        return element("path", d=places, klass="dots")
    if curve.style == "range":
        there = [frame.point(x, y) for x, y in zip(curve.xs, curve.tops, strict=True)]
        back = [frame.point(x, y) for x, y in zip(curve.xs, curve.ys, strict=True)]
        return element("polygon", points=" ".join([*there, *reversed(back)]), klass="area")
    line = element("path", d=_path(curve.xs, curve.ys, frame), klass=curve.style)
    return join(line, *(_mark(curve, frame) if curve.style == "marks" else ()))


def _path(xs: Sequence[float], ys: Sequence[float], frame: _Frame) -> str:
    return "M" + "L".join(frame.point(x, y) for x, y in zip(xs, ys, strict=True))


def _mark(curve: Curve, frame: _Frame) -> list[Html]:
    """Points that tell their numbers where one points at them."""
    made = []
    for x, y in zip(curve.xs, curve.ys, strict=True):
        told = element("title", f"after {x:,.0f} steps: {y:.6g}")
        made.append(element("circle", told, cx=frame.x(x), cy=frame.y(y), r=3, klass="mark"))
    return made
