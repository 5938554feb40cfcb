"""What every attack has in common: helpers of the tests within reach, and one line of figures at its end.

An attack is a script `attack_NAME.py` beside this file that runs by itself (`python tests/attack/attack_NAME.py`),
needs no network and no GPU, and ends with `finish(...)`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "qzo" / "helpers"), str(ROOT)]


def finish(name: str, tried: int, **wrong: int) -> NoReturn:
    """Print the figures and leave: exit code 1 unless each of `wrong` is 0, and for an attack that tried nothing."""
    figures = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in wrong.items())
    print(f"{name}: {tried:,} tried, {figures}", flush=True)
    raise SystemExit(1 if any(wrong.values()) or not tried else 0)
