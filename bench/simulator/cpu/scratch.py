"""What products in bf16 take while they run, on CPUs where they are oneDNN's: asked of the kernel itself.

oneDNN packs blocks of both operands, a set for each thread, in memory that PyTorch's allocator hands out. How much
depends on the instructions it chooses, so it is measured here, once for each kind of arguments, on numbers of no
meaning. Where they are not oneDNN's they take nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.ledger.events import highest_rise
from bench.simulator.cpu.gemm import needs_blocks


def takes_scratch(*tensors: Tensor) -> bool:
    """Whether a product of these tensors is one of those."""
    return not needs_blocks() and any(tensor.dtype is torch.bfloat16 for tensor in tensors)


def inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that an operator on CPU tensors, fake ones too, takes at most beside its results."""
    named = tuple((name, _described(kwargs[name])) for name in kwargs)
    return _measured(func, tuple(map(_described, args)), named, torch.get_num_threads())


@dataclass(frozen=True)
class Described:
    """What tells tensors apart that a kernel treats alike."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        """Such a tensor, of zeros."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).zero_()


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Described(tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list | torch.Size) else value


@cache
def _measured(func: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], threads: int) -> int:
    with _disable_current_modes(), torch.no_grad():
        given = [_made(value) for value in args]
        named = {name: _made(value) for name, value in kwargs}
        func(*given, **named)  # what is made once is no part of it
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = func(*given, **named)
    known = {id(value) for value in (*given, *named.values())}
    new = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and id(leaf) not in known]
    return max(0, highest_rise(profiler) - sum(leaf.nbytes for leaf in new))


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, Described) else value
