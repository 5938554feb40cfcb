"""The figures that one looks for first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qzo.report.curves import PERCENT, name_of
from qzo.report.html import Html, element
from qzo.report.peaks import Peak
from qzo.report.reading import Story
from qzo.report.sizes import duration, score, size


def figures(story: Story, peaks: Sequence[Peak]) -> Html:
    """Cards: a name, a value, and what it is compared with."""
    cards = [*_scores(story), _steps(story), _time(story), *_skipped(story), *_memory(peaks)]
    return element("section", element("h2", "At a glance", klass="hidden"), element("dl", *cards, klass="cards"))


def _card(name: str, value: str, note: str, klass: str | None = None) -> Html:
    shown = [element("dd", value, klass="value"), element("dd", note, klass="note")]
    return element("div", element("dt", name), *shown, klass=f"card {klass or ''}".strip())


def _scores(story: Story) -> list[Html]:
    if story.best is None:
        return [_card("validation", "–", "none was recorded")]
    metric, first, best = story.metric, story.first, story.best
    percent = metric in PERCENT
    before = math.nan if first is None else first.scores.get(metric, math.nan)
    after = best.scores.get(metric, math.nan)
    note = f"before: {score(before, percent)}" if first is not None else "no baseline was recorded"
    count = f", {best.count:,} rows" if best.count else ""
    better = (after < before) if metric == "loss" else (after > before)
    kind = "good" if better else "level" if after == before or not math.isfinite(before + after) else "bad"
    cards = [_card(f"validation {name_of(metric)}", score(after, percent), f"{note}{count}", kind)]
    if metric != "loss" and math.isfinite(best.scores.get("loss", math.nan)):
        cards.append(_loss(story))
    if story.test is not None and metric in story.test.scores:
        rows = f", {story.test.count:,} rows" if story.test.count else ""
        untrained = story.first_test.scores.get(metric, math.nan) if story.first_test else math.nan
        known = f"before: {score(untrained, percent)}" if math.isfinite(untrained) else "best state"
        cards.append(_card(f"test {name_of(metric)}", score(story.test.scores[metric], percent), f"{known}{rows}"))
    cards.append(_card("best state", f"step {best.step:,}", f"of {len(story.validations):,} validations"))
    return cards


def _loss(story: Story) -> Html:
    assert story.best is not None
    before = math.nan if story.first is None else story.first.scores.get("loss", math.nan)
    return _card("validation loss", score(story.best.scores["loss"], False), f"before: {score(before, False)}")


def _steps(story: Story) -> Html:
    passes = story.taken * story.passes_a_step
    both = "" if story.zeroth_order else ", and as many backward"
    return _card("forward passes", f"{passes:,}", f"{story.passes_a_step} a step{both}")


def _time(story: Story) -> Html:
    each = f"{story.seconds / story.taken:.2f} s a step, all in" if story.taken else "no step was taken"
    return _card("time", duration(story.seconds), each)


def _skipped(story: Story) -> list[Html]:
    """Only where a loss was not finite."""
    skipped = sum(step.skipped for step in story.steps)
    return [_card("skipped steps", f"{skipped:,}", "their losses were not finite", "bad")] if skipped else []


def _memory(peaks: Sequence[Peak]) -> list[Html]:
    own = next((peak for peak in peaks if peak.own and peak.world == "measured"), None)
    return [] if own is None else [_card("peak memory", size(own.total), own.kind)]
