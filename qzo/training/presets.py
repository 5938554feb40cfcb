"""Named sets of settings, so that a run needs no expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qzo.training.settings import AUTO

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "auto": {
        "steps": 200,
        "batch_size": AUTO,
        "eval_every": 20,
        "relative": True,
        "lr": AUTO,
        "eps": AUTO,
        "clip_threshold": AUTO,
        "layers": AUTO,
        "directions": 8,
        "estimator": "population",
        "scheduler": "linear",
    },
    "reward": {  # of reports/studies/reward: a reward is not smooth, so nothing is measured beforehand
        "steps": 50,
        "eval_every": 10,
        "relative": True,
        "lr": 4e-3,
        "eps": 5e-2,
        "clip_threshold": math.inf,
        "layers": AUTO,
        "directions": 8,
        "estimator": "population",
        "normalize": True,
        "scheduler": "linear",
    },
    "paper": {},  # arXiv 2505.13430: absolute amounts, one direction, both sides, every layer; the lr of 7B models
}


def usual_preset(method: str, reward: bool = False) -> str:
    """The preset where none is named; those but "paper" are for qzo alone, see `TrainSettings`."""
    if method != "qzo":
        return "paper"
    return "reward" if reward else "auto"
