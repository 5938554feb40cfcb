"""The curves of a run as numbers: what is drawn, in the page and in the picture alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from qzo.report.reading import Story
from qzo.training.telemetry.progress import WINDOW

MOST_DOTS = 600  # steps that are drawn one by one; of more, the range of neighbours
SMOOTHED = 40  # the mean is taken over one of so many parts of a run
PERCENT = ("accuracy", "macro_f1", "exact_match", "f1", "em")  # scores between 0 and 1
Points = Sequence[float]


@dataclass(frozen=True)
class Curve:
    """Some points; `style` is "dots", "line", "marks" (a line with its points), or "range" (from `ys` up to `tops`)."""

    name: str
    style: str
    xs: Points
    ys: Points
    tops: Points = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line; `kind` is "baseline" or "bound"."""

    name: str
    y: float
    kind: str


@dataclass(frozen=True)
class Panel:
    """One drawing: curves against steps.

    Attributes:
        text: what it shows, for who cannot see it.
        limits: lowest and highest y that is drawn.
        end: the last x.
        best: a point of the curve of "marks" that is ringed.
    """

    title: str
    text: str
    curves: Sequence[Curve]
    limits: tuple[float, float]
    end: int
    levels: Sequence[Level] = field(default_factory=tuple)
    percent: bool = False
    best: tuple[float, float] | None = None


def panels_of(story: Story) -> list[Panel]:
    """Loss, metric, d and the share of clipped steps, as far as the run has them."""
    found = [_losses(story)]
    if story.validations:
        found.append(_scores(story))
    if story.steps:
        found.append(_slopes(story))
    bound = story.settings.get("clip_threshold")
    if story.steps and (bound is not None or not story.zeroth_order):
        found.append(_clipped(story))
    return [panel for panel in found if panel.curves]


def name_of(metric: str) -> str:
    """A metric in words."""
    return {"macro_f1": "macro F1", "f1": "F1", "em": "exact match"}.get(metric, metric.replace("_", " "))


def _losses(story: Story) -> Panel:
    xs, ys = _finite([step.number for step in story.steps], [step.loss for step in story.steps])
    curves = [*_each("each step", xs, ys), *_smoothed("mean of steps", xs, ys)]
    marks = _validated(story, "loss")
    levels = _baseline(story, "loss")
    if marks.xs:
        curves.append(marks)
    inner = [*_middle(ys), *marks.ys, *(level.y for level in levels)]
    text = f"training loss of {len(xs):,} steps" + (f", from {ys[0]:.4g} to {ys[-1]:.4g}" if ys else "")
    return Panel("Loss", text, curves, _around(inner), _end(story), levels)


def _scores(story: Story) -> Panel:
    metric = story.metric
    marks, levels = _validated(story, metric), _baseline(story, metric)
    percent = metric in PERCENT
    best = story.best
    ring = None if best is None or not math.isfinite(best.scores.get(metric, math.nan)) else best.scores[metric]
    limits = _around([*marks.ys, *(level.y for level in levels)], 0.02 if percent else 0.0)
    title = f"Validation {name_of(metric)}"
    told = ", ".join(f"{y:.4g} after {x:,.0f} steps" for x, y in list(zip(marks.xs, marks.ys, strict=True))[-12:])
    return Panel(
        title,
        f"{title}: {told}",
        [marks] if marks.xs else [],
        (max(0.0, limits[0]), min(1.0, limits[1])) if percent else limits,
        _end(story),
        levels,
        percent,
        None if best is None or ring is None else (best.step, ring),
    )


