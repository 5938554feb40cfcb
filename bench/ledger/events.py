"""PyTorch's own allocation events on a CPU: how far they rise, over all and within each phase."""

from __future__ import annotations

from typing import Any

from torch.profiler import profile

MARK = "phase "  # of profiler events that tell where a phase begins


def highest_rise(profiler: profile) -> int:
    """The highest sum of the profiler's allocation events, in bytes above the start."""
    return max(rises(profiler).values())


def rises(profiler: profile) -> dict[str, int]:
    """Phase -> the highest sum of allocation events while it was current, in bytes above the start; "" before any."""
    # The only place that keeps the events in order.
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    live, phase, highest = 0, "", {"": 0}
    for event in results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
        elif event.name().startswith(MARK):
            phase = event.name().removeprefix(MARK)
        else:
            continue
        highest[phase] = max(highest.get(phase, live), live)
    return highest
