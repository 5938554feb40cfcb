"""Snapshots: what a run had become at one step, so that a resume need not replay the journal from its start.

One safetensors file beside the journal, replaced as a whole. It holds `optimizer.truth()` (masters and rule buffers for
QZO, the weights for MeZO) and names the step and the journal's running checksum there, so that it is never taken for
that of another run; all of it is sealed. What the journal tells too, the counters of skipped steps, is taken from
there. A snapshot that does not fit or is damaged costs time, nothing else: the journal alone is enough.
"""

from __future__ import annotations

from pathlib import Path

from qzo.durable import read_tensors, write_tensors
from qzo.journal.fingerprint import digest
from qzo.journal.lines import Contents, Step
from qzo.optim.spsa import COUNTERS, SpsaOptimizer
from qzo.regular import is_there


def snapshot_path(journal: Path) -> Path:
    """Where the snapshot of a journal is."""
    return journal.with_name(journal.name + ".safetensors")


def write_snapshot(journal: Path, optimizer: SpsaOptimizer, crc: int) -> None:
    """Replace the snapshot by the optimizer's present state; `crc` is the journal's checksum after the last step.

    Raises QzoError where it cannot be written; the old one then stays.
    """
    metadata = {name: str(getattr(optimizer, name)) for name in COUNTERS}
    write_tensors(snapshot_path(journal), optimizer.truth(), {**metadata, "crc": f"{crc:08x}"})


def load_snapshot(journal: Path, optimizer: SpsaOptimizer, contents: Contents, steps: int) -> str | None:
    """Bring the optimizer to the snapshot's step where that is at most `steps` and belongs to the journal.

    Returns why a snapshot was not used that should have fitted, else None.
    """
    path = snapshot_path(journal)
    if not is_there(path):
        return None
    try:
        tensors, metadata = read_tensors(path)
        step, crc = int(metadata["steps"]), int(metadata["crc"], 16)
        if step > steps:
            return None
        if step < 0 or contents.crcs[step] != crc:
            return f"{path} is of another run; replaying from the start"
        sha256 = metadata.get("sha256")  # of an older version, of the tensors alone
        if sha256 is not None and digest(sorted(tensors.items())) != sha256:
            return f"{path} is damaged; replaying from the start"
        optimizer.set_truth(tensors)
    except (KeyError, ValueError) as error:  # QzoError is one
        return f"{path} cannot be used ({error}); replaying from the start"
    optimizer.steps = step
    taken = [entry for entry in contents.until(step) if isinstance(entry, Step)]
    optimizer.skipped_steps = sum(not entry.applied for entry in taken)
    last = next((entry.step for entry in reversed(taken) if entry.applied), -1)
    optimizer.skipped_in_a_row = step - 1 - last
    return None
