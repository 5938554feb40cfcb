"""Named sets of settings, so that a run needs no expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qzo.training.settings import AUTO

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "auto": {
        "steps": 200,
        "eval_every": 20,
        "relative": True,
        "lr": AUTO,
        "eps": AUTO,
        "clip_threshold": AUTO,
        "layers": AUTO,
        "directions": 8,
        "estimator": "one-sided",
        "scheduler": "linear",
    },
    "paper": {},  # arXiv 2505.13430: absolute amounts, one direction, both sides, every layer; the lr of 7B models
}


def usual_preset(method: str, reward: bool = False) -> str:
    """The preset where none is named; "auto" is for qzo alone, and for losses that are smooth, which no reward is."""
    return "auto" if method == "qzo" and not reward else "paper"
