"""What Trainer's state in a checkpoint must be, so that a resume computes with it: the kinds of its values, its step.

Trainer takes the file as it is, and what is wrong in it ends in a traceback some steps later.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from qzo.errors import QzoError
from qzo.quiet import quiet_libraries
from qzo.regular import check_regular
from qzo.training.checkpoints import MOST_MIB, STATE

with quiet_libraries():
    from transformers import TrainerState

CALLBACKS = "stateful_callbacks"
COUNTS = ("global_step", "train_batch_size")  # which a training always has, and resumes with
LIBRARY = "transformers."  # its callbacks keep the kinds of what they count; those of others are free


def check_state(place: Path, steps: Any = None) -> None:
    """Raise QzoError, with key and value, for a checkpoint whose state Trainer cannot go on with.

    steps: that a run had taken, as its seal says; None where that is not known.
    """
    content, hints = _read(place / STATE), get_type_hints(TrainerState)
    for key, value in content.items():
        if key not in hints:
            raise _wrong(place, key, value, "a key of another version of transformers")
        if key != CALLBACKS and not _is_of(value, hints[key]):
            raise _wrong(place, key, value, f"not of its kind, {getattr(hints[key], '__name__', hints[key])}")
    for key in COUNTS:
        if content.get(key) is None:
            raise _wrong(place, key, None, "no number")
    saved = content.get(CALLBACKS)
    if saved is not None and not (isinstance(saved, dict) and all(map(_are_states, saved.values()))):
        raise _wrong(place, CALLBACKS, saved, "no states by name")
    if steps is not None and content["global_step"] != steps:
        raise _wrong(place, "global_step", content["global_step"], f"not the {steps} that its seal says")


def check_callback(place: object, callback: Any, saved: dict[str, Any]) -> None:
    """Raise QzoError where a callback of transformers cannot take what a checkpoint holds of it."""
    if not type(callback).__module__.startswith(LIBRARY):
        return
    for part, own in callback.state().items():
        for name, value in saved.get(part, {}).items():
            has, name = own.get(name), f"{type(callback).__name__}.{name}"
            if name.rpartition(".")[2] not in own or (has is not None and not _is_of(value, _kind(has))):
                raise _wrong(place, name, value, "nothing that this callback has")


def _read(file: Path) -> dict[str, Any]:
    check_regular(file, MOST_MIB)
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{file} is damaged; take another checkpoint") from error
    if not isinstance(content, dict):
        raise QzoError(f"{file} is damaged: it holds no object; take another checkpoint")
    return content


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is one of a kind, as Trainer's annotations tell it."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_is_of(value, part) for part in get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(_is_of(each, get_args(kind)[0]) for each in value)
    if origin is dict or kind is dict:
        return isinstance(value, dict)
    if kind is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if kind is float:
        return isinstance(value, int | float)
    if kind is str:
        return isinstance(value, str) and value.isprintable()  # names of files, which are printed
    return isinstance(value, NoneType if kind is NoneType else kind)


def _kind(value: Any) -> type:
    return float if isinstance(value, int | float) else type(value)


def _are_states(saved: Any) -> bool:
    """Whether this is the state of a callback, or a list of them, for several of one class."""
    states = saved if isinstance(saved, list) else [saved]
    return all(
        isinstance(state, dict) and all(isinstance(state.get(part, {}), dict) for part in ("args", "attributes"))
        for state in states
    )


def _wrong(place: object, key: str, value: Any, reason: str) -> QzoError:
    shown = repr(value)
    shown = shown if len(shown) < 100 else f"{shown[:100]}..."
    return QzoError(f"{place}/{STATE}: {key}={shown} is {reason}; take another checkpoint")
