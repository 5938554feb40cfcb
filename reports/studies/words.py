"""Words that the pages of several studies use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quoted(text: str) -> str:
    """A model's answer on one line."""
    return " ".join(text.split())


def machine(environment: Mapping[str, Any]) -> str:
    """Where a study ran: platform, threads, versions."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "transformers", "python"))
    count = environment["threads"]
    return f"{environment['platform']}, {count} thread{'s' if count > 1 else ''}, {versions}"
