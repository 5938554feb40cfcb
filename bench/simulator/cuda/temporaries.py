"""Temporaries of a kernel: what it holds besides its results while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bench.ledger.ledger import Ledger


def with_temporaries(ledger: Ledger, func: Any, args: tuple, kwargs: dict, sizes: Iterable[int]) -> Any:
    """Run the operator; after its results come temporaries of these sizes, in bytes, that live until it is done."""
    out = run_seen(ledger, func, args, kwargs)
    hold(ledger, sizes)
    return out


def run_seen(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run the operator and register its results, so that what a rule records next comes after them."""
    out = ledger.run(func, args, kwargs)
    for item in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(item, Tensor):
            ledger.see(item)
    return out


def hold(ledger: Ledger, sizes: Iterable[int]) -> None:
    """Record temporaries of these sizes, in bytes, that are alive together; 0 is none."""
    for block in [ledger.allocate(nbytes) for nbytes in sizes if nbytes]:
        ledger.release(block)