def _slopes(story: Story) -> Panel:
    xs, ys = _finite([step.number for step in story.steps], [step.slope for step in story.steps])
    title = "Directional derivative d" if story.zeroth_order else "Norm of the gradient"
    bound = story.settings.get("clip_threshold") if story.zeroth_order else None
    widest = max(map(abs, _middle(ys)), default=0.0) or 1.0
    levels: list[Level] = []
    if isinstance(bound, int | float) and 0 < bound <= 3 * widest:
        widest = max(widest, bound)
        levels = [Level("clip threshold", bound, "bound"), Level("clip threshold", -bound, "bound")]
    limits = (-1.08 * widest, 1.08 * widest) if story.zeroth_order else (0.0, 1.08 * widest)
    spread = math.sqrt(fmean(y * y for y in ys)) if ys else 0.0
    text = f"{title} of {len(xs):,} steps, root mean square {spread:.3g}"
    return Panel(title, text, _each("each step", xs, ys), limits, _end(story), levels)


def _clipped(story: Story) -> Panel:
    """The share among the last 100 steps, as it is shown during training."""
    flags, xs, ys, count = [step.clipped for step in story.steps], [], [], 0
    for number, flag in enumerate(flags):
        count += flag - (flags[number - WINDOW] if number >= WINDOW else 0)
        xs.append(float(story.steps[number].number))
        ys.append(count / min(number + 1, WINDOW))
    text = f"{sum(flags):,} of {len(flags):,} steps were clipped"
    line = Curve(f"share of the last {WINDOW} steps", "line", *_thinned(xs, ys, MOST_DOTS))
    return Panel("Share of steps clipped", text, [line], (0.0, 1.0), _end(story), percent=True)


def _validated(story: Story, metric: str) -> Curve:
    found = [(float(each.step), each.scores.get(metric, math.nan)) for each in story.validations]
    xs, ys = _finite([x for x, _ in found], [y for _, y in found])
    return Curve("validation", "marks", xs, ys)


def _baseline(story: Story, metric: str) -> list[Level]:
    value = math.nan if story.first is None else story.first.scores.get(metric, math.nan)
    return [Level("before training", value, "baseline")] if math.isfinite(value) else []


def _end(story: Story) -> int:
    """The steps that were asked for, where the run goes on, so that one sees how far it is."""
    asked = int(story.settings.get("steps", 0)) if story.state == "running" else 0
    return max(1, story.taken, asked, *(found.step for found in story.validations))


def _finite(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = [(float(x), y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _each(name: str, xs: Points, ys: Points) -> list[Curve]:
    if not xs:
        return []
    if len(xs) <= MOST_DOTS:
        return [Curve(name, "dots", xs, ys)]
    parts = _parts(len(xs), MOST_DOTS // 2)
    lows, tops = [min(ys[a:b]) for a, b in parts], [max(ys[a:b]) for a, b in parts]
    return [Curve("range of steps", "range", [fmean(xs[a:b]) for a, b in parts], lows, tops)]


def _smoothed(name: str, xs: Points, ys: Points) -> list[Curve]:
    """The mean over neighbours on both sides, fewer at the ends."""
    if len(xs) < 2 * 5:
        return []
    half = max(2, len(xs) // (2 * SMOOTHED))
    sums = [0.0]
    for y in ys:
        sums.append(sums[-1] + y)
    means = []
    for number in range(len(ys)):
        reach = min(half, number, len(ys) - 1 - number)
        means.append((sums[number + reach + 1] - sums[number - reach]) / (2 * reach + 1))
    return [Curve(name, "line", *_thinned(xs, means, MOST_DOTS // 2))]


def _thinned(xs: Points, ys: Points, most: int) -> tuple[Points, Points]:
    if len(xs) <= most:
        return xs, ys
    parts = _parts(len(xs), most)
    return [fmean(xs[a:b]) for a, b in parts], [fmean(ys[a:b]) for a, b in parts]


def _parts(count: int, parts: int) -> list[tuple[int, int]]:
    edges = [count * number // parts for number in range(parts + 1)]
    return list(pairwise(edges))


def _middle(ys: Points) -> list[float]:
    """All but the hundredth at either end, which would leave no room for the others."""
    ordered, out = sorted(ys), len(ys) // 100
    return ordered[out : len(ordered) - out]


def _around(values: Points, least: float = 0.0) -> tuple[float, float]:
    """Limits that leave some room around values."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), least, 0.0 if high > low else abs(high) * 0.05 or 0.5)
    return low - room, high + room
