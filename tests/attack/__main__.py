"""`make attack`: every attack_*.py of this folder, one after the other; fails where one of them does.

Names given as arguments (`make attack ARGS="damaged trainer"`) choose some of them. What each is there for:

| fault | attack |
|---|---|
| one flipped bit in what decides "best", in the best state, in any file of a run | run_folder |
| the same in any file of a Trainer's checkpoint; export of one that is not whole | checkpoints |
| the Trainer killed: half checkpoints, no resume, other bits, a step too many | trainer |
| train, first order, journal, export, quantize, replay killed: half folders, leftovers | crash_points |
| SIGTERM and SIGINT: exit codes 143 and 130, what is saved, how to go on | signals |
| a full or read-only disk; `--json` and outputs that are devices, links, FIFOs | run_folder, environment |
| memory and time from small files, layer counts, giant headers, links out of a folder | hostile, damaged, environment |
| NaN and infinity in any format; a tensor in two shards; a config with fewer layers | damaged, hostile |
| headers, metadata, settings, states with missing keys or unknown words, sealed anew; threads, carrier | sealed |
| keys of a GGUF file that are not read | gguf_keys |
| two processes in one place: runs, journals, outputs, Trainers | pairs |
| a journal of CUDA without a GPU | sealed |
| a rank of several killed: runs lost, other bits | ranks |
| extreme settings: infinite numbers, false claims of an error | extreme |
| data that cannot be trained on | data |
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main(names: list[str]) -> int:
    """Run the scripts of these names, all where there are none; returns 1 where one fails, 2 for an unknown name."""
    scripts = {file.stem.removeprefix("attack_"): file for file in sorted(HERE.glob("attack_*.py"))}
    unknown = sorted(set(names) - scripts.keys())
    if unknown:
        print(f"error: no attack is called {unknown[0]}; there are {', '.join(scripts)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or scripts:
        start = time.monotonic()
        code = subprocess.run([sys.executable, str(scripts[name])], cwd=HERE.parents[1], check=False).returncode
        print(f"{name}: {'held' if code == 0 else f'FAILED, exit code {code}'}, {time.monotonic() - start:.0f} s")
        failed += [name] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
