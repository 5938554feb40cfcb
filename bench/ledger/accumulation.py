"""Gradients that meet at one tensor, added in place: what autograd does, but not while a dispatch mode watches it.

Where a tensor was used twice, its gradients are summed in the engine's input buffer, into the first one if nobody else
holds it or its storage (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace). Under any TorchDispatchMode, and
for tensors on `meta`, the engine takes a third tensor instead. Under autocast an embedding that is also the head would
so have its gradient three times at the peak instead of twice. The history of an H100's allocator has these sums in
place (reports/measurements).
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ADD = torch.ops.aten.add.Tensor
WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")  # of every dispatch mode
ENGINE = "_engine_run_backward"  # the function of torch.autograd that backward passes run below


class Accumulation:
    """Tells the engine's sums from others, and those that would go into the first operand.

    References to a tensor are counted as a dispatch mode sees them; how many there are when nobody else holds it is
    found by a sum of which that is known. None where this PyTorch does not tell: then no sum is taken to be in place.
    """

    def __init__(self) -> None:
        self.unshared = _references_of_an_unshared_tensor()

    def in_place(self, func: Any, args: tuple, kwargs: dict) -> bool:
        """Whether this call of the mode that asks is a sum of gradients that the engine would do in place."""
        if func is not ADD or kwargs or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return False
        old, new = args
        alike = isinstance(new, Tensor) and old.shape == new.shape and old.dtype == new.dtype
        if not alike or not old.is_contiguous() or old._is_view():  # the base of a view has a part in its storage
            return False
        return self.unshared is not None and old._use_count() <= self.unshared and _called_by_the_engine()


def _called_by_the_engine() -> bool:
    """Whether no Python stands between the engine and the dispatch mode: a backward function written in Python may use
    again what it has added. A thread of the engine's own has no frame at all.
    """
    frame: FrameType | None = sys._getframe()
    for _ in range(3):  # this one, `in_place` and the mode's
        frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    return frame is None or frame.f_code.co_name == ENGINE


class _Probe(TorchDispatchMode):
    """Remembers the references to the first operand of the engine's sum."""

    references: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is ADD and torch._C._current_graph_task_id() != -1:
            self.references = args[0]._use_count()
        return func(*args, **(kwargs or {}))


def _references_of_an_unshared_tensor() -> int | None:
    if not hasattr(Tensor, "_use_count"):
        return None
    with torch.enable_grad(), _Probe() as probe:
        leaf = torch.ones(2, requires_grad=True)
        used_twice = leaf * 1
        (used_twice + torch.tanh(used_twice)).sum().backward()
    return probe.references
