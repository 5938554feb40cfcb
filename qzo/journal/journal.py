"""The journal: one append-only line a step, enough to rebuild the tuned model from the untuned one to the bit."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from qzo.durable import create_file, remove_leftovers
from qzo.errors import QzoError
from qzo.journal import lines
from qzo.journal.header import check_header, check_same, describe, differences
from qzo.journal.replay import advance
from qzo.journal.snapshot import snapshot_path, write_snapshot
from qzo.optim.rules import update_options
from qzo.optim.spsa import SpsaOptimizer


class Journal:
    """Records the steps of a `qzo.QZO` or `qzo.MeZO` in a file, and takes a run up again where the file ends.

        journal = qzo.Journal("run.journal", model, optimizer)     # the model as loaded, before any step
        journal.resume()                                           # 0 for a new file
        optimizer.register_step_post_hook(journal.record)          # or call journal.record() after each step

    A step killed before its line was written is taken again. With the same data for the same step number, the run then
    ends with the very scales of a run that was never stopped. Lines are written at once, so that a killed process
    loses none, and synced to the disk every `sync_every` steps, so that a power cut loses no more than these. See
    `qzo.journal.lines` for the format: about 41 bytes a step with one direction, 820 KB for 20,000 steps.

    A learning-rate scheduler is not in the journal: after `resume()`, step it `optimizer.steps` times, or restore it.

    Args:
        path: created if missing, else checked: the model's hash, the optimizer and its options must be those it was
            begun with (lr, eps and clip_threshold may change).
        model: in the state it had before the first step; hashed once, some seconds for a large one.
        optimizer: with no step taken yet.
        snapshot_every: steps between snapshots of the optimizer's state, which bound the time of a resume (see
            `qzo.journal.snapshot`); None for none.
        sync_every: steps between syncs to the disk.

    Raises:
        QzoError: a journal of another model, or damaged before its last line, or in use by another process; an
            optimizer that has taken steps already or cannot be replayed; a disk that is full.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: SpsaOptimizer,
        snapshot_every: int | None = 1000,
        sync_every: int = 20,
    ) -> None:
        for name, value in (("snapshot_every", snapshot_every), ("sync_every", sync_every)):
            if value is not None and not value >= 1:
                raise QzoError(f"{name}={value} is not positive; give 1 or more")
        if optimizer.steps:
            raise QzoError(f"the optimizer has taken {optimizer.steps} steps; open the journal before the first one")
        self.path, self.optimizer = Path(path), optimizer
        self.snapshot_every, self.sync_every = snapshot_every, sync_every
        header = describe(model, optimizer)
        if not self.path.exists():
            line, _ = lines.seal(json.dumps(header, separators=(",", ":")), 0)
            create_file(self.path, lambda partial: partial.write_bytes(line))  # another one may be quicker
        self._contents: lines.Contents | None = lines.read(self.path)
        check_header(self.path, self._contents.header)
        check_same(self.path, self._contents.header, header)
        self.steps = self._contents.steps  # recorded, the waiting ones included
        self._crc, self._end = self._contents.crcs[-1], self._contents.ends[-1]
        self._options = [_rule(group) for group in header["groups"]]
        self._waiting = b""  # lines that a full disk did not take
        self._file = self.path.open("ab", buffering=0)
        self._lock(self._contents.size)
        for name in (self.path.name, snapshot_path(self.path).name):  # what killed processes left of them
            remove_leftovers(self.path.parent, name)

    def _lock(self, size: int) -> None:
        """Keep other processes out; `size` bytes were read before, so more means that another one writes."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as older versions have it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # holds though this process reads the file, too
            about = os.fstat(self._file.fileno())
            free = about.st_size == size and os.path.samestat(about, os.stat(self.path))
        except OSError:
            free = False
        if not free:
            self._file.close()
            raise QzoError(f"{self.path} is in use by another process; wait for it, or choose another file")

    def resume(self, step: int | None = None) -> int:
        """Bring the optimizer and its tensors, to the bit, to where the journal ends, or to `step`; returns the step.

        Lines after `step` are cut off, a torn last line too, with a warning. An optimizer that stands at `step` already
        (its state dict was loaded) is left as it is. lr and other options stay the optimizer's own. Raises QzoError
        for a step that the journal does not reach, and after the first `record`.
        """
        contents = self._contents
        if contents is None:
            raise QzoError("steps were recorded already; resume() comes before them")
        step = contents.steps if step is None else step
        if not 0 <= step <= contents.steps:
            raise QzoError(
                f"{self.path} holds {contents.steps} steps; step {step} is not among them: give one of them, or 0"
            )
        if self.optimizer.steps not in (0, step):
            raise QzoError(
                f"the optimizer stands at step {self.optimizer.steps}, neither at 0 nor at {step}; make it anew, and "
                "resume before its first step"
            )
        notices = [contents.notice, *differences("the journal", contents.header)]
        if not self.optimizer.steps:
            notices.append(advance(self.path, self.optimizer, contents, step))
        for notice in filter(None, notices):
            warnings.warn(notice, stacklevel=2)
        for entry in contents.until(step):
            if isinstance(entry, lines.Change):
                self._options = entry.options
        self._go_on(contents, step)
        return step

    def _go_on(self, contents: lines.Contents, step: int) -> None:
        """Cut off what comes after `step`."""
        self.steps, self._crc, self._end = step, contents.crcs[step], contents.ends[step]
        self._file.truncate(self._end)
        os.fsync(self._file)
        self._contents = None

    def record(self, *_: Any) -> None:
        """Write the line of the step that the optimizer has just taken; fits `register_step_post_hook`.

        Raises QzoError where that step is not the next one, and where the disk is full: what is on disk then stays
        sound, and the line waits in memory for the next `record` or `close`.
        """
        last = self.optimizer.last
        if last is None or last.step != self.steps:
            found = "no new step" if last is None else f"step {last.step}"
            raise QzoError(f"{self.path} holds {self.steps} steps, and {found} was taken; resume() first, record each")
        if self._contents is not None:
            self._go_on(self._contents, self.steps)
        options = [_rule(group) for group in last.options]
        if options != self._options:
            self._append(lines.write_change(options))
            self._options = options
        rates = tuple(float(group["lr"]) for group in last.options)
        self._append(lines.write_step(lines.Step(last.step, last.seed, last.applied, rates)))
        self.steps += 1
        self._flush()
        snapshot = self.snapshot_every is not None and self.steps % self.snapshot_every == 0
        if snapshot or self.steps % self.sync_every == 0:
            self.sync()
        if snapshot:
            write_snapshot(self.path, self.optimizer, self._crc)

    def _append(self, text: str) -> None:
        line, self._crc = lines.seal(text, self._crc)
        self._waiting += line

    def _flush(self) -> None:
        try:
            written = os.fstat(self._file.fileno()).st_size - self._end  # by a try that a signal ended
            while written < len(self._waiting):
                written += os.write(self._file.fileno(), self._waiting[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)  # no half line
            count = self._waiting.count(b"\n")
            raise QzoError(
                f"{self.path} could not be written: {error.strerror}; the steps before are safe on disk, "
                f"{count} line(s) wait in memory; free some space, then go on or resume"
            ) from error
        self._end += len(self._waiting)
        self._waiting = b""

    @property
    def checksum(self) -> str:
        """Of all lines up to the last step, in 8 hex digits."""
        return f"{self._crc:08x}"

    def sync(self) -> None:
        """Have all lines on the disk. Raises QzoError."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise QzoError(f"{self.path} could not be synced: {error.strerror}; check the disk, then resume") from error

    def close(self) -> None:
        """Write what waits, sync, and release the file. Raises QzoError where the disk is full."""
        if self._file.closed:
            return
        try:
            self._flush()
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rule(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group that make an update, but lr, as JSON holds them."""
    options = {name: value for name, value in update_options(group).items() if name != "lr"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
