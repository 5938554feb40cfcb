"""A tuned model from an untuned one and a journal, without any data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from qzo.errors import QzoError
from qzo.journal.header import check_header, check_same, describe, rebuild
from qzo.journal.lines import Change, Contents, Step, read
from qzo.journal.snapshot import load_snapshot
from qzo.optim.spsa import SpsaOptimizer


def replay_steps(optimizer: SpsaOptimizer, entries: Sequence[Step | Change]) -> None:
    """Take recorded steps; lr and other options are afterwards what they were before."""
    before = [dict(group) for group in optimizer.param_groups]
    for entry in entries:
        if isinstance(entry, Change):
            for group, options in zip(optimizer.param_groups, entry.options, strict=True):
                group.update(options)
            continue
        if entry.seed != optimizer.seed:
            raise QzoError(
                f"step {entry.step} was drawn with seed {entry.seed}, the journal says {optimizer.seed}; restore it "
                "from a copy"
            )
        for group, lr in zip(optimizer.param_groups, entry.lrs, strict=True):
            group["lr"] = lr
        optimizer.replay(entry.applied)
    for group, options in zip(optimizer.param_groups, before, strict=True):
        group.update(options)


def advance(path: Path, optimizer: SpsaOptimizer, contents: Contents, steps: int) -> str | None:
    """Bring an optimizer at its start to `steps`, from the snapshot where it helps; returns a notice or None."""
    notice = load_snapshot(path, optimizer, contents, steps)
    done = contents.until(optimizer.steps)
    changes = [entry for entry in done if isinstance(entry, Change)][-1:]
    replay_steps(optimizer, [*changes, *contents.until(steps)[len(done) :]])
    return notice


def replay(model: nn.Module, path: str | os.PathLike[str], snapshot: bool = True) -> tuple[SpsaOptimizer, list[str]]:
    """Turn the untuned `model` in place into the tuned one; returns its optimizer, at the end of the journal, and
    notices (a torn last line that was dropped, a snapshot that was not used).

    Args:
        model: as loaded, of the dtype that the journal was made with and, unless its noise is Philox's, on that kind of
            device.
        path: the journal; it is not changed.
        snapshot: False replays every step even where a snapshot would save some.

    Raises QzoError for a journal of another model or of a machine with other random numbers, and for a damaged one.
    """
    path = Path(path)
    contents = read(path)
    check_header(path, contents.header)
    optimizer = rebuild(model, contents.header)
    check_same(path, contents.header, describe(model, optimizer))
    notices = [contents.notice]
    if snapshot:
        notices.append(advance(path, optimizer, contents, contents.steps))
    else:
        replay_steps(optimizer, contents.entries)
    return optimizer, [notice for notice in notices if notice]
