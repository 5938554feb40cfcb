"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qzo.errors import QzoError

if TYPE_CHECKING:
    from torch import Tensor


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name beside `path`, sync it, and rename it to `path`.

    Raises QzoError where the disk is full or refuses; `path` then is what it was.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except Exception as error:  # OSError, or what a library makes of it
        partial.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise QzoError(f"{path} could not be written: {reason}; what was there is unchanged") from error


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_target(folder: Path) -> None:
    """Raise QzoError unless a checkpoint may be written to `folder`."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise QzoError(f"{folder} exists and is not an empty folder; choose another, or remove it")


def whole_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `out`, sync it, and rename it to `out`; on any error nothing is left."""
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        write(partial)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, QzoError) or not isinstance(error, Exception):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise QzoError(f"{out} could not be written: {reason}; nothing of it is left") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises QzoError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QzoError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file as a whole. Raises QzoError where it cannot be written; the old one then stays."""
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda partial: save_file(whole, partial, metadata))
