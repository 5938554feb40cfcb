"""Files that are whole or absent, whatever happens while they are written.

Everything is made in a folder of its own beside its place, `.NAME.RANDOM.part`, synced, and renamed. Such a folder is
locked by who writes there; one that is not is what a killed process left, and the next writer of that NAME removes it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qzo.errors import QzoError
from qzo.regular import check_regular

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "seal"  # of a safetensors file: hash of all its tensors and of all else in its metadata
_HAD: set[tuple[int, int, int]] = set()  # folders that a process has locked: its id, their device and number
MARK = "sealed"  # there is a seal: should that key itself be damaged, the file does not pass for one that never had it


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file of the same name in a folder beside `path`, sync it, and rename it to `path`.

    Raises QzoError where the disk is full or refuses; `path` then is what it was.
    """
    _make(path, write, os.replace)


def create_file(path: Path, write: Callable[[Path], object]) -> None:
    """As `replace_file` where nothing is at `path`; where something is, even since a moment ago, that stays."""
    _make(path, write, _link)


def _make(path: Path, write: Callable[[Path], object], put: Callable[[Path, Path], object]) -> None:
    try:
        with _beside(path) as folder:
            partial = folder / path.name
            write(partial)
            partial.chmod(folder.stat().st_mode & 0o666)  # as the umask has it: safetensors makes it private
            sync(partial)
            put(partial, path)
            sync(path.parent)
    except Exception as error:  # OSError, or what a library makes of it
        raise QzoError(
            f"{path} could not be written: {reason(error)}; what was there is unchanged; make room or choose "
            "another place"
        ) from error


def _link(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path, follow_symlinks=False)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
            raise
        if not path.exists():  # of a file system without links
            os.replace(partial, path)


def whole_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `out`, sync it, and rename it to `out`; on any error nothing is left.

    Files get the permissions that the umask gives. Where `out` is a link to an empty folder, that one is filled.
    """
    check_target(out)
    place = out.resolve()
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _beside(place) as partial:
            write(partial)
            mode = partial.stat().st_mode & 0o666
            for file in sorted(partial.rglob("*")):
                if file.is_file():
                    file.chmod(mode)
                sync(file)
            sync(partial)
            os.replace(partial, place)
            sync(place.parent)
    except BaseException as error:
        for parent in missing:
            with suppress(OSError):  # not empty: others work there
                parent.rmdir()
        if isinstance(error, QzoError) or not isinstance(error, Exception):
            raise
        raise QzoError(
            f"{out} could not be written: {reason(error)}; nothing of it is left: free some space, or choose another "
            "place"
        ) from error


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A folder of our own beside `path`, locked while it is used and gone afterwards, as what killed ones left is."""
    remove_leftovers(path.parent, path.name)
    folder, lock = _own_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _own_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = path.parent / f".{path.name}.{secrets.token_hex(6)}.part"
        folder.mkdir()  # fails where there is anything, a link too
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                return folder, lock
            os.close(lock)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of a file or folder `name`, of this or an older version, left in `folder`."""
    pattern = re.compile(".*" if name == "*" else re.escape(name))
    with suppress(OSError):
        for place in list(folder.iterdir()):
            of = re.fullmatch(r"\.(.+?)(?:\.[0-9a-f]{12}|\.\d+)?\.part", place.name)
            if of and pattern.fullmatch(of[1]) and not place.is_symlink():
                _remove_unless_locked(place)


def _remove_unless_locked(place: Path) -> None:
    with suppress(OSError):  # gone meanwhile, or another's
        lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISDIR(os.fstat(lock).st_mode):
                shutil.rmtree(place, ignore_errors=True)
            elif stat.S_ISREG(os.fstat(lock).st_mode):
                place.unlink()
        finally:
            os.close(lock)


def lock(folder: Path) -> int:
    """Have a folder for this process until the number that is returned, of the open folder, is closed.

    Raises QzoError where another one has it.
    """
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise QzoError(f"{folder} cannot be opened as a folder: {error.strerror}; choose another") from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(number)
        raise QzoError(f"{folder} is in use by another process; wait for it, or choose another folder") from error
    except OSError:  # a file system without locks
        pass
    return number


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for this process meanwhile, which may have it already. Raises QzoError where another one has it."""
    about = os.stat(folder)
    key = (os.getpid(), about.st_dev, about.st_ino)  # a forked child has not what its parent has
    if key in _HAD:
        yield
        return
    number = lock(folder)
    _HAD.add(key)
    try:
        yield
    finally:
        _HAD.discard(key)
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)  # workers that load data may have it open for longer
        os.close(number)


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)


def sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def check_target(folder: Path) -> None:
    """Raise QzoError unless a checkpoint may be written to `folder`."""
    try:
        place = folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError until Python 3.13: links in a circle
        raise QzoError(f"{folder} cannot be written, its path is links in a circle; choose another place") from error
    except ValueError as error:
        raise QzoError(f"{folder} cannot be written, no file can have that name: {error}; choose another") from error
    if folder.is_symlink() and not folder.exists():
        raise QzoError(f"{folder} is a link to {folder.readlink()}, where nothing is; name the folder itself")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise QzoError(f"{folder} exists and is not an empty folder; choose another, or remove it")
    there = next(parent for parent in place.parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise QzoError(f"{folder} cannot be written, {there} does not allow it; choose another place")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises QzoError where it cannot be read, or its seal does not fit.

    A file without a seal, of an older version, is taken as it is.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise QzoError(f"{path} cannot be read: {reason(error)}; restore it from a copy") from error
    sealed = metadata.pop(SEAL, None)
    if (sealed is not None or MARK in metadata) and sealed != seal(tensors, metadata):
        raise QzoError(f"{path} is damaged, its seal does not fit what it holds; restore it from a copy")
    metadata.pop(MARK, None)
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file as a whole, sealed by a hash of all that is in it; the old one stays on any error.

    Raises QzoError where it cannot be written.
    """
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    marked = {**metadata, MARK: "1"}
    sealed = {**marked, SEAL: seal(whole, marked)}

    def write(partial: Path) -> None:
        save_file(whole, partial, sealed)
        _put_in_order(partial)

    replace_file(path, write)


def _put_in_order(file: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in any order: same content, same bytes."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            opened.seek(8)
            opened.write(text)


def seal(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of named tensors and metadata. Extra memory: one tensor at a time where it is not on the CPU."""
    import torch

    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
