"""Events of several CUDA streams: the allocator keeps a pool for each, and gives no block of one to another."""

from __future__ import annotations

from bench.ledger.ledger import Ledger
from bench.simulator.allocator.caching import CachingAllocator
from bench.simulator.allocator.spans import Span


def replay_streams(ledger: Ledger) -> int:
    """Reserved bytes at the end, where a phase of the ledger is the stream that its allocations belong to."""
    pools: dict[str, CachingAllocator] = {}
    spans: dict[int, tuple[CachingAllocator, Span]] = {}
    for event in ledger.events:
        if event.sign > 0:
            pool = pools.setdefault(ledger.phases[event.phase], CachingAllocator())
            spans[id(event.block)] = pool, pool.malloc(event.block.nbytes)
        elif event.sign < 0:
            pool, span = spans.pop(id(event.block))
            pool.free(span)
    return sum(pool.peak_reserved for pool in pools.values())
