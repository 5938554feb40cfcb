"""The page: one file, nothing loaded from a network, no script; light and dark as the reader's system has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qzo.report.curves import Panel
from qzo.report.examples import Answered
from qzo.report.howto import commands_of
from qzo.report.html import Child, Html, element, join
from qzo.report.parts.about import data_section, settings_section
from qzo.report.parts.answers import answers_section
from qzo.report.parts.figures import figures
from qzo.report.parts.memory import memory_section
from qzo.report.parts.results import confusion_section, curves_section, validations_table
from qzo.report.peaks import Peak
from qzo.report.reading import Story

STYLE = Path(__file__).with_name("style.css")
# what a page may load: nothing but the style within it; no script is run, whatever found its way into the text
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(
    story: Story,
    panels: Sequence[Panel],
    peaks: Sequence[Peak],
    missing: str | None,
    answers: Sequence[Answered],
) -> str:
    """The whole page; `missing` tells why memory was not simulated."""
    name = story.folder.absolute().name
    body = [
        _header(story, name),
        figures(story, peaks),
        curves_section(story, panels),
        validations_table(story),
        answers_section(story, answers),
        confusion_section(story),
        memory_section(story, peaks, missing),
        data_section(story),
        settings_section(story),
        _commands(story),
        element("footer", "Made by qzo report. This page loads nothing from a network."),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{name}: training report"),
        element("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    return "<!doctype html>\n" + element("html", head, element("body", element("main", *body)), lang="en") + "\n"


def _header(story: Story, name: str) -> Html:
    model = Path(str(story.about.get("model", ""))).name
    data = story.about.get("task") or Path(str(story.about.get("data") or "")).name
    parts: list[Child] = [element("b", story.method), " on ", element("b", model or "a model of its own")]
    parts += [", trained on ", element("b", str(data))] if data else []
    asked = f" of {story.settings['steps']:,}" if type(story.settings.get("steps")) is int else ""
    state = element("span", story.state, klass=f"state {story.state.split()[0]}")
    return element(
        "header",
        element("h1", name),
        element("p", state, " ", *parts, f", {story.taken:,}{asked} steps", klass="lead"),
    )


def _commands(story: Story) -> Html | None:
    commands = commands_of(story)
    if not commands:
        return None
    lines = [join(element("dt", each.what), element("dd", element("code", each.line))) for each in commands]
    return element("section", element("h2", "Go on from here"), element("dl", *lines, klass="commands"))
