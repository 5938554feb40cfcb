"""Versions and machine that a record was made with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qzo.kernels import asked


def environment() -> dict[str, Any]:
    """The record's `environment`; gpu and driver are null without a GPU, commit and dirty outside a checkout.

    `kernels` is there where layers on a GPU are computed by those of qzo in Triton, and not by PyTorch's operators.
    """
    return {**_environment(), **({"kernels": "triton"} if asked.is_asked() else {})}


@cache
def _environment() -> dict[str, Any]:
    from bench.cases.pretrained import transformers

    return {
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
    }


def _driver() -> str | None:
    from bench.records.nvml import driver_version

    return driver_version()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
