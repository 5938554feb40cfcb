"""Segments that grow and shrink page by page: expandable_segments:True of the caching allocator.

A segment is more address space than the GPU has memory. Memory is mapped behind it in whole pages, at the lowest
addresses where a request fits, and unmapped again where whole pages are free (find_expandable_block, map_block,
try_allocate_expandable_block and unmap_block in c10/cuda/CUDACachingAllocator.cpp).
"""

from __future__ import annotations

from bench.simulator.allocator.spans import Device, Pool, Span

ENDLESS = 1 << 46  # bytes of memory to reckon with where no limit is given


class ExpandableSegments:
    """All expandable segments of one device.

    Args:
        device: gives the memory.
        total_bytes: the GPU's memory; a segment's address space is 9/8 of it. None: no limit.
    """

    def __init__(self, device: Device, total_bytes: int | None) -> None:
        total_bytes = ENDLESS if total_bytes is None else total_bytes
        self._device = device
        self._address_space = total_bytes + total_bytes // 8

    def grow(self, pool: Pool, size: int) -> Span | None:
        """A span of at least `size` mapped bytes, taken out of the pool; None if there is not enough memory.

        What was mapped before memory ran out stays mapped, as in PyTorch.
        """
        span = self._room(pool, size)
        if not span.mapped and not self._map(span, min(span.size, size)):
            return None
        while span.size < size:  # free, then unmapped: they merge
            unmapped = span.after
            assert unmapped is not None
            if not self._map(unmapped, min(unmapped.size, size - span.size)):
                return None
            span = unmapped
        pool.remove(span)
        return span

    def shrink(self, span: Span) -> None:
        """Unmap the whole pages of a free span, and give up the segment if nothing is mapped any more."""
        pool, base = span.pool, span.base
        assert base is not None
        begin = -(-(span.address - base) // pool.page) * pool.page
        end = (span.address + span.size - base) // pool.page * pool.page
        if begin >= end:
            return
        pool.remove(span)
        if begin > span.address - base:
            pages = span.cut(base + begin - span.address)
            pool.add(span)
            span = pages
        if end < span.address + span.size - base:
            pool.add(span.cut(base + end - span.address))
        self._device.give_back(span.size)
        span.mapped = False
        pool.absorb(span, span.before)
        pool.absorb(span, span.after)
        if span.is_split:
            pool.add(span)

    def _room(self, pool: Pool, size: int) -> Span:
        """The lowest unmapped span that has `size` bytes with what is free around it, else a new segment."""
        for address in pool.unmapped:
            span = pool.at(address)
            if span.before is not None and not span.before.used:
                span = span.before
            if _free_bytes(span, size) >= size:
                return span
        nbytes = -(-self._address_space // pool.page) * pool.page
        address = self._device.addresses(nbytes)
        span = Span(address, nbytes, pool, base=address, mapped=False)
        pool.add(span)
        return span

    def _map(self, span: Span, size: int) -> bool:
        """Put memory behind the first `size` bytes of an unmapped span, rounded up to pages, and merge."""
        pool = span.pool
        nbytes = -(-size // pool.page) * pool.page
        if not self._device.take(nbytes):
            return False
        pool.remove(span)
        if nbytes < span.size:
            pool.add(span.cut(nbytes))
        span.mapped = True
        pool.absorb(span, span.before)
        pool.absorb(span, span.after)
        pool.add(span)
        return True


def _free_bytes(span: Span | None, enough: int) -> int:
    """Bytes without a user from `span` on; stops counting at `enough`."""
    nbytes = 0
    while nbytes < enough and span is not None and not span.used:
        nbytes += span.size
        span = span.after
    return nbytes
