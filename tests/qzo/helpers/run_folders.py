"""Folders of training runs, written line by line as `qzo train` would, and the page of one taken apart."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from qzo.training.settings import TrainSettings
from qzo.training.telemetry.metrics import Metrics

EVIL = (
    "</style><script src=//evil.example/x.js>alert(1)</script><img src=http://evil.example onerror=alert(2)>\u202e\"'&"
)
MIB = 2**20


def write_run(folder: Path, taken: int = 60, every: int = 20, **options: Any) -> Path:
    """A run of 60 steps on labelled texts, whose names are hostile, that came as far as `taken` steps."""
    settings = TrainSettings(**{"steps": 60, "eval_every": every, "lr": 1e-3, "relative": True, "eps": 1e-2, **options})
    folder.mkdir(parents=True)
    about = {"qzo_run": 1, "task": None, "data": f"/data/{EVIL}.csv", "columns": {"text": EVIL}, "sizes": {}}
    about |= {"model": f"/models/{EVIL}.gguf", "base": "ab" * 32, "metric": "accuracy", "rows": "cd"}
    versions = {"torch": "2.13", EVIL: EVIL}
    put(folder / "run.json", {**about, "settings": settings.to_json(), "versions": versions})
    metrics = Metrics(folder / "metrics.jsonl", "accuracy")
    slope = "d" if settings.method in ("qzo", "mezo") else "gradient_norm"
    for step in range(taken + 1):
        if step:
            loss = 1.5 + 1.5 * math.exp(-step / 30) + 0.2 * math.sin(7 * step)
            entry = {"step": step, "loss": loss, slope: 200 * math.sin(5 * step), "lr": 1e-3}
            metrics.write({**entry, "clipped": step % 4 == 0, "skipped": False, "seconds": 2.0 * step})
        if step % every == 0:
            metrics.write(
                {"step": step, "validation": scores(step), "memory": {"process": 700 * MIB, "optimizer": MIB}}
            )
    metrics.close()
    put(folder / "facts.json", facts())
    if taken == settings.steps:
        put(folder / "result.json", {"steps": taken, "stopped_early": False, "test": scores(taken)})
    return folder


def scores(step: int) -> dict[str, Any]:
    """What a validation gives."""
    right = 4 + step // 10
    confusion = {EVIL: {EVIL: right, "billing": 10 - right}, "billing": {"billing": 10}}
    return {"accuracy": (10 + right) / 20, "macro_f1": 0.5, "loss": 3 - step / 60, "count": 20, "confusion": confusion}


def facts() -> dict[str, Any]:
    """What is found before the first step."""
    split = {"rows": 20, "texts": 20, "median": 21, "longest": 34}
    data = {"name": EVIL, "kind": "texts with labels", "metric": "accuracy", "labels": {EVIL: 12, "billing": 8}}
    data |= {"splits": {"train": split, EVIL: split}, "example": f"{EVIL}\nLabel:[ billing]", "notices": [EVIL]}
    return {
        "data": data,
        "model": {"weights": 30 * MIB, "quantization": 90 * MIB, "trained": 1000, "packed": None},
        "batch": {"rows": 16, "tokens": 34},
        "device": {"type": "cpu", "name": "cpu"},
    }


def put(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """The elements of a page, its text, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.sound = "", [], True
        self.feed(text)
        self.close()
        self.sound = self.sound and not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.sound = self.sound and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]
