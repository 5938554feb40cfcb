"""What a file may be before anything of it is read: a regular file, no larger than any real one of its kind.

A FIFO is waited for without end, a device may have no end, and some kilobytes of JSON or of a header can stand for
gigabytes of objects. The limits below are a few times what the largest public checkpoints have.
"""

from __future__ import annotations

import codecs
import json
import math
import struct
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.regular import MIB, check_regular

READ = ("*.json", "*.safetensors", "*.gguf", "*.pt", "*.bin", "*.model", "*.txt", "*.jinja")  # by us or transformers
LARGEST = {  # of what is read whole -> MiB
    **dict.fromkeys(("*.index.json", "tokenizer.json", "vocab.json", "*.model", "*.txt"), 64),
    **dict.fromkeys(("*config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"), 8),
    "*.jinja": 8,
}
MOST_VALUES = {"*.index.json": 1_000_000, "*.json": 250_000}  # in a JSON file that becomes Python objects
DEEPEST = 64  # levels of lists and objects in a JSON file
HEADER_BYTES = 32 * MIB  # of a safetensors file
MOST_TENSORS = 250_000  # of a checkpoint; each takes some ten microseconds and a kilobyte
UNLIMITED = "quantization_config"


def check_file(file: Path) -> None:
    """Raise QzoError unless a path is that of a regular file of a plausible size; links are followed."""
    check_regular(file, next((limit for pattern, limit in LARGEST.items() if fnmatch(file.name, pattern)), None))


def check_folder(folder: Path) -> None:
    """Raise QzoError where a reader of a model could come upon a FIFO, a device or a socket, or a far too large file.

    Of the folder itself and of its chat templates; transformers reads more files than this package names.
    """
    for place in (folder, folder / "additional_chat_templates"):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            settings = fnmatch(file.name, "*config.json")  # a folder or a broken link is not as if there were none
            if settings or (_is_read(file) and file.exists() and not file.is_dir()):
                check_file(file)
                if file.suffix == ".json":
                    _check_encoding(file)
                if settings:
                    _check_said_once(file)


def _is_read(file: Path) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in READ)


def _check_encoding(file: Path) -> None:
    """Raise QzoError for JSON that begins with a byte order mark: of it, some readers take no notice and some fail."""
    with file.open("rb") as opened:
        start = opened.read(3)
    if start.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise QzoError(
            f"{file} begins with a byte order mark, which JSON may not have and transformers does not read; save it "
            "as UTF-8 without one"
        )


def _check_said_once(file: Path) -> None:
    """Raise QzoError for settings that transformers reads and that say two things; what is no JSON, it tells itself."""
    try:
        json.loads(file.read_bytes(), object_pairs_hook=said_once)
    except AmbiguousKey as error:
        raise QzoError(f"{file}: {error}") from error
    except (ValueError, RecursionError):
        return


class AmbiguousKey(ValueError):
    """A key of a JSON object that stands there twice, with two values: readers differ in which one they take."""


def said_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises AmbiguousKey; the same value twice is no matter."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and repr(content[key]) != repr(value):  # repr: 1, 1.0 and true are equal
            raise AmbiguousKey(f"{key[:80]!r} stands there twice, with two values; leave only the one that is meant")
        content[key] = value
    return content


def check_json(file: Path, text: str) -> None:
    """Raise QzoError for the text of a JSON file with far more values than any real one."""
    most = next((most for pattern, most in MOST_VALUES.items() if fnmatch(file.name, pattern)), None)
    values = text.count(",") + text.count(":")
    if most is not None and values > most:
        raise QzoError(
            f"{file} has {values:,} values; no real file of its kind has more than {most:,}: copy or download it again"
        )


def check_numbers(file: Path, content: Any) -> None:
    """Raise QzoError for JSON with NaN in it, with infinity other than as a limit, or that nests without end.

    What a quantization_config must be is its format's to say.
    """
    level = [("", content)]
    for _ in range(DEEPEST):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            free = key == UNLIMITED or (value == math.inf and "limit" in key)
            if isinstance(value, float) and not math.isfinite(value) and not free:
                raise QzoError(f"{file}: {key} is {value}, not a finite number; copy or download it again")
            if isinstance(value, dict):
                below += [(UNLIMITED if UNLIMITED in (key, name) else name, inner) for name, inner in value.items()]
            elif isinstance(value, list):
                below += [(key, inner) for inner in value]
        level = below
    if level:
        raise QzoError(f"{file} nests its values deeper than {DEEPEST} levels; copy or download it again")


def check_header(file: Path) -> int:
    """An upper bound of the tensors of a safetensors file. Raises QzoError for one whose header is far too large.

    Its first eight bytes are the header's length; each tensor has its "data_offsets" in there.
    """
    check_file(file)
    with file.open("rb") as data:
        size = struct.unpack("<Q", start)[0] if len(start := data.read(8)) == 8 else 0
        if size > HEADER_BYTES:
            raise QzoError(f"{file} has a header of {size:,} bytes, more than any real one; copy or download it again")
        return data.read(size).count(b'"data_offsets"')
