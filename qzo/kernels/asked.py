"""Whether kernels in Triton are asked for, and which tensors they may work on.

`QZO_KERNELS=triton` in the environment asks for them, or `by_triton()`. Of all cards an H100 alone has run them yet, so
nothing uses them unasked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError

VARIABLE, CHOICES = "QZO_KERNELS", ("operators", "triton")
DEVICES = ("cuda", "meta")  # on `meta` what would be allocated is; there a GPU is simulated
_within: bool | None = None


@contextmanager
def by_triton(allowed: bool = True) -> Iterator[None]:
    """Within, the kernels are asked for, or with `allowed=False` are not, whatever the environment says."""
    global _within
    before, _within = _within, allowed
    try:
        yield
    finally:
        _within = before


def is_asked() -> bool:
    """Whether the kernels are asked for. Raises QzoError for a word that the environment may not have."""
    return _by_environment() if _within is None else _within


def is_carrier() -> bool:
    """Whether layers on a GPU of this machine are computed by the kernels."""
    return is_asked() and torch.cuda.is_available() and find_spec("triton") is not None


def advice(device: torch.device, noise: str) -> str | None:
    """What would make a step on this device faster, in one line; None where nothing would that is known here."""
    if device.type != "cuda" or find_spec("triton") is None or (is_asked() and noise == "philox"):
        return None
    lacking = [*([] if is_asked() else [f"{VARIABLE}=triton"]), *([] if noise == "philox" else ["--noise philox"])]
    return f"on an H100 a step is up to 15 times as fast by kernels in Triton; begin with {' and '.join(lacking)}"


def takes(x: Tensor, *tensors: Tensor) -> bool:
    """Whether these lie where kernels run, and no derivative of theirs is wanted. Raises QzoError without Triton."""
    if not is_asked() or x.device.type not in DEVICES or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    if not x.is_meta:
        kernels("launch")
    return True


@cache
def _by_environment() -> bool:
    word = os.environ.get(VARIABLE, "").lower()
    if word not in ("", *CHOICES):
        raise QzoError(f"{VARIABLE}={word!r} is not known; choose {' or '.join(CHOICES)}, or leave it out")
    return word == "triton"


@cache
def kernels(name: str) -> Any:
    """A module of qzo/kernels/triton. Raises QzoError where Triton is not installed."""
    if find_spec("triton") is None:
        raise QzoError(f"{VARIABLE}=triton needs the package triton; pip install 'qzo[triton]', or leave it out")
    return import_module(f"qzo.kernels.triton.{name}")
