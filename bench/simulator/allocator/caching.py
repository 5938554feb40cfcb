"""PyTorch's CUDA caching allocator without a GPU.

The rules are those of DeviceCachingAllocator in c10/cuda/CUDACachingAllocator.cpp as of PyTorch 2.10 to 2.13: requests
are rounded to 512 bytes; those up to 1 MiB share 2 MiB segments, those under 10 MiB get 20 MiB segments, larger ones a
segment of their own size rounded to 2 MiB; the best-fitting free block is split, and neighbours are merged when freed.
When memory runs out, free segments are given back and the request is tried again.

Not replayed: more than one stream, pinned memory, private pools of CUDA graphs, settings that change on the way.
"""

from __future__ import annotations

from bench.simulator.allocator.expandable import ExpandableSegments
from bench.simulator.allocator.settings import LARGE_REQUEST, MIB, ROUND_BYTES, AllocatorSettings
from bench.simulator.allocator.spans import Device, Pool, Span
from qzo.errors import QzoError

SMALL_BYTES = 1 * MIB  # kSmallSize: the largest request served from the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = AllocatorSettings().large_segment_size_mb * MIB
LARGE_ROUND = 2 * MIB  # kRoundLarge
UNLIMITED = 1 << 62  # larger than any block


class OutOfMemory(QzoError):
    """A request that could not be served, not even after giving back all free segments.

    Attributes (bytes):
        asked: the request. tried: the segment that was asked of the device for it.
        allocated, reserved: at that moment.
    """

    def __init__(self, asked: int, tried: int, allocated: int, reserved: int) -> None:
        self.asked, self.tried, self.allocated, self.reserved = asked, tried, allocated, reserved
        super().__init__(
            f"out of memory: a request of {asked} bytes needs {tried / MIB:.0f} MiB more; "
            f"{allocated / MIB:.1f} MiB are allocated and {reserved / MIB:.1f} MiB reserved"
        )


