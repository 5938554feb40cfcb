"""A journal with another first line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qzo.journal import lines


def with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The same journal with another first line, sealed anew; `change` gets the header."""
    first, *rest = path.read_bytes().splitlines(keepends=True)
    header = json.loads(first.rpartition(b" ")[0])
    change(header)
    text, crc = lines.seal(json.dumps(header, separators=(",", ":")), 0)
    for line in rest:
        sealed, crc = lines.seal(line.rpartition(b" ")[0].decode(), crc)
        text += sealed
    path.write_bytes(text)
