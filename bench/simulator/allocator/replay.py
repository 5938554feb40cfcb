"""The ledger's events replayed through PyTorch's caching allocator: what is reserved for what is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from bench.ledger.ledger import Ledger
from bench.simulator.allocator.caching import LARGE_SEGMENT, SMALL_SEGMENT, CachingAllocator, OutOfMemory
from bench.simulator.allocator.settings import MIB, ROUND_BYTES, AllocatorSettings
from bench.simulator.allocator.spans import Span


@dataclass(frozen=True)
class Replay:
    """What the allocator's statistics would have said; all but the number of retries in bytes.

    `phase_reserved` is the most that was reserved within each phase: on a full card less than what was reserved before.
    `peak_allocated` is the peak after loading, as if the statistics had been reset then. It counts whole blocks, so it
    is the ledger's peak plus what was too small to be split off. When `peak_reserved` was reached,
    `allocated_at_peak_reserved` was allocated and `inactive_split_at_peak_reserved` free but stuck in segments that
    were partly in use (PyTorch counts none of it in expandable segments, whose free pages can be given back).
    """

    peak_allocated: int
    peak_reserved: int
    phase_peaks: dict[str, int]
    allocated_at_peak_reserved: int
    inactive_split_at_peak_reserved: int
    num_alloc_retries: int
    phase_reserved: dict[str, int]

    @property
    def fragmentation(self) -> int:
        """Bytes reserved but not allocated when the most was reserved."""
        return self.peak_reserved - self.allocated_at_peak_reserved


__all__ = [
    "LARGE_SEGMENT", "MIB", "ROUND_BYTES", "SMALL_SEGMENT", "AllocatorSettings", "CachingAllocator", "OutOfMemory",
    "Replay", "replay",
]  # fmt: skip


def replay(
    ledger: Ledger,
    settings: AllocatorSettings | None = None,
    memory_bytes: int | None = None,
    total_bytes: int | None = None,
) -> Replay:
    """Run the ledger's events through a fresh allocator; the arguments are those of `CachingAllocator`.

    Raises:
        OutOfMemory: the events need more than `memory_bytes`.
    """
    allocator = CachingAllocator(settings, memory_bytes, total_bytes)
    spans: dict[int, Span] = {}
    peaks: dict[str, int] = {}
    reserved: dict[str, int] = {}
    phase = ""
    for event in ledger.events:
        if phase != ledger.phases[event.phase]:
            phase = ledger.phases[event.phase]
            peaks[phase] = max(peaks.get(phase, 0), allocator.allocated)  # what it begins with counts, too
            reserved[phase] = max(reserved.get(phase, 0), allocator.reserved)
        if event.sign > 0:
            spans[id(event.block)] = allocator.malloc(event.block.nbytes)
            if allocator.allocated > peaks[phase]:
                peaks[phase] = allocator.allocated
            if allocator.reserved > reserved[phase]:
                reserved[phase] = allocator.reserved
        elif event.sign < 0:
            allocator.free(spans.pop(id(event.block)))
        else:
            allocator.empty_cache()
    after_load = [nbytes for phase, nbytes in peaks.items() if phase != "load"]
    return Replay(
        peak_allocated=max(after_load, default=0),
        peak_reserved=allocator.peak_reserved,
        phase_peaks=peaks,
        allocated_at_peak_reserved=allocator.allocated_at_peak,
        inactive_split_at_peak_reserved=allocator.inactive_split_at_peak,
        num_alloc_retries=allocator.num_alloc_retries,
        phase_reserved=reserved,
    )