class CachingAllocator:
    """One stream of one device.

    Args:
        settings: None for PyTorch's defaults.
        memory_bytes: what the device can give, its memory without the CUDA context; None: without end.
        total_bytes: all its memory, which per_process_memory_fraction is a share of; None: `memory_bytes`.

    Attributes:
        allocated, reserved, inactive_split: bytes now; inactive_split are free pieces of segments partly in use.
        peak_reserved: the most that was reserved; allocated_at_peak, inactive_split_at_peak: after the request that
            first made it so.
        num_alloc_retries, num_ooms: how often all free segments were given back for a request, and how often that did
            not help.
        pools: the large and the small pool.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        memory_bytes: int | None = None,
        total_bytes: int | None = None,
    ) -> None:
        self.settings = settings = settings or AllocatorSettings()
        total_bytes = memory_bytes if total_bytes is None else total_bytes
        self.allocated = self.inactive_split = 0
        self.peak_reserved = self.allocated_at_peak = self.inactive_split_at_peak = 0
        self.num_alloc_retries = self.num_ooms = 0
        self._large_segment = settings.large_segment_size_mb * MIB
        self._oversize = UNLIMITED if settings.max_split_size_mb is None else settings.max_split_size_mb * MIB
        self._rounding = (settings.max_non_split_rounding_mb or settings.large_segment_size_mb) * MIB
        self._allowed = self._allowed_bytes(total_bytes)
        self.pools = self._large, self._small = Pool(False, self._large_segment), Pool(True, SMALL_SEGMENT)
        self._device = Device(memory_bytes)
        self._expandable = ExpandableSegments(self._device, total_bytes) if settings.expandable_segments else None
        # Neither garbage collection nor the release of oversize blocks touches expandable segments.
        collects = settings.garbage_collection_threshold is not None and self._allowed < UNLIMITED
        self._collects = collects and self._expandable is None

    @property
    def reserved(self) -> int:
        return self._device.reserved

    def malloc(self, nbytes: int) -> Span:
        """Take the best-fitting free block, or a new segment.

        Raises:
            OutOfMemory: no memory, also after a retry; the allocator stays usable.
        """
        size = self.settings.rounded(nbytes)
        pool = self._small if size <= SMALL_BYTES else self._large
        span = self._cached(pool, size) or self._new(pool, size, nbytes)
        was_split, fixed = span.is_split, span.base is None
        if self._worth_splitting(span, size):
            rest = span.cut(size)
            pool.add(rest)
            if fixed:
                self.inactive_split += -size if was_split else rest.size
        elif was_split and fixed:
            self.inactive_split -= span.size
        span.used = True
        self.allocated += span.size
        if self._device.peak_reserved > self.peak_reserved:
            self.peak_reserved = self._device.peak_reserved
            self.allocated_at_peak, self.inactive_split_at_peak = self.allocated, self.inactive_split
        return span

    def free(self, span: Span) -> None:
        """Give a block back and merge it with free neighbours; the segment stays reserved."""
        span.used = False
        self.allocated -= span.size
        pool = span.pool
        merged = pool.absorb(span, span.before) + pool.absorb(span, span.after)
        pool.add(span)
        if span.base is None:
            self.inactive_split += (span.size if span.is_split else 0) - merged

    def empty_cache(self) -> None:
        """Give all segments, and all pages of expandable segments, that are free back to the device."""
        for pool in self.pools:
            for span in list(pool):
                if self._expandable is not None:
                    self._expandable.shrink(span)
                elif not span.is_split:
                    self._release(span)

    # ---- taking from the cache (get_free_block, should_split)

    def _cached(self, pool: Pool, size: int) -> Span | None:
        pool.searches += self._collects
        index = pool.at_least(size)
        if index == len(pool.free):
            return None
        if self._expandable is not None:  # a block counts as large as it can still grow
            while index + 1 < len(pool.free) and _room(pool[index + 1]) < _room(pool[index]):
                index += 1
        span = pool[index]
        if size < self._oversize <= span.size or self._oversize <= size <= span.size - self._rounding:
            return None
        pool.remove(span)
        return span

    def _worth_splitting(self, span: Span, size: int) -> bool:
        rest = span.size - size
        if span.pool.small or self._expandable is not None:
            return rest >= ROUND_BYTES
        return size < self._oversize and rest > SMALL_BYTES

    # ---- taking from the device (malloc, alloc_block, get_allocation_size)

    def _new(self, pool: Pool, size: int, asked: int) -> Span:
        if size <= SMALL_BYTES:
            segment = SMALL_SEGMENT
        elif size < LARGE_REQUEST:
            segment = self._large_segment
        else:
            segment = -(-size // LARGE_ROUND) * LARGE_ROUND
        if self._collects:
            self._collect_garbage()
        span = self._segment(pool, size, segment)
        if span is None and self._release_oversize(pool, size):
            span = self._segment(pool, size, segment)
        if span is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            span = self._segment(pool, size, segment)
        if span is None:
            self.num_ooms += 1
            raise OutOfMemory(asked, segment, self.allocated, self.reserved)
        return span

    def _segment(self, pool: Pool, size: int, segment: int) -> Span | None:
        if self.reserved + segment > self._allowed:
            return None
        if self._expandable is not None:
            return self._expandable.grow(pool, size)
        if not self._device.take(segment):
            return None
        return Span(self._device.addresses(segment), segment, pool)

    def _allowed_bytes(self, total_bytes: int | None) -> int:
        fraction = self.settings.per_process_memory_fraction
        if fraction == 1:
            return UNLIMITED
        if total_bytes is None:
            raise QzoError(f"per_process_memory_fraction:{fraction} needs the GPU's memory: pass memory_bytes")
        return int(fraction * total_bytes)

    # ---- giving back to the device

    def _release(self, span: Span) -> None:
        span.pool.remove(span)
        self._device.give_back(span.size)

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Release one oversize block that is large enough, else several from the largest on; True if that is enough.

        release_available_cached_blocks; in PyTorch, too, what was released stays so when it was not enough.
        """
        if self._oversize == UNLIMITED or self._expandable is not None:
            return False
        wanted = max(size, self._oversize)
        index = pool.at_least(wanted)
        if index < len(pool.free):
            self._release(pool[index])
            return True
        released = 0
        while released < wanted and pool.free and pool[-1].size >= self._oversize:
            released += pool[-1].size
            self._release(pool[-1])
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Release whole free segments that have waited longer than average, until reserved is under the threshold.

        garbage_collect_cached_blocks: an age is the number of searches in the large pool since the block was freed.
        """
        target = self.reserved - int((self.settings.garbage_collection_threshold or 0) * self._allowed)
        pool = self._large
        waiting = [span for span in pool if not span.is_split]
        total_age = sum(pool.searches - span.since for span in waiting)
        while target > 0 and waiting:
            average, kept = total_age / len(waiting), []
            for span in waiting:
                age = pool.searches - span.since
                if age < average:
                    kept.append(span)
                    continue
                total_age -= age
                target -= span.size
                self._release(span)
            waiting = kept


def _room(span: Span) -> int:
    """Bytes a block of an expandable segment can grow to."""
    return span.size + (span.after.size if span.after is not None and not span.after.mapped else 0)
