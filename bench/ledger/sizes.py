"""Sizes as people write them: a number and a unit."""

from __future__ import annotations

import re
from fractions import Fraction

from qzo.errors import QzoError

UNITS = {
    prefix + "B": base**power
    for base, prefixes in ((1000, ("", "K", "M", "G", "T", "P")), (1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")))
    for power, prefix in enumerate(prefixes)
}


def parse_bytes(text: str) -> int:
    """Bytes in "24 MB" (1000**2 each), "1.5GiB" (1024**3 each) or "512B".

    Raises:
        QzoError: not a number followed by one of these units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]i?B|B)\s*", text)
    if match is None:
        raise QzoError(f"{text!r} is not a size; write a number and a unit, as in 24MB, 1.5GiB or 512B")
    return int(Fraction(match[1]) * UNITS[match[2].replace("k", "K")])
