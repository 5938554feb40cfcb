"""Examples: what the model said before training, and says after it."""

from __future__ import annotations

from collections.abc import Sequence

from qzo.report.examples import Answered
from qzo.report.html import Html, element
from qzo.report.reading import Story
from qzo.tasks.metrics import normalized

MOST_CHARACTERS = 1200  # of a prompt; its end stays, which the answer goes on from


def answers_section(story: Story, answers: Sequence[Answered]) -> Html | None:
    """One block an example; None where none were asked for."""
    if not answers:
        return None
    return element(
        "section",
        element("h2", "Examples before and after"),
        element("p", "Validation rows, answered by the likeliest tokens.", klass="quiet"),
        *(_example(number, each) for number, each in enumerate(answers, 1)),
    )


def _example(number: int, found: Answered) -> Html:
    same = found.before == found.after
    return element(
        "article",
        element("h3", f"Example {number}", klass="hidden"),
        element("p", _shortened(found.asked), klass="asked"),
        element(
            "dl",
            _answer("wanted", found.wanted, None) if found.wanted else None,
            _answer("before", found.before, found.wanted),
            _answer("after, the same" if same else "after", found.after, found.wanted),
        ),
        klass="example",
    )


def _answer(name: str, text: str, wanted: str | None) -> Html:
    """An answer; right where it is what was wanted but for case, punctuation and articles."""
    right = wanted is not None and bool(wanted) and normalized(text) == normalized(wanted)
    shown = element("dd", text or "(nothing)", klass="said")
    return element("div", element("dt", f"{name} ✓" if right else name), shown, klass="right" if right else None)


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"... {text[-MOST_CHARACTERS:]}"
