"""Every kernel in Triton for every format, GPU and tile, compiled: which of them spill, or ask for too much memory?

`python tests/attack/attack_kernels.py`, five minutes; needs triton, and no GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product
from typing import NoReturn

import figures
from compiled_kernels import CAPABILITIES, ROWS, SHARED_BYTES, STACK_BYTES, needs
from packed_layers import FORMATS


def main() -> NoReturn:
    """Rebuilds and draws have no tile of x."""
    cases = [
        *product(("rebuild", "draw"), FORMATS, CAPABILITIES, ROWS[:1]),
        *product(("product", "dual"), FORMATS, CAPABILITIES, ROWS),
    ]
    counts: Counter[str] = Counter()
    for case in cases:
        found = needs(*case)
        counts["spilled"] += found["stack"] > STACK_BYTES
        counts["too_much_memory"] += found["shared"] > SHARED_BYTES
        print(*case, found, file=sys.stderr, flush=True)
    figures.finish("kernels", len(cases), spilled=counts["spilled"], too_much_memory=counts["too_much_memory"])


if __name__ == "__main__":
    main()
