"""Simulations beside each other, each process with its own; QZO_BENCH_WORKERS says how many there are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.cases.notices import ignore_future_warnings
from qzo.errors import QzoError

VARIABLE = "QZO_BENCH_WORKERS"
USUAL = 2

InOrder = Callable[[Callable[..., Any], Iterable[Any]], Iterator[Any]]


def count(jobs: int) -> int:
    """How many processes `jobs` jobs are given to: at most what QZO_BENCH_WORKERS says, 2 where it says nothing."""
    text = os.environ.get(VARIABLE) or str(USUAL)
    if not text.isdecimal() or not text.isascii() or int(text) < 1:
        raise QzoError(f"{VARIABLE}={text!r} is no number of processes; give a whole number from 1, as {VARIABLE}=8")
    return min(int(text), jobs)


@contextmanager
def workers(jobs: int) -> Iterator[InOrder]:
    """`map(function, items)` over processes, results in the order of the items, for about `jobs` items at a time.

    One process is this one, which has its libraries loaded: for one job none is started.
    """
    if (processes := count(jobs)) <= 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(processes, ignore_future_warnings) as pool:
        yield pool.imap
