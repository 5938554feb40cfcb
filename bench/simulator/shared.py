"""Rules for operators on tensors without data that hold for CUDA and for CPUs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.ledger.ledger import Ledger

aten = torch.ops.aten

# Operators that write into a tensor of known shape and allocate nothing: without data there is nothing to do, and
# not running their meta kernels (Python, for most) makes the chunk loops of large models ten times faster to trace.
IN_PLACE = (
    "add_.Tensor", "addcdiv_.default", "addcmul_.default", "bitwise_and_.Scalar", "clamp_.default",
    "clamp_min_.default", "copy_.default", "div_.Tensor", "fill_.Scalar", "lerp_.Scalar", "mul_.Tensor",
    "normal_.default", "sqrt_.default", "sub_.Tensor", "uniform_.default", "zero_.default",
)  # fmt: skip
IN_PLACE_LISTS = (  # the same for lists of tensors; they return nothing
    "_foreach_add_.Scalar", "_foreach_addcdiv_.ScalarList", "_foreach_addcmul_.Scalar", "_foreach_div_.ScalarList",
    "_foreach_lerp_.Scalar", "_foreach_mul_.Scalar",
)  # fmt: skip
OUT = ("add.out", "mul.out", "sub.out")


def write(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """The tensor that an in-place operator or one with `out=` writes into."""
    return kwargs["out"] if "out" in kwargs else args[0]


def write_list(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> None:
    """An in-place operator on a list of tensors."""


def route_evenly(experts: int, ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """`nonzero` of an expert mask [tokens, top_k]: tokens spread evenly over `experts`, at least one for each."""
    mask = args[0]
    return mask.new_empty((max(1, -(-mask.numel() // experts)), mask.dim()), dtype=torch.long)


def keep_layers(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """`torch.rand([])`, by which models in training mode drop a layer where it is below their `layerdrop`: 1, so that
    each layer runs, as the largest step has it. Without a value the comparison would tell nothing.
    """
    return func(*args, **kwargs) if args[0] else torch.tensor(1.0)


def grouped_product(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """CUDA multiplies grouped experts in any float dtype, the meta kernel only in bf16: let it tell the shape."""
    halves = tuple(item.to(torch.bfloat16) if item is not None and item.is_floating_point() else item for item in args)
    return func(*halves, **kwargs).to(args[0].dtype)


def _operator(name: str) -> Any:
    packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


@contextmanager
def collector_off() -> Iterator[None]:
    """Without Python's garbage collector, which walks all events again and again: linear instead of quadratic time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def number_of_experts(config: object) -> int:
    """Experts of a layer; 1 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 1)
