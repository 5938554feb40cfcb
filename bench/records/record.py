"""The record: what one cell (one method on one model) leaves on disk.

A record is a plain dict, so that it is the JSON file and nothing else; `SCHEMA` says what it holds. Sizes are integer
bytes, times seconds; what the world cannot know is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError

Record = dict[str, Any]

SCHEMA_VERSION = 1
STATUSES = ("ok", "oom", "unsupported", "error")  # from best to worst: `compare` relies on the order
WORLDS = ("measured-cuda", "measured-cpu", "simulated")
ROLES = ("weights", "quantization", "gradients", "optimizer", "activations", "noise", "temporaries", "unattributed")


@dataclass(frozen=True)
class Rule:
    """What one value must be: in words for the error, and as a test."""

    words: str
    accepts: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """A value that may be null, else follows `schema`."""

    schema: Any


@dataclass(frozen=True)
class Optional:
    """A value that older records do not have, else follows `schema`."""

    schema: Any


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _one_of(*choices: Any) -> Rule:
    kind = type(choices[0])  # True == 1, but is no schema version
    return Rule(f"one of {', '.join(map(str, choices))}", lambda value: type(value) is kind and value in choices)


TEXT = Rule("a non-empty string", lambda value: isinstance(value, str) and bool(value))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
COUNT = Rule("an integer >= 0", lambda value: _is_integer(value) and value >= 0)
POSITIVE = Rule("an integer >= 1", lambda value: _is_integer(value) and value >= 1)
NUMBER = Rule("a finite number >= 0", _is_number)
LOSS = Rule("a finite number", lambda value: isinstance(value, (int, float)) and _is_number(abs(value)))
SIZES = Rule(
    "an object of integer bytes >= 0",
    lambda value: isinstance(value, dict) and all(map(COUNT.accepts, value.values())),
)
ANYTHING = Rule("anything", lambda value: True)

RECIPE = Rule(
    "an object with a name",
    lambda value: isinstance(value, dict) and isinstance(value.get("name"), str) and bool(value["name"]),
)

SCHEMA = {
    "schema_version": _one_of(SCHEMA_VERSION),
    "status": _one_of(*STATUSES),
    "message": Maybe(TEXT),  # the reason where status is not ok
    "world": _one_of(*WORLDS),
    "case": {
        "model": TEXT,
        "method": TEXT,
        "batch_size": POSITIVE,
        "seq_len": POSITIVE,
        "dtype": Maybe(TEXT),
        "attention": Maybe(TEXT),
        "gradient_checkpointing": FLAG,
        "optimizer": Maybe(TEXT),
        "quantization": Maybe(
            {"format": TEXT, "bits": NUMBER, "group_size": Maybe(POSITIVE), "offsets": Optional(_one_of("follow"))}
        ),
        "gpu": Maybe(TEXT),
        "recipe": Optional(Maybe(RECIPE)),
    },
    "parameters": {"total": Maybe(COUNT), "trainable": Maybe(COUNT)},  # null only where the cell failed
    "peak": {"allocated": Maybe(COUNT), "reserved": Maybe(COUNT), "process": Maybe(COUNT)},
    "at_peak": Maybe(dict.fromkeys(ROLES, COUNT)),  # sums to peak.allocated; null only where the cell failed
    "floor": Maybe(COUNT),
    "phases": [{"name": TEXT, "peak_allocated": COUNT}],
    "step_seconds": Maybe(NUMBER),
    "losses": Maybe([Maybe(LOSS)]),  # of each step, where it was really run; null for NaN and infinity
    "components": Maybe(SIZES),  # what the model is made of: codes, scales, embeddings, norms, ...
    "notes": [TEXT],  # what a reader of the numbers must know
    "environment": {
        **dict.fromkeys(("torch", "transformers", "python", "platform", "gpu", "driver", "commit", "dirty"), ANYTHING),
        "kernels": Optional(Maybe(_one_of("triton"))),  # of packed layers on a GPU; else PyTorch's operators
    },
}


def build_record(
    case: Mapping[str, Any],
    world: str,
    environment: Mapping[str, Any],
    *,
    total: int,
    trainable: int,
    allocated: int,
    at_peak: Mapping[str, int],
    floor: int,
    phases: Mapping[str, int],
    reserved: int | None = None,
    process: int | None = None,
    step_seconds: float | None = None,
    losses: Sequence[float] | None = None,
    components: Mapping[str, int] | None = None,
    notes: Iterable[str] = (),
) -> Record:
    """The record of a cell that ran.

    Args:
        case, environment: the keys that `SCHEMA` gives them.
        world: one of `WORLDS`.
        total, trainable: numbers of parameters.
        allocated, reserved, process: bytes at the peak; None where the world cannot know them.
        at_peak: role -> bytes; a role that is left out counts 0. They must add up to `allocated`.
        floor: bytes of codes, scales and unquantized weights.
        phases: phase -> highest allocated bytes within it, in the order of the step.
        losses: the loss of each step that was run.
        components: part of the model -> bytes.
        notes: what a reader of the numbers must know, e.g. "codes drawn at random: memory, not accuracy".

    Raises:
        QzoError: a value breaks the schema.
    """
    return validate_record(
        {
            "schema_version": SCHEMA_VERSION,
            "status": "ok",
            "message": None,
            "world": world,
            "case": dict(case),
            "parameters": {"total": total, "trainable": trainable},
            "peak": {"allocated": allocated, "reserved": reserved, "process": process},
            "at_peak": {**dict.fromkeys(ROLES, 0), **at_peak},
            "floor": floor,
            "phases": [{"name": name, "peak_allocated": nbytes} for name, nbytes in phases.items()],
            "step_seconds": step_seconds,
            "losses": None if losses is None else [loss if math.isfinite(loss) else None for loss in losses],
            "components": None if components is None else dict(components),
            "notes": list(notes),
            "environment": dict(environment),
        }
    )


def failed_record(
    case: Mapping[str, Any],
    world: str,
    environment: Mapping[str, Any],
    *,
    status: str,
    message: str,
    total: int | None = None,
    trainable: int | None = None,
    floor: int | None = None,
    notes: Iterable[str] = (),
) -> Record:
    """The record of a cell that did not finish: the reason in `message`, and None instead of every measured value.

    Raises:
        QzoError: `status` is "ok", `message` is empty, or a value breaks the schema.
    """
    if status == "ok":
        raise QzoError("status is 'ok'; give one of " + ", ".join(STATUSES[1:]))
    return validate_record(
        dict.fromkeys(SCHEMA)
        | {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "message": message,
            "world": world,
            "case": dict(case),
            "parameters": {"total": total, "trainable": trainable},
            "peak": dict.fromkeys(("allocated", "reserved", "process")),
            "floor": floor,
            "phases": [],
            "notes": list(notes),
            "environment": dict(environment),
        }
    )


def validate_record(record: Any) -> Record:
    """Check a record against `SCHEMA` and return it.

    Raises:
        QzoError: naming the field, its value and the rule that it breaks.
    """
    _check("record", record, SCHEMA)
    if record["status"] == "ok":
        needed = {f"parameters.{name}": value for name, value in record["parameters"].items()}
        needed |= {"peak.allocated": record["peak"]["allocated"]}
        needed |= {name: record[name] for name in ("at_peak", "floor")}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise QzoError(
                f"{missing[0]} is null in a record whose status is ok; give a number, only a failed cell may leave it "
                "out"
            )
        total, allocated = sum(record["at_peak"].values()), record["peak"]["allocated"]
        if total != allocated:
            raise QzoError(f"at_peak sums to {total}, but peak.allocated is {allocated}; they must agree to the byte")
        return record
    if record["message"] is None:
        raise QzoError(f"message is null in a record whose status is {record['status']}; give the reason")
    measured = {f"peak.{name}": value for name, value in record["peak"].items()}
    measured |= {name: record[name] or None for name in ("at_peak", "phases", "losses")}
    measured["step_seconds"] = record["step_seconds"]
    known = [name for name, value in measured.items() if value is not None]
    if known:
        raise QzoError(
            f"{known[0]} has a value, but the status is {record['status']}; leave it null, only ok cells have "
            "measured values"
        )
    return record


def _check(name: str, value: Any, schema: Any) -> None:
    if isinstance(schema, Maybe):
        if value is not None:
            _check(name, value, schema.schema)
    elif isinstance(schema, Rule):
        if not schema.accepts(value):
            raise QzoError(f"{name} is {value!r}; must be {schema.words}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise QzoError(f"{name} is {value!r}; must be a list")
        for index, item in enumerate(value):
            _check(f"{name}[{index}]", item, schema[0])
    else:
        if not isinstance(value, dict):
            raise QzoError(f"{name} is {value!r}; must be an object with the keys {', '.join(schema)}")
        needed = {key for key, inner in schema.items() if not isinstance(inner, Optional)}
        for problem, keys in (("lacks", needed - value.keys()), ("has the unknown key", value.keys() - schema.keys())):
            if keys:
                raise QzoError(f"{name} {problem} {min(keys)!r}; give the keys {', '.join(schema)}")
        for key, inner in schema.items():
            if isinstance(inner, Optional):
                if key not in value:
                    continue
                inner = inner.schema
            _check(key if name == "record" else f"{name}.{key}", value[key], inner)
