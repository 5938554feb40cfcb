"""`python -m bench.gpu`, what `make gpu` calls: all that is to be measured on a GPU, most wanted first.

Twelve minutes in all. Every part is a process with a time limit and a file of its own in `--out`, written as it goes,
so that an interruption loses nothing that was finished. A part that fails or runs out of its time does not keep the
others from running.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.gpu.cells import device_at_hand
from bench.records.files import make_folder
from qzo.errors import QzoError

THREADS = "2"  # of each process on the CPU: there are several at a time
GRACE_SECONDS = 5  # from an interruption to the end of a part that does not heed it


@dataclass(frozen=True)
class Part:
    """One part: seconds that it gets, and its command for a folder and a device."""

    name: str
    seconds: float
    command: Callable[[Path, str], list[str]]
    by_default: bool = True


def _tests(out: Path, device: str) -> list[str]:
    side_by_side = ["-n", "8"] if find_spec("xdist") else []
    marked = ["-m", "cuda"] if device == "cuda" else ["-m", "cuda", "--collect-only"]
    return ["-m", "pytest", "-q", "-rfE", "--tb=short", *marked, *side_by_side, *TESTS]


def _writing(name: str, file: str) -> Callable[[Path, str], list[str]]:
    def command(out: Path, device: str) -> list[str]:
        path = out / f"{device_at_hand(device)[0]}.{file}" if file else out
        return ["-m", name, "--device", device, "--out", str(path)]

    return command


# Files with tests marked `cuda`: the others need packages that a machine with a GPU may lack.
TESTS = (
    "tests/bench/simulator/allocator/test_streams.py", "tests/bench/worlds/test_cuda.py", "tests/qzo/test_cuda.py",
    "tests/qzo/kernels/test_cuda.py",
)  # fmt: skip
PARTS = (
    Part("facts", 40, _writing("bench.gpu.facts", "facts.json")),
    Part("kernels", 100, _writing("bench.gpu.kernels", "kernels.json")),
    Part("memory", 240, _writing("bench.gpu.cells", "")),
    Part("seconds", 190, _writing("bench.gpu.seconds", "seconds.json")),
    Part("journal", 30, _writing("bench.gpu.journal", "journal.json")),
    Part("tests", 90, _tests),
    Part("events", 60, _writing("bench.gpu.events", "events.json")),
    Part("recipes", 240, _writing("bench.gpu.recipes", "recipes.jsonl"), by_default=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if every part ended well within its time."""
    names = [part.name for part in PARTS]
    by_default = ",".join(part.name for part in PARTS if part.by_default)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    parser.add_argument(
        "--parts", default=by_default, help=f"comma-separated, of {', '.join(names)} (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/measurements"), help="folder (default: %(default)s)")
    parser.add_argument("further", nargs="*", help="after --: options for the one part of --parts")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    unknown = [name for name in chosen if name not in names]
    if unknown:
        print(f"error: unknown part {unknown[0]!r}; choose from {', '.join(names)}", file=sys.stderr)
        return 2
    try:
        device_at_hand(options.device)
        make_folder(options.out)
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ended_well = [_run(part, options) for part in PARTS if part.name in chosen]
    return int(not all(ended_well))


def _run(part: Part, options: argparse.Namespace) -> bool:
    """Whether the part ended well; interrupted, and then killed with all its processes, when its time is over."""
    print(f"== {part.name}, at most {part.seconds:.0f} s", flush=True)
    start = time.monotonic()
    command = [sys.executable, *part.command(options.out, options.device), *options.further]
    process = subprocess.Popen(command, start_new_session=True, env={"OMP_NUM_THREADS": THREADS, **os.environ})
    try:
        code = process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        for sent in (signal.SIGINT, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, sent)
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
    ended = "out of time" if code is None else f"exit code {code}"
    print(f"== {part.name}: {ended} after {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
