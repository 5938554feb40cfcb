"""`make attack`: every attack_*.py of this folder, one after the other; fails where one of them does.

Names given as arguments (`make attack ARGS="damaged kills"`) choose some of them.
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
