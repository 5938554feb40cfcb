"""bitsandbytes on a CPU, where its optimizers' kernels are PyTorch code: a rule runs that code on tensors without data.

What it casts, multiplies and rebuilds in fp32 are tensors of their own there, several times the parameter's size
(bitsandbytes 0.50, backends/cpu/ops.py); on a GPU one kernel does all of it in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from bench.ledger.ledger import Ledger, Rule
from qzo.quiet import quiet_libraries

KERNELS = {  # operator -> the function that is registered for it on a CPU
    "optimizer_update_8bit_blockwise": "_optimizer_update_8bit_blockwise_cpu",
    "optimizer_update_32bit": "_optimizer_update_32bit_cpu",
}


@cache
def optimizer_rules() -> dict[Any, Rule]:
    """Operator -> rule, as far as the installed bitsandbytes has them; none without it."""
    try:
        with quiet_libraries():
            from bitsandbytes.backends.cpu import ops
    except ImportError:
        return {}
    found = {name: getattr(ops, kernel, None) for name, kernel in KERNELS.items()}
    return {
        getattr(torch.ops.bitsandbytes, name).default: partial(run_kernel, kernel)
        for name, kernel in found.items()
        if kernel is not None
    }


def run_kernel(kernel: Callable[..., None], ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> None:
    """The kernel's own code, every tensor of it seen."""
    given = [_without_data(item) for item in args]
    named = {name: _without_data(item) for name, item in kwargs.items()}
    with ledger.watching():
        kernel(*given, **named)


def _without_data(value: Any) -> Any:
    """A tensor as all others are; the tables of the 256 numbers of an 8-bit state have data (optimizers/made.py)."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
