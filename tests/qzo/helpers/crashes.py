"""Every file operation of some work as a moment at which it is killed: in a forked child, by SIGKILL, no clean-up.

    names = operations(folder, work)          # what `work()` does to files under `folder`, by name, in order
    kill_at(folder, 7, work)                  # the same, killed just before the operation names[7]
    code, text = signal_at(folder, 7, SIGTERM, work)   # sent a signal there, which the work may answer
    code, text = alive(work)                  # not killed: exit code and what it printed
    both = stopped_at(folder, 7, work, other) # stopped there while `other()` is done; code and text of each
    both = at_once(work, other)               # both at the same time

A moment lies before each operation that the interpreter sees: open for writing, mkdir, rename, link, unlink, rmdir,
truncate, fsync, os.write. Where much is written at once, by os.write, Path.write_text and write_bytes, shutil.copyfile,
torch.save and safetensors, there is one more in which half of it is written. The parent has imported what the work
needs; nothing that a child does is seen there but files.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
Work = Callable[[], Any]


class _Moments:
    """Counts moments, and dies at one of them; with a `number`, is sent that signal there, and goes on."""

    def __init__(self, folder: Path, last: int | None, record: Path | None, number: int | None = None) -> None:
        self.folder, self.last, self.count, self.number = str(folder.resolve()), last, 0, number
        self.record = None if record is None else os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.inside = False

    def at(self, name: str) -> bool:
        """A moment; returns whether the process is to die in it."""
        self.count += 1
        if self.record is not None:
            WRITE(self.record, f"{name}\n".encode())
        return self.count - 1 == self.last

    def before(self, name: str) -> None:
        if self.at(name):
            self.end()

    def end(self) -> None:
        """What happens in the moment."""
        if self.number is None:
            die()
        else:
            os.kill(os.getpid(), self.number)

    def path_of(self, place: Any) -> str | None:
        """The path of a file, or of an open one by its number, below the folder and relative to it; else None."""
        try:
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.path.abspath(place)
        except (OSError, TypeError, ValueError):
            return None
        path = os.fsdecode(path)
        return os.path.relpath(path, self.folder) if path.startswith(f"{self.folder}/") else None

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or self.inside:
            return
        if event == "open" and not (arguments[2] or 0) & WRITING:
            return
        path = self.path_of(arguments[0])
        if path is not None:
            self.before(f"{event} {path}")

    def around(self, owner: Any, name: str, place: Callable[..., Any], half: Callable[..., None]) -> None:
        """A moment before a function of `owner`, and one in which `half` of its work is done."""
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            path = self.path_of(place(*arguments, **named))
            if path is None or self.inside:
                return function(*arguments, **named)
            self.before(f"{name} {path}")
            if self.at(f"{name} {path}, half of it") and self.number is None:
                self.inside = True
                half(function, *arguments, **named)
                die()
            self.inside = name != "write"  # what it does itself is part of it
            try:
                return function(*arguments, **named)
            finally:
                self.inside = False

        setattr(owner, name, call)

    def watch(self) -> None:
        """From here on, in this process, for good."""
        sys.addaudithook(self.audit)
        fsync = os.fsync

        def synced(number: Any) -> None:
            path = self.path_of(number if isinstance(number, int) else number.fileno())
            if path is not None and not self.inside:
                self.before(f"fsync {path}")
            fsync(number)

        os.fsync = synced  # type: ignore[assignment]
        first: Callable[..., Any] = lambda path, *_, **__: path  # noqa: E731
        second: Callable[..., Any] = lambda _, path, *__, **___: path  # noqa: E731
        self.around(os, "write", first, lambda write, number, data: write(number, data[: len(data) // 2]))
        for name in ("write_text", "write_bytes"):
            self.around(
                Path, name, first, lambda write, path, data, **named: write(path, data[: len(data) // 2], **named)
            )
        self.around(shutil, "copyfile", second, lambda _, source, path: _half(path, source))
        self.around(safetensors.torch, "save_file", second, _half_safetensors)
        self.around(torch, "save", second, _half_pickle)


WRITE = os.write


def die() -> None:
    """At once, as the kernel does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def _half(path: Any, source: Any) -> None:
    data = Path(source).read_bytes()
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])


