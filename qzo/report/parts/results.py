"""What came out: curves, the validations behind them, and what was taken for what."""

from __future__ import annotations

from collections.abc import Sequence

from qzo.report.curves import PERCENT, Panel, name_of
from qzo.report.html import Html, element, table
from qzo.report.reading import Confusion, Story, Validation
from qzo.report.sizes import score
from qzo.report.svg import drawing, keys

MOST_LABELS = 20  # of a confusion matrix that is shown


def curves_section(story: Story, panels: Sequence[Panel]) -> Html:
    """The drawings, each with its legend."""
    if not panels:
        return element("section", element("h2", "Curves"), element("p", "No step was taken yet.", klass="quiet"))
    made = [
        element(
            "figure",
            element("figcaption", panel.title),
            drawing(panel, story.passes_a_step),
            keys(panel),
        )
        for panel in panels
    ]
    note = f"Below each drawing steps, above it {story.passes}, {story.passes_a_step:,} a step."
    shown = element("p", note, klass="quiet"), element("div", *made, klass="panels")
    return element("section", element("h2", "Curves"), *shown)


def validations_table(story: Story) -> Html | None:
    """Every validation in numbers."""
    if not story.validations:
        return None
    names = list(dict.fromkeys(name for each in story.validations for name in each.scores))
    names.sort(key=lambda name: name != story.metric)
    rows = [_validation(story, each, names) for each in story.validations]
    best = next(number for number, each in enumerate(story.validations) if each is story.best)
    title = f"All {len(rows):,} validations" if len(rows) > 1 else "The validation"
    shown = table(["steps", "passes", *map(name_of, names)], rows, best=best)
    return element("details", element("summary", title), shown)


def _validation(story: Story, found: Validation, names: Sequence[str]) -> list[str]:
    step = f"{found.step:,}" + (" (best)" if found is story.best else "")
    cells = (score(found.scores.get(name), name in PERCENT) for name in names)
    return [step, f"{found.step * story.passes_a_step:,}", *cells]


def confusion_section(story: Story) -> Html | None:
    """Confusion matrices before training, of the best state, and of the test, as far as they were recorded."""
    found = [
        ("before training", story.first),
        ("best state", story.best),
        ("test, before training", story.first_test),
        ("test, best state", story.test),
    ]
    matrices = [(title, each.confusion) for title, each in found if each is not None and each.confusion]
    if not matrices:
        return None
    if max(len(counts) for _, counts in matrices) > MOST_LABELS:
        shown = [element("p", f"There are more than {MOST_LABELS} labels; qzo eval tells the counts.", klass="quiet")]
    else:
        shown = [_matrix(title, counts) for title, counts in matrices]
    return element(
        "section",
        element("h2", "What was taken for what"),
        element("p", "Rows are the labels, columns what the model chose.", klass="quiet"),
        element("div", *shown, klass="matrices"),
    )


def _matrix(title: str, counts: Confusion) -> Html:
    """Cells are as strong as their share of the row; the diagonal, what is right, in its own colour."""
    head = element("tr", element("td"), *(element("th", label, scope="col") for label in counts))
    rows = []
    for label, guesses in counts.items():
        total = sum(guesses.values()) or 1
        cells = [
            element(
                "td",
                f"{count:,}",
                klass="right" if guess == label else "wrong",
                style=f"--share:{count / total:.2f}",
            )
            for guess, count in guesses.items()
        ]
        rows.append(element("tr", element("th", label, scope="row"), *cells))
    matrix = element("table", element("caption", title), head, *rows, klass="matrix")
    return element("div", matrix, klass="scroll", tabindex=0)
