"""What the run was made of: its data, its settings, and what computed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qzo.report.howto import default_of
from qzo.report.html import Child, Html, element, join, table
from qzo.report.reading import Story
from qzo.report.sizes import number

MOST_LABELS = 20  # whose shares are shown
LEARNT, WRITTEN = "An example, what is learnt in brackets", "An example, what the model writes in brackets"


def data_section(story: Story) -> Html:
    """Kind, rows, lengths, shares of the labels and an example, as they were told before the first step."""
    about = story.facts.get("data")
    title = element("h2", "Data")
    if not isinstance(about, dict):
        return element("section", title, element("p", "The run does not tell its data.", klass="quiet"))
    facts = [(name, about.get(key)) for name, key in (("name", "name"), ("what it is", "kind"), ("metric", "metric"))]
    facts += [("reward", about.get("reward")), ("from", story.about.get("data"))]
    notices = about.get("notices")
    example = about.get("example")
    return element(
        "section",
        title,
        _facts([(name, value) for name, value in facts if value is not None]),
        _splits(about.get("splits")),
        _labels(about.get("labels")),
        *(element("p", str(notice), klass="quiet") for notice in (notices if isinstance(notices, list) else ())),
        None if not isinstance(example, str) else join(
            element("h3", WRITTEN if about.get("reward") else LEARNT), element("p", example, klass="asked")
        ),
    )  # fmt: skip


def _splits(splits: Any) -> Html | None:
    if not isinstance(splits, dict) or not splits:
        return None
    found = {split: of_split if isinstance(of_split, dict) else {} for split, of_split in splits.items()}
    columns = {"rows": "rows", "texts": "texts", "median": "median tokens", "longest": "longest"}
    if all(of_split.get("texts") == of_split.get("rows") for of_split in found.values()):
        del columns["texts"]
    rows = [[split, *(_whole(of_split.get(key)) for key in columns)] for split, of_split in found.items()]
    return table(["split", *columns.values()], rows)


def _labels(counts: Any) -> Html | None:
    """Bars of the shares among training rows."""
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 0 for count in counts.values()):
        return None
    total = sum(counts.values()) or 1
    bars = [
        join(
            element("dt", label),
            element("dd", element("span", klass="bar", style=f"--share:{count / total:.4f}", aria_hidden="true"),
                    f"{count:,} ({100 * count / total:.0f} %)"),
        )
        for label, count in list(counts.items())[:MOST_LABELS]
    ]  # fmt: skip
    more = f", the {MOST_LABELS} most frequent of {len(counts):,}" if len(counts) > MOST_LABELS else ""
    return join(element("h3", f"Labels of training rows{more}"), element("dl", *bars, klass="shares"))


def settings_section(story: Story) -> Html:
    """All settings; those that are not the default stand out."""
    rows = []
    for name, value in story.settings.items():
        if name == "legs" and not value:
            continue
        other = name != "method" and value != default_of(name, story.method)
        shown = element("b", _value(value)) if other else _value(value)
        rows.append(join(element("dt", name), element("dd", shown)))
    sections: list[Child] = [
        element("h2", "Settings"),
        element("p", "In bold what is not the method's default.", klass="quiet"),
        element("dl", *rows, klass="facts columns"),
    ]
    versions = story.about.get("versions")
    known = versions if isinstance(versions, dict) else {}
    device = story.facts.get("device")
    place = device.get("name") if isinstance(device, dict) else None
    base = story.about.get("base")
    computed = [
        ("model", story.about.get("model")),
        ("its content", base[:12] if isinstance(base, str) else None),
        ("device", place),
        *known.items(),
    ]
    sections += [element("h3", "Model and machine"), _facts([pair for pair in computed if pair[1] is not None])]
    return element("section", *sections)


def _facts(pairs: Sequence[tuple[str, Any]]) -> Html:
    return element(
        "dl", *(join(element("dt", str(name)), element("dd", _value(value))) for name, value in pairs), klass="facts"
    )


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _whole(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"
