"""Configurations of PEFT methods: from an adapter_config.json, or key by key; checked before anything is built."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

KIND = "peft_type"
TASK = "CAUSAL_LM"
NAMES = ("target_modules", "modules_to_save", "exclude_modules", "feedforward_modules")  # of layers, or a regex
ALL_LINEAR = "all-linear"
REGEX = set("[](){}|*+?\\^$")
# Of a saved adapter: where it came from and what it is for, not how it is trained.
NOT_OF_TRAINING = (
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type", KIND,
)  # fmt: skip


def read_peft_config(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Class and options of an adapter_config.json. Raises QzoError naming what is wrong with the file."""
    try:
        stated = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QzoError(f"cannot read {path}: {error.strerror}; name another file") from error
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{path} is no JSON: {' '.join(str(error).split())[:100]}; correct it") from error
    if not isinstance(stated, dict) or not isinstance(stated.get(KIND), str):
        raise QzoError(f"{path} has no {KIND}; give the adapter_config.json of a PEFT method")
    with quiet_libraries():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    known = {str(getattr(kind, "value", kind)): found.__name__ for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = known.get(stated[KIND].upper())
    if name is None:
        near = difflib.get_close_matches(stated[KIND].upper(), known, n=3, cutoff=0.4)
        raise QzoError(
            f"{path}: {KIND} {stated[KIND]!r} is unknown to the installed PEFT; nearest: {', '.join(near)}; choose one"
        )
    given = {key: value for key, value in stated.items() if key not in NOT_OF_TRAINING and value is not None}
    return name, checked(name, given, str(path))


@cache
def known_keys(peft_class: str) -> tuple[str, ...]:
    """Options of a PEFT configuration class."""
    return tuple(name for name in _kinds(peft_class) if name not in NOT_OF_TRAINING)


def checked(peft_class: str, options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options with the task of a language model. Raises QzoError for one that the class does not have or take."""
    kinds = _kinds(peft_class)
    for key, value in options.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=3, cutoff=0.5)
            raise QzoError(f"{source}: {peft_class} has no {key}; choose another, such as {', '.join(near) or 'r'}")
        _check_kind(source, key, value, kinds[key])
    found = dict(options) | {"task_type": TASK}
    for key in NAMES:
        if isinstance(found.get(key), str) and found[key] != ALL_LINEAR and not REGEX & set(found[key]):
            found[key] = [name.strip() for name in found[key].split(",")]
    import peft

    try:
        with quiet_libraries():
            getattr(peft, peft_class)(**found)
    except Exception as error:
        raise QzoError(
            f"{source}: {peft_class} refuses this: {' '.join(str(error).split())[:200]}; correct it"
        ) from error
    return found


def _check_kind(source: str, key: str, value: Any, kind: str) -> None:
    """PEFT checks few types itself: where the annotation is a plain one, the value must be of it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "bool" and not isinstance(value, bool):
        raise QzoError(f"{source}: {key}={value!r} must be true or false")
    if kind == "int" and not (number and value == int(value) and value >= (1 if key == "r" else 0)):
        raise QzoError(f"{source}: {key}={value!r} must be a whole number{' from 1 on' if key == 'r' else ''}")
    if kind == "float" and not (number and 0 <= value < float("inf")):
        raise QzoError(f"{source}: {key}={value!r} must be a number from 0 on")


@cache
def _kinds(peft_class: str) -> dict[str, str]:
    """Option -> its annotation."""
    with quiet_libraries():
        import peft
    options = [option for option in dataclasses.fields(getattr(peft, peft_class)) if option.init]
    return {option.name: getattr(option.type, "__name__", str(option.type)) for option in options}
