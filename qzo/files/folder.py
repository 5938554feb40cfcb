"""The files of a model's folder: where they are, what they are called, and nothing that could run code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qzo.errors import QzoError
from qzo.files.bounds import (
    MOST_TENSORS,
    AmbiguousKey,
    check_file,
    check_header,
    check_json,
    check_numbers,
    said_once,
)

WEIGHTS = "model.safetensors"
INDEX = ".index.json"  # behind the name of the weights
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a hub id, at a branch, tag or commit.

    Raises QzoError for what looks like a path, and where there is no such id.
    """
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).exists():
        raise QzoError(f"{name} is not a folder; give a folder with config.json, a .gguf file or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # network, authorization, unknown name
        raise QzoError(
            f"{name} is neither a folder nor on the hub: {one_line(error)}; check the name, or download it first"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, those that an index names, or one of whatever name.

    An index may have a name of its own (AutoGPTQ: gptq_model-4bit-128g.safetensors.index.json); one of pickles, left
    over from another form of the model, counts for nothing. Raises QzoError where there are no such files, for pickles
    too, and for an index that names other files.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    indices = sorted(folder.glob(f"*.safetensors{INDEX}"))
    index = folder / f"{WEIGHTS}{INDEX}"
    if index not in indices and len(indices) == 1:
        index = indices[0]
    if index in indices:
        return _indexed(index)
    if len(files) == 1:
        return files
    if files:
        raise QzoError(
            f"{folder} has {len(files)} safetensors files ({files[0].name}, ...) and not one index that names those of "
            f"the model; add {WEIGHTS}{INDEX}, or leave only the files of one model"
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise QzoError(
            f"{folder / pickles[0]} is a pickle, which can run code; only safetensors files are read: "
            "convert it with the software that wrote it"
        )
    raise QzoError(
        f"{folder} has no {WEIGHTS} and no {WEIGHTS}{INDEX}; only safetensors files are read: download the weights too"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises QzoError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise QzoError(f"{index} has no weight_map, which says what file a tensor is in; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise QzoError(f"{index} names {name}, which is not a file in that folder; download it too")
        if not name.endswith(".safetensors"):
            raise QzoError(f"{index} names {name}; only safetensors files are read: convert them, or remove the index")
    return [index.parent / name for name in names]


class Header(NamedTuple):
    """What a safetensors file says of a tensor; `dtype` in its words, e.g. "F16", "BF16", "I32"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        bits = re.search(r"\d+", self.dtype)  # none in BOOL
        return self.numel * int(bits[0] if bits else 8) // 8


def headers_in(files: list[Path]) -> dict[str, Header]:
    """Name -> header of every tensor of some safetensors files; no data is read.

    Raises QzoError for a damaged file, one with more tensors than any real checkpoint, and a tensor in two files.
    """
    count = sum(check_header(file) for file in files)
    if count > MOST_TENSORS:
        raise QzoError(
            f"{files[0].parent} has {count:,} tensors; no real checkpoint has more than {MOST_TENSORS:,}: copy or "
            "download it again"
        )
    headers: dict[str, Header] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in headers:
                    raise QzoError(f"{file} has {name}, as {headers[name].file.name} has; convert the model again")
                part = tensors.get_slice(name)
                headers[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
    return headers


def read_tensors_of(file: Path, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other. Raises QzoError for a damaged file."""
    with opened(file, device) as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


@contextmanager
def opened(file: Path, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file as `safe_open` gives it. Raises QzoError for a damaged one."""
    from safetensors import SafetensorError, safe_open

    check_file(file)
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise QzoError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises QzoError where there is none, and for one beyond the bounds of `bounds.py`."""
    check_file(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QzoError(f"{file} cannot be read: {one_line(error)}; copy or download it again") from error
    check_json(file, text)
    try:
        content = json.loads(text, object_pairs_hook=said_once)
    except AmbiguousKey as error:
        raise QzoError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{file} cannot be read: {one_line(error)}; copy or download it again") from error
    if not isinstance(content, dict):
        raise QzoError(f"{file} does not hold a JSON object; copy or download it again")
    check_numbers(file, content)
    return content


def one_line(error: BaseException) -> str:
    """The first line of an exception's message, with the next one where it announces that; its kind for no message."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
