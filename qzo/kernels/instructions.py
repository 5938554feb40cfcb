"""Which instructions a product in bf16 may use on this CPU: those it has, up to the level that oneDNN is held to.

`ONEDNN_MAX_CPU_ISA` holds PyTorch's matrix products to a level, so that one machine can stand for an older one. The
products of this package keep to it too, and what is chosen by the CPU's abilities is chosen as the older one would.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the second is the older name
# The values of these, each with all before it; any other value is no limit.
LEVELS = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16",
)  # fmt: skip
NEWER_NAMES = {
    "AVX10_1_512": "AVX512_CORE_FP16",
    "AVX10_1_512_AMX": "AVX512_CORE_AMX",
    "AVX10_1_512_AMX_FP16": "AVX512_CORE_AMX_FP16",
}


def _constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """`torch.compiler.assume_constant_result`, which first imports all of torch._dynamo: 2 s for every user."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def has_bf16() -> bool:
    """Whether products of bf16 numbers have instructions of their own here (AVX512-BF16)."""
    return _has("_is_avx512_bf16_supported", "AVX512_CORE_BF16")


@_constant
def has_tiles() -> bool:
    """Whether they have tiles besides (AMX)."""
    return _has("_is_amx_tile_supported", "AVX512_CORE_AMX")


def described() -> str:
    """What bf16 products have here, for people: "AMX", "AVX512-BF16" or "no bf16 instructions"."""
    if has_tiles():
        return "AMX"
    return "AVX512-BF16" if has_bf16() else "no bf16 instructions"


@cache
def _has(question: str, level: str) -> bool:
    ask = getattr(torch.cpu, question, None)  # private, so it may go away
    return bool(ask and ask()) and _allowed(level)


def _allowed(level: str) -> bool:
    """Whether the environment lets oneDNN use this level; like oneDNN, whatever the case of the letters."""
    limit = next((os.environ[name].upper() for name in LIMITS if os.environ.get(name)), "")
    limit = NEWER_NAMES.get(limit, limit)
    return limit not in LEVELS or LEVELS.index(limit) >= LEVELS.index(level)