def _half_safetensors(_: Any, tensors: Any, path: Any, metadata: Any = None) -> None:
    """The library writes to a name of its own making beside the file, and renames."""
    data = safetensors.torch.save(tensors, metadata)
    with open(Path(path).parent / ".tmpHaLf01", "wb") as file:
        file.write(data[: len(data) // 2])


def _half_pickle(save: Any, content: Any, path: Any, *_: Any, **__: Any) -> None:
    save(content, path)
    os.truncate(path, os.path.getsize(path) // 2)


def _fork(work: Work, prepare: Callable[[], None], output: Path | None = None) -> int:
    """The wait status of a child that does the work."""
    return os.waitpid(_start(work, prepare, output), 0)[1]


def _start(work: Work, prepare: Callable[[], None], output: Path | None) -> int:
    """A child that does the work."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process with threads is forked: the child starts none
        child = os.fork()
    if child:
        return child
    code = 70
    try:
        torch.set_num_threads(1)
        shown = os.open(os.devnull if output is None else output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for number in (1, 2):
            os.dup2(shown, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        prepare()
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def operations(folder: Path, work: Work) -> list[str]:
    """What `work()` does to files under `folder`, in order. Raises AssertionError where it fails."""
    with tempfile.TemporaryDirectory() as place:
        record, output = Path(place, "record"), Path(place, "output")
        record.touch()
        status = _fork(work, lambda: _Moments(folder, None, record).watch(), output)
        assert status == 0, output.read_text()
        return record.read_text().splitlines()


def kill_at(folder: Path, number: int, work: Work) -> bool:
    """Do the work, killed at operation `number`, from 0; returns whether it came so far."""
    status = _fork(work, lambda: _Moments(folder, number, None).watch())
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def signal_at(folder: Path, number: int, signal_number: int, work: Work) -> tuple[int, str]:
    """Do the work, sent a signal at operation `number`; returns as `alive`. Half of a write is no such moment."""
    with tempfile.TemporaryDirectory() as place:
        moments = _Moments(folder, number, None, signal_number)
        status = _fork(work, moments.watch, Path(place, "output"))
        return os.waitstatus_to_exitcode(status), Path(place, "output").read_text(errors="replace")


def alive(work: Work) -> tuple[int, str]:
    """Do the work in a child that is not killed; returns its exit code and all that it printed."""
    with tempfile.TemporaryDirectory() as place:
        status = _fork(work, lambda: None, Path(place, "output"))
        return os.waitstatus_to_exitcode(status), Path(place, "output").read_text(errors="replace")


Ended = tuple[int, str]  # exit code of a child, and all that it printed


def stopped_at(folder: Path, number: int, work: Work, other: Work) -> tuple[Ended, Ended]:
    """Do the work in a child that is stopped at operation `number` while `other` is done from beginning to end."""
    with tempfile.TemporaryDirectory() as place:
        moments = _Moments(folder, number, None, signal.SIGSTOP)
        child = _start(work, moments.watch, Path(place, "output"))
        _, status = os.waitpid(child, os.WUNTRACED)
        second = alive(other)
        if os.WIFSTOPPED(status):
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        return (os.waitstatus_to_exitcode(status), Path(place, "output").read_text(errors="replace")), second


def at_once(*works: Work) -> list[Ended]:
    """Do works at the same time, which begin when the last of their children is there."""
    with tempfile.TemporaryDirectory() as place:
        read, write = os.pipe()

        def wait() -> None:
            os.close(write)
            os.read(read, 1)  # nothing, once the parent has closed its end

        children = [_start(work, wait, Path(place, str(number))) for number, work in enumerate(works)]
        os.close(write)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.close(read)
        texts = [Path(place, str(number)).read_text(errors="replace") for number in range(len(works))]
        return list(zip(codes, texts, strict=True))


def sample(names: list[str], most: int) -> list[int]:
    """Numbers of at most so many operations, spread evenly, the first and the last among them."""
    count = min(most, len(names))
    return sorted({round(index * (len(names) - 1) / max(1, count - 1)) for index in range(count)})
