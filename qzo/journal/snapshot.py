"""Snapshots: what a run had become at one step, so that a resume need not replay the journal from its start.

One safetensors file beside the journal, replaced as a whole. It holds `optimizer.truth()` (masters and rule buffers for
QZO, the weights for MeZO) and names the step and the journal's running checksum there, so that it is never taken for
that of another run. A snapshot that does not fit or is damaged costs time, nothing else: the journal alone is enough.
"""

from __future__ import annotations

from pathlib import Path

from qzo.durable import replace_file
from qzo.errors import QzoError
from qzo.journal.fingerprint import digest
from qzo.journal.lines import Contents
from qzo.optim.spsa import COUNTERS, SpsaOptimizer


def snapshot_path(journal: Path) -> Path:
    """Where the snapshot of a journal is."""
    return journal.with_name(journal.name + ".safetensors")


def write_snapshot(journal: Path, optimizer: SpsaOptimizer, crc: int) -> None:
    """Replace the snapshot by the optimizer's present state; `crc` is the journal's checksum after the last step.

    Raises QzoError where it cannot be written; the old one then stays.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in optimizer.truth().items()}
    metadata = {name: str(getattr(optimizer, name)) for name in COUNTERS}
    metadata |= {"crc": f"{crc:08x}", "sha256": digest(sorted(tensors.items()))}
    replace_file(snapshot_path(journal), lambda path: save_file(tensors, path, metadata))


def load_snapshot(journal: Path, optimizer: SpsaOptimizer, contents: Contents, steps: int) -> str | None:
    """Bring the optimizer to the snapshot's step where that is at most `steps` and belongs to the journal.

    Returns why a snapshot was not used that should have fitted, else None.
    """
    from safetensors import SafetensorError, safe_open

    path = snapshot_path(journal)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            step, crc = int(metadata["steps"]), int(metadata["crc"], 16)
            if step > steps:
                return None
            if contents.crcs[step] != crc:
                return f"{path} is of another run; replaying from the start"
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(sorted(tensors.items())) != metadata["sha256"]:
            return f"{path} is damaged; replaying from the start"
        optimizer.set_truth(tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, QzoError) else str(error)
        return f"{path} cannot be used ({reason}); replaying from the start"
    for name in COUNTERS:
        setattr(optimizer, name, int(metadata[name]))
    return None
