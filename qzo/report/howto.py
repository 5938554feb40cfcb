"""The exact commands by which a run goes on: resumed, given more steps, scored, asked, exported."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from qzo.errors import QzoError
from qzo.report.reading import Story
from qzo.training.presets import PRESETS
from qzo.training.settings import TrainSettings

ASKED = ("data", "validation", "test", "label_words", "reward", "temperature", "max_new_tokens", "generations")
OPTIONS = {**{name: name for name in ASKED}, "asked_metric": "metric"}  # in run.json -> of `qzo train`


class Command(NamedTuple):
    """A line for a shell, and what it does."""

    what: str
    line: str


def commands_of(story: Story) -> list[Command]:
    """What can be done with a run, the most urgent first."""
    run, model = str(story.folder.absolute()), str(story.about.get("model", ""))
    tuned = "tuned.gguf" if model.lower().endswith(".gguf") else "tuned"
    found = []
    if story.state in ("running", "interrupted"):
        how = "Go on after" if story.state == "interrupted" else "Should it be stopped, go on after"
        found.append(Command(f"{how} step {story.resumes_after:,}, to the bit", train_line(story)))
    else:
        more = 2 * int(story.settings.get("steps", 0))
        found.append(Command(f"Train on, to {more:,} steps", train_line(story, more)))
    if story.validations:
        found += [
            Command("Export the best state, in the format it came in", shlex.join(["qzo", "export", run, tuned])),
            Command("Score the best state", shlex.join(["qzo", "eval", run, *_task(story.about)])),
            Command("Ask it, before and after", shlex.join(["qzo", "generate", run, "--before", "--prompt", "TEXT"])),
        ]
    return [command for command in found if command.line]


def train_line(story: Story, steps: int | None = None) -> str:
    """The command that takes the run up again; empty where run.json does not tell the model and the data."""
    about = story.about
    if not isinstance(about.get("model"), str) or "task" not in about:
        return ""
    settings = {**story.asked, **({} if steps is None else {"steps": steps})}
    device = story.facts.get("device")
    device = device.get("type") if isinstance(device, dict) else None
    words = ["qzo", "train", about["model"], *_task(about), *_own(about), *_settings(settings)]
    words += ["--device", str(device)] if device else []
    words += ["--keep-weights"] if about.get("reward") is not None and story.facts.get("keep_weights") is True else []
    return shlex.join([*words, "--out", str(story.folder.absolute()), "--resume"])


def _task(about: Mapping[str, Any]) -> list[str]:
    if about.get("task") is None:
        return []
    data = about.get("data")
    return ["--task", str(about["task"]), *([] if data is None else ["--data", str(data)])]


def _own(about: Mapping[str, Any]) -> list[str]:
    """Options that name data of one's own, and a reward, which is not looked up: it is code of the user's."""
    if about.get("task") is not None or not isinstance(about.get("data"), str):
        return []
    words = []
    for name, option in OPTIONS.items():
        words += [] if about.get(name) is None else [_option(option), str(about[name])]
    columns, sizes = (value if isinstance(value, dict) else {} for value in (about.get("columns"), about.get("sizes")))
    if columns:
        words += ["--columns", ",".join(f"{field}={column}" for field, column in columns.items())]
    for split, size in sizes.items():
        words += [] if size is None else [_option(f"{split}_samples"), str(size)]
    return words


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The preset, and options for what it does not have so."""
    preset = str(settings.get("preset", "paper"))
    words = ["--preset", preset]
    for name, value in settings.items():
        usual = PRESETS.get(preset, {}).get(name, default_of(name, settings["method"]))
        if name == "method" and value != TrainSettings().method:
            words += [_option(name), str(value)]
        elif name in ("method", "preset", "legs") or value == usual:  # a run remembers its legs
            continue
        elif isinstance(value, bool):
            words += [_option(name if value else f"no_{name}")]
        else:
            words += [_option(name), "inf" if name == "clip_threshold" and value is None else str(value)]
    return words


def default_of(name: str, method: str) -> Any:
    """What a setting of a method is, as JSON, where it is not asked for. None for one that is not known."""
    try:
        return TrainSettings(method=method).to_json().get(name)
    except QzoError:
        return None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
