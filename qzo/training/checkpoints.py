"""Checkpoints of QZOTrainer: whole or absent, and sealed, so that damage shows before anything is taken from one.

A checkpoint is made in a hidden folder beside its place, its files are hashed into `qzo_seal.json`, all of it is
synced, and then renamed. So whatever stops a save, a folder `checkpoint-N` is whole, or an older version wrote it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qzo.durable import read_tensors, sync
from qzo.errors import QzoError
from qzo.regular import check_regular

TRAINED = "trained.safetensors"  # the live tensors
STATE = "trainer_state.json"  # Trainer's, as these two
OPTIMIZER = "optimizer.pt"
PREFIX = "checkpoint-"
SEAL = "qzo_seal.json"
READ = (TRAINED, STATE, OPTIMIZER, SEAL)
SAVING = ".saving"  # folder in which a checkpoint is made
MOST_MIB = 64  # of a seal or a state, which holds all that was logged
CUT_SHORT = "its writing was cut short"
Fits = Callable[[Path, dict[str, Any]], str | None]


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the seal of a checkpoint: `about`, the time, SHA-256 of every file, and SHA-256 of all this."""
    files = {str(file.relative_to(folder)): _hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    content = {"version": 1, **about, "written": time.time_ns(), "files": files}
    text = json.dumps({**content, "seal": _seal_of(content)}, indent=2) + "\n"
    (folder / SEAL).write_text(text, encoding="utf-8")


def check(folder: Path, to_resume: bool = True) -> dict[str, Any]:
    """What the seal of a checkpoint says, after every file was held to it.

    {} for a checkpoint of an older version, which has none: of that only the files are looked for, and its tensors
    read. `to_resume`: False asks for the trained tensors alone. Raises QzoError, with the file, where it is not whole.
    """
    if not folder.is_dir():
        raise QzoError(f"{folder} is not a folder; give a checkpoint-N of a QZOTrainer")
    for file in sorted(folder.iterdir()):  # transformers opens some, too
        if not file.is_dir() or file.name in READ:
            check_regular(file)
    if not (folder / SEAL).is_file():
        _check_unsealed(folder, to_resume)
        return {}
    content = _read_seal(folder)
    if content.pop("seal", None) != _seal_of(content):
        raise QzoError(f"{folder / SEAL} is damaged; take another checkpoint")
    for name, digest in content["files"].items():
        file = folder / name
        if not file.is_file():
            raise QzoError(f"{folder} lacks {name}; take another checkpoint")
        if _hash(file) != digest:
            raise QzoError(f"{file} is damaged: it is not what was written; take another checkpoint")
    return content


def _check_unsealed(folder: Path, to_resume: bool) -> None:
    """Raise QzoError where a checkpoint without a seal is not whole, as far as that can be seen."""
    if (folder / TRAINED).is_file() and read_tensors(folder / TRAINED)[1].get("whole"):
        raise QzoError(f"{folder} lacks {SEAL}; take another checkpoint")
    if not to_resume:
        return
    weights = [TRAINED, "model.safetensors", "model.safetensors.index.json"]
    wanted = [STATE] if any((folder / name).is_file() for name in weights) else [TRAINED]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise QzoError(f"{folder} lacks {missing[0]}: {CUT_SHORT}; take another checkpoint")
    check_regular(folder / STATE, MOST_MIB)
    try:
        json.loads((folder / STATE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{folder / STATE} is damaged; take another checkpoint") from error


def read_trained(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The trained tensors of a checkpoint, and which model they belong to. Raises QzoError for damage."""
    check(folder, to_resume=False)
    return read_tensors(folder / TRAINED)


def newest(folder: Path, fits: Fits) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in a Trainer's folder, and why newer ones were passed over; None where there is none.

    Newest is what was written last: after a resume from an older one, what that run writes counts. `fits` tells, from a
    checkpoint and its seal, why it cannot be taken, or None.
    """
    notices: list[str] = []
    for place in reversed(listed(folder)):
        try:
            reason = fits(place, check(place))
        except QzoError as error:
            reason = str(error)
        if reason is None:
            return place, notices
        notices.append(f"{place} was passed over: {reason}")
    return None, notices


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, from the first to the last written."""
    found = [place for place in folder.glob(f"{PREFIX}*") if place.is_dir() and place.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=lambda place: (_written(place), step_of(place)))


def step_of(place: Path) -> int:
    """N of a checkpoint-N; 0 for a folder of another name."""
    number = place.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else 0


def publish(made: Path, place: Path) -> None:
    """Put a checkpoint that was made elsewhere into its place, which may be taken by an older one."""
    for path in [*made.rglob("*"), made]:
        sync(path)
    old = place.with_name(f".{place.name}.old")
    if place.exists():
        remove(old)
        os.replace(place, old)
    os.replace(made, place)
    sync(place.parent)
    remove(old)


def remove(place: Path) -> None:
    """Remove a folder so that no part of it is ever found under its name."""
    if place.exists():
        gone = place.with_name(f".{place.name.removeprefix('.')}.gone")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(place, gone)
        shutil.rmtree(gone, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; never the last one written, nor the best."""
    found = listed(folder)
    if not limit or limit <= 0 or not found:
        return
    kept = {found[-1].name, *([Path(best).name] if best else [])}
    surplus = len(found) - max(limit, len(kept))
    for place in [place for place in found if place.name not in kept][: max(0, surplus)]:
        remove(place)


def tidy(folder: Path) -> None:
    """Clean up what a killed save left: half-made folders go, one that was about to be replaced comes back."""
    for old in folder.glob(f".{PREFIX}*.old"):
        place = folder / old.name[1 : -len(".old")]
        if place.exists():
            remove(old)
        else:
            os.replace(old, place)
    for left in (folder / SAVING, *folder.glob(".*.gone"), *folder.glob(".model*.part"), *folder.glob("..model*.part")):
        shutil.rmtree(left, ignore_errors=True)


def _written(place: Path) -> int:
    """When a checkpoint was sealed, in nanoseconds; 0 for one of an older version."""
    try:
        return int(_read_seal(place)["written"])
    except (OSError, QzoError, KeyError, ValueError, TypeError):
        return 0


def _read_seal(folder: Path) -> dict[str, Any]:
    check_regular(folder / SEAL, MOST_MIB)
    try:
        content = json.loads((folder / SEAL).read_bytes())
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{folder / SEAL} is damaged; take another checkpoint") from error
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise QzoError(f"{folder / SEAL} is damaged; take another checkpoint")
    return content


def _seal_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
