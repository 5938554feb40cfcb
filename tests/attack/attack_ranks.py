"""`torchrun --max-restarts -m qzo train` with a random rank killed at a random moment: no run lost, the same bits.

Ten minutes.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import figures
from torchrun_runs import contents, killed, make_run

KILLS = 20


def main() -> None:
    """Print what went wrong, and the figures."""
    dice, lost, different, tried, longest = random.Random(0), [], [], 0, 0.0
    with tempfile.TemporaryDirectory() as place:
        options, alone = make_run(Path(place))
        begun = time.monotonic()
        killed(2, [*options, "--out", f"{place}/whole"], 0, lambda: False)
        longest = time.monotonic() - begun
        while tried < KILLS:
            size, out = 2 + tried % 2, Path(place, "run")
            moment = time.monotonic() + dice.uniform(0.1, 1) * longest
            rank = dice.randrange(size)
            code, was_there, told = killed(
                size,
                [*options, "--out", str(out)],
                rank,
                lambda: time.monotonic() > moment,  # noqa: B023
            )
            what = f"rank {rank} of {size}"
            if code:
                lost.append(f"{what}: {told[-2000:]}")
            elif contents(out) != alone:
                different.append(what)
            tried += was_there
            print(what, "killed" if was_there else "too late or too early", file=sys.stderr, flush=True)
            shutil.rmtree(out, ignore_errors=True)
    for what in (*lost, *different):
        print(what, file=sys.stderr)
    figures.finish("ranks", tried, lost=len(lost), different=len(different))


if __name__ == "__main__":
    main()
