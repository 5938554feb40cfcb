"""PyTorch's CUDA caching allocator, replayed on the ledger's events.

Rules and constants are those of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.x): requests are rounded to 512 bytes,
requests up to 1 MiB share 2 MiB segments, those under 10 MiB get 20 MiB segments, larger ones a segment of their own
size rounded to 2 MiB; the best-fitting free block is split, and neighbours are merged when freed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from bench.ledger import Ledger

MIB = 1 << 20
ROUND_BYTES = 512
SMALL_BYTES = 1 * MIB  # the largest request served from the small pool
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LARGE_REQUEST = 10 * MIB  # from here on a segment is as large as the request
LARGE_ROUND = 2 * MIB
# Among free blocks of one size the lowest address is taken, and the driver maps device memory into the process, which
# on Linux goes from high addresses to low ones: a newer segment lies below the older ones. On the T4, reserved bytes of
# LoRA steps come out exact so, and one score matrix off in every second eager row with ascending addresses.
TOP_ADDRESS = 1 << 46


@dataclass(slots=True, eq=False)
class Span:
    """A piece of a segment: used or free, linked to its neighbours in the address order."""

    address: int
    size: int
    small: bool
    used: bool = False
    before: Span | None = None
    after: Span | None = None


class CachingAllocator:
    """One stream of one device without a memory limit: segments are never given back.

    Attributes:
        allocated, reserved: bytes now; peak_reserved: the most that was reserved.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? -> sorted (size, address)
        self._by_address: dict[int, Span] = {}
        self._lowest_address = TOP_ADDRESS

    def malloc(self, nbytes: int) -> Span:
        """Take the best-fitting free block, or a new segment."""
        size = max(ROUND_BYTES, -(-nbytes // ROUND_BYTES) * ROUND_BYTES)
        small = size <= SMALL_BYTES
        free = self._free[small]
        position = bisect_left(free, (size, 0))
        found = position < len(free)
        span = self._by_address[free.pop(position)[1]] if found else self._segment(size, small)
        self._split(span, size)
        span.used = True
        self.allocated += span.size
        return span

    def free(self, span: Span) -> None:
        """Give a block back and merge it with free neighbours; the segment stays reserved."""
        span.used = False
        self.allocated -= span.size
        for neighbour in (span.before, span.after):
            if neighbour is not None and not neighbour.used:
                self._take(neighbour)
                span = self._merge(*sorted((span, neighbour), key=lambda item: item.address))
        insort(self._free[span.small], (span.size, span.address))

    def _segment(self, size: int, small: bool) -> Span:
        if small:
            segment = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            segment = LARGE_SEGMENT
        else:
            segment = -(-size // LARGE_ROUND) * LARGE_ROUND
        self._lowest_address -= segment + LARGE_ROUND  # a gap: segments never merge
        span = Span(self._lowest_address, segment, small)
        self._by_address[span.address] = span
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return span

    def _split(self, span: Span, size: int) -> None:
        rest = span.size - size
        if rest < ROUND_BYTES if span.small else rest <= SMALL_BYTES:
            return
        tail = Span(span.address + size, rest, span.small, before=span, after=span.after)
        if span.after is not None:
            span.after.before = tail
        span.after, span.size = tail, size
        self._by_address[tail.address] = tail
        insort(self._free[tail.small], (tail.size, tail.address))

    def _merge(self, left: Span, right: Span) -> Span:
        left.size += right.size
        left.after = right.after
        if right.after is not None:
            right.after.before = left
        del self._by_address[right.address]
        left.used = False
        return left

    def _take(self, span: Span) -> None:
        free = self._free[span.small]
        free.pop(bisect_left(free, (span.size, span.address)))


@dataclass(frozen=True)
class Replay:
    """What the allocator's statistics would have said; all in bytes.

    `peak_allocated` is the peak after loading, as if the statistics had been reset then. It counts whole blocks, so it
    is the ledger's peak plus what was too small to be split off.
    """

    peak_allocated: int
    peak_reserved: int
    phase_peaks: dict[str, int]


def replay(ledger: Ledger) -> Replay:
    """Run the ledger's events through a fresh allocator."""
    allocator = CachingAllocator()
    spans: dict[int, Span] = {}
    peaks: dict[str, int] = {}
    for event in ledger.events:
        key, phase = id(event.block), ledger.phases[event.phase]
        peaks[phase] = max(peaks.get(phase, 0), allocator.allocated)
        if event.sign > 0:
            spans[key] = allocator.malloc(event.block.nbytes)
        else:
            allocator.free(spans.pop(key))
        peaks[phase] = max(peaks[phase], allocator.allocated)
    after_load = [nbytes for phase, nbytes in peaks.items() if phase != "load"]
    return Replay(max(after_load, default=0), allocator.peak_reserved, peaks)
