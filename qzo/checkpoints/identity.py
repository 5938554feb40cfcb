"""Which model a run was begun on: where it lay, and a hash of all that its files hold.

Tuned scales mean something with the codes they were tuned with, and with no others. So whatever keeps tuned tensors
without their model (a run, a checkpoint of QZOTrainer, a journal) keeps these two words, `model` and `base`, and
whoever puts tensors and model together again asks `check_base` first. A model may move: the hash decides, not the path.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from qzo.errors import QzoError
from qzo.files.folder import PICKLES, download, one_line, weight_files
from qzo.files.settings import is_gguf, source_of
from qzo.formats.layer import Quantized
from qzo.formats.table import find
from qzo.models.origin import origin_of

MODEL, BASE = "model", "base"  # keys: absolute path or hub id; SHA-256
PIECE = 2**24  # bytes read at a time
MOST_HEADER = 100_000_000  # bytes that a safetensors header may have, as the library has it


class _Part(NamedTuple):
    """Some bytes of a file, and what they are called."""

    title: str
    file: Path
    start: int
    end: int


def base_identity(model: nn.Module | str | os.PathLike[str]) -> dict[str, str]:
    """{"model": absolute path or hub id, "base": SHA-256} of a model's files; without "base" where there are none.

    Every tensor counts with its name, dtype, shape and bytes, and what config.json says of the quantizer; how tensors
    are spread over files, and all else of the configuration, does not. Reads all weights once: a second for some GB.

    Args:
        model: a path or hub id, or a model that `qzo.load` made, which knows where it is from.

    Raises QzoError for files that cannot be read.
    """
    if isinstance(model, nn.Module):
        origin = origin_of(model)
        place = place_of(getattr(model, "name_or_path", "") or "" if origin is None else origin.path)
    else:
        place = place_of(model)
    if isinstance(model, nn.Module) and not (place and _is_of(model, Path(place))):
        return {MODEL: place}
    return {MODEL: place, BASE: content_hash(_lying(place))}


def _is_of(model: nn.Module, path: Path) -> bool:
    """Whether a model has what files at a place hold, rather than having been made or quantized in memory."""
    if not path.exists() or (path.is_dir() and not (path / "config.json").is_file()):
        return False
    if not any(isinstance(module, Quantized) for module in model.modules()):
        return True
    origin = origin_of(model)
    return find(source_of(path)) is not None if origin is None else origin.packed


def place_of(source: str | os.PathLike[str]) -> str:
    """A path made absolute, so that it means the same from every folder; a hub id as it is."""
    return str(Path(source).resolve()) if str(source) and Path(source).exists() else str(source)


def _lying(place: str) -> Path:
    return Path(place) if Path(place).exists() else download(place)


def check_base(owner: str | os.PathLike[str], saved: Mapping[str, Any], model: str | None = None) -> str:
    """Where the model lies that `owner` was begun on: at `model` if that is given, else where it lay then.

    Args:
        owner: run, checkpoint or journal, for the message.
        saved: with "model" and "base", as `base_identity` gave them; a "base" that is missing (of an older version) is
            not checked.
        model: path or hub id of the user's, where the model moved.

    Raises QzoError where nothing lies there any more, or another model than the one it was begun on.
    """
    begun = saved.get(MODEL)
    if model is None and (not isinstance(begun, str) or not begun):
        raise QzoError(f"{owner} does not say which model it was begun on; name it: --model PATH (model= in Python)")
    place = place_of(str(begun) if model is None else model)
    if model is None and (os.path.isabs(place) or is_gguf(place)) and not Path(place).exists():
        raise QzoError(
            f"{owner} was begun on {place}, which is not there any more; name the place it moved to: --model PATH "
            "(model= in Python)"
        )
    if saved.get(BASE) is None:
        return place
    found = content_hash(_lying(place))
    if found != saved[BASE]:
        now = "what lies there now is another model" if model is None else f"{place} is another model"
        raise QzoError(
            f"{owner} was begun on {begun} with the content {str(saved[BASE])[:12]}, and {now} ({found[:12]}); tuned "
            "tensors fit the model they were tuned on alone: name that one, --model PATH (model= in Python)"
        )
    return place


def content_hash(path: Path) -> str:
    """SHA-256 of what a model's weights are, see `base_identity`. Raises QzoError for files that cannot be read."""
    if path.is_dir():
        source = source_of(path)
        settings, files = source.settings, _weights(path)
    else:
        settings, files = None, [path]
    try:
        parts = sorted(part for file in files for part in _parts(file))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
            digests = list(pool.map(_digest, parts))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QzoError(f"the weights of {path} cannot be read: {one_line(error)}; copy or download it again") from error
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part, digest in zip(parts, digests, strict=True):
        total.update(f"\n{part.title} {digest}".encode())
    return total.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The files that `qzo.load` reads tensors from."""
    try:
        return weight_files(folder)
    except QzoError:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES and file.is_file())
        if not pickles:
            raise
        return pickles


def _parts(file: Path) -> Iterator[_Part]:
    """The tensors of a safetensors file; any other file is one part."""
    if not file.is_file():
        raise ValueError(f"{file.name} is no regular file")
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        yield _Part(file.suffix, file, 0, size)
        return
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(f"{file.name} has a header of {length} bytes")
        header = json.loads(opened.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            first, last = (8 + length + int(offset) for offset in about["data_offsets"])
            if not 8 + length <= first <= last <= size:
                raise ValueError(f"{file.name} ends before {name!r}")
            yield _Part(json.dumps([name, about["dtype"], about["shape"]]), file, first, last)


def _digest(part: _Part) -> str:
    digest, left = hashlib.sha256(), part.end - part.start
    with part.file.open("rb", buffering=0) as file:
        file.seek(part.start)
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise ValueError(f"{part.file.name} ended while it was read")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
