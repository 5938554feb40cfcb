"""How many numbers and bytes each part of a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qzo.files.folder import Header
from qzo.models.skeleton import FLOATING

Counted = tuple[dict[str, int], dict[str, int]]  # part -> numbers; part -> bytes


def count(headers: dict[str, Header], parts: Iterable[str], part_of: Callable[[str], str | None]) -> Counted:
    """Numbers and bytes of each part, of what is none as "unquantized"; of that, only floating numbers count."""
    counts = dict.fromkeys((*parts, "unquantized"), 0)
    sizes = dict.fromkeys(counts, 0)
    for name, header in headers.items():
        part = part_of(name) or "unquantized"
        sizes[part] += header.nbytes
        if part != "unquantized" or (header.dtype in FLOATING and not name.endswith("rotary_emb.inv_freq")):
            counts[part] += header.numel
    return counts, sizes
