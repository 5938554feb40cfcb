"""The settings of PyTorch's CUDA caching allocator, spelt as in PYTORCH_ALLOC_CONF (or PYTORCH_CUDA_ALLOC_CONF).

Names, defaults and limits are those of c10/core/AllocatorConfig.{h,cpp} and c10/cuda/CUDAAllocatorConfig.{h,cpp},
PyTorch 2.11 to 2.13. The environment is never read: who wants its settings passes the string.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError

MIB = 1 << 20
ROUND_BYTES = 512  # kMinBlockSize
LARGE_REQUEST = 10 * MIB  # kMinLargeAlloc
INTERVALS = 16  # one for each power of two from 1 MiB on; the last reaches up to the largest request
# They concern memory of the host, locks and graph capture: no effect on the device memory of one stream.
WITHOUT_EFFECT = frozenset(
    {
        "pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb",
        "pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_reserve_segment_size_mb",
        "pinned_free_catch_all", "release_lock_on_cudamalloc", "graph_capture_record_stream_reuse",
    }
)  # fmt: skip
# What only one value of can be replayed: another allocator, and errors raised before memory has run out.
ONLY = {"backend": "native", "throw_on_cudamalloc_oom": "False"}
PAIR = re.compile(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(?:,|$)")


@dataclass(frozen=True)
class AllocatorSettings:
    """One field for each setting that has an effect; the defaults are PyTorch's.

    Attributes:
        max_split_size_mb: blocks of this size and more are oversize: never split, and only used for requests that
            nearly fill them. None: no block is oversize.
        max_non_split_rounding_mb: a request for an oversize block takes one that is less than this larger. None:
            large_segment_size_mb.
        large_segment_size_mb: segment size for requests over 1 MiB and under 10 MiB, and the page of large expandable
            segments.
        garbage_collection_threshold: share of the allowed memory from which on old unused segments are given back. As
            in PyTorch it does nothing unless per_process_memory_fraction is below 1. None: off.
        per_process_memory_fraction: share of the GPU's memory that is allowed.
        roundup_power2_divisions: for requests from 1, 2, 4 ... 32768 MiB on (the first also for smaller ones), the
            number of sizes between two powers of two that requests are rounded up to; 0 and 1: rounded to 512 bytes.
        expandable_segments: segments grow and shrink page by page instead of being allocated at their final size.

    Raises:
        QzoError: for a value that PyTorch refuses.
    """

    max_split_size_mb: int | None = None
    max_non_split_rounding_mb: int | None = None
    large_segment_size_mb: int = 20
    garbage_collection_threshold: float | None = None
    per_process_memory_fraction: float = 1.0
    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    expandable_segments: bool = False

    def __post_init__(self) -> None:
        if self.large_segment_size_mb * MIB <= LARGE_REQUEST:
            raise QzoError(f"large_segment_size_mb:{self.large_segment_size_mb} must be over {LARGE_REQUEST // MIB}")
        for name in ("max_split_size_mb", "max_non_split_rounding_mb"):
            value = getattr(self, name)
            if value is not None and value < self.large_segment_size_mb:
                raise QzoError(f"{name}:{value} must be at least large_segment_size_mb, {self.large_segment_size_mb}")
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise QzoError(f"garbage_collection_threshold:{threshold} must be over 0 and under 1")
        if not 0 <= self.per_process_memory_fraction <= 1:
            raise QzoError(f"per_process_memory_fraction:{self.per_process_memory_fraction} must be from 0 to 1")
        if len(self.roundup_power2_divisions) != INTERVALS:
            raise QzoError(
                f"roundup_power2_divisions needs {INTERVALS} numbers: give one for each power of two from 1 MiB on"
            )
        for divisions in self.roundup_power2_divisions:
            if divisions & (divisions - 1):
                raise QzoError(f"roundup_power2_divisions:{divisions} must be a power of two, or 0 for none")

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read `max_split_size_mb:128,expandable_segments:True`; the last of several values for one key counts.

        Stricter than PyTorch in one point: 64.5 and -1 are no whole numbers, where std::stoull makes some of them.

        Raises:
            QzoError: unknown key, unreadable or refused value, or a setting that cannot be replayed.
        """
        fields: dict[str, Any] = {}
        for key, value in _pairs("".join(text.split())):
            if key in READERS:
                fields[key] = READERS[key](key, value)
            elif key in ONLY:
                if value != ONLY[key]:
                    raise QzoError(f"{key}:{value} cannot be replayed, only {key}:{ONLY[key]}; leave it out")
            elif key not in WITHOUT_EFFECT:
                known = ", ".join(sorted({*READERS, *ONLY, *WITHOUT_EFFECT}))
                raise QzoError(f"allocator setting {key!r} is unknown; known are {known}")
        return cls(**fields)

    def rounded(self, nbytes: int) -> int:
        """Bytes of the block that a request of `nbytes` gets: DeviceCachingAllocator::round_size."""
        if nbytes < ROUND_BYTES:
            return ROUND_BYTES
        interval = min(max(nbytes.bit_length() - MIB.bit_length(), 0), INTERVALS - 1)
        divisions = self.roundup_power2_divisions[interval]
        step = ROUND_BYTES
        if divisions > 1 and nbytes > ROUND_BYTES * divisions:
            step = (1 << (nbytes.bit_length() - 1)) // divisions  # between two powers of two
        return -(-nbytes // step) * step


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs, position = [], 0
    while position < len(text):
        match = PAIR.match(text, position)
        if match is None:
            raise QzoError(f"cannot read allocator settings from {text[position:]!r} on; write key:value,key:value")
        pairs.append((match[1], match[2]))
        position = match.end()
    return pairs


def _whole(key: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()):
        raise QzoError(f"{key}:{value} must be a whole number")
    return int(value)


def _fraction(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise QzoError(f"{key}:{value} must be a number") from None


def _boolean(key: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise QzoError(f"{key}:{value} must be True or False")
    return value == "True"


def _divisions(key: str, value: str) -> tuple[int, ...]:
    """`4` for all intervals, or `[256:1,512:2,>:4]`: from 256 MiB on 1, from 512 MiB on 2, from 1 GiB on 4.

    The first number also holds below its interval; intervals that nobody names are not rounded.
    """
    if not value.startswith("["):
        if value == "0":
            raise QzoError(f"{key}:0 must be a power of two; leave it out, or write [>:0]")
        return (_whole(key, value),) * INTERVALS
    divisions, last, first = [0] * INTERVALS, 0, True
    for start, number in _pairs(value[1:-1]):
        count = _whole(key, number)
        if start == ">":
            divisions[last + 1 :] = [count] * (INTERVALS - last - 1)
            continue
        mebibytes = _whole(key, start)
        if mebibytes < 1 or mebibytes & (mebibytes - 1):
            raise QzoError(f"{key}: {start} must be a power of two, in MiB")
        last = min(mebibytes.bit_length() - 1, INTERVALS - 1)
        divisions[: last + 1] = [count] * (last + 1) if first else [*divisions[:last], count]
        first = False
    return tuple(divisions)


READERS: dict[str, Callable[[str, str], Any]] = {
    "max_split_size_mb": _whole,
    "max_non_split_rounding_mb": _whole,
    "large_segment_size_mb": _whole,
    "garbage_collection_threshold": _fraction,
    "per_process_memory_fraction": _fraction,
    "roundup_power2_divisions": _divisions,
    "expandable_segments": _boolean,
}
