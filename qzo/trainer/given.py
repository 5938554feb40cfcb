"""Rows that a user hands to a trainer: any data set, and any iterable of dictionaries, as rows with a place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

from qzo.errors import QzoError, is_failure
from qzo.files.folder import one_line
from qzo.tasks.source.row import Row, shown

Formatting = Callable[[dict[str, Any]], str]
READY = ("input_ids", "inputs_embeds")  # fields of rows that are encoded already


def is_raw(dataset: Any) -> bool:
    """Whether the first row of a data set is a dictionary without tokens; only that row is read."""
    first = _first(dataset)
    return isinstance(first, Mapping) and not any(name in first for name in READY)


def _first(dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, Sized) and hasattr(dataset, "__getitem__"):
        return dataset[0] if len(dataset) else None
    return next(iter(dataset), None) if isinstance(dataset, Iterable) and not hasattr(dataset, "__next__") else None


def rows_of(dataset: Any, name: str, formatting_func: Formatting | None = None) -> list[Row]:
    """The rows of a data set, numbered from 1; numbers of a class become its names, as `datasets` knows them.

    Args:
        dataset: a list of dictionaries, a `datasets.Dataset`, or another data set with a length.
        name: of the argument, for errors.
        formatting_func: row -> the text that stands for it; None, rows are taken as they are.

    Raises QzoError for a stream without a length, a row that is no dictionary, and a formatting_func that fails.
    """
    if not isinstance(dataset, Sized):
        raise QzoError(
            f"{name} is a {type(dataset).__name__} without a length, and its rows are encoded before the first step; "
            "give a part of it: list(dataset.take(10_000))"
        )
    classes = _class_names(dataset)
    rows: Iterable[Any] = (dataset[number] for number in range(len(dataset)))  # type: ignore[index]
    found = [_row(fields, f"{name}, row {number}", classes) for number, fields in enumerate(rows, 1)]
    return found if formatting_func is None else [_formatted(row, formatting_func) for row in found]


def _row(fields: Any, where: str, classes: dict[str, list[str]]) -> Row:
    if not isinstance(fields, Mapping):
        raise QzoError(f"{where} is {shown(fields)}; it must be a dictionary, as the first row is")
    return Row(where, {name: _named(value, classes.get(name)) for name, value in fields.items()})


def _class_names(dataset: Any) -> dict[str, list[str]]:
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return {}
    return {name: feature.names for name, feature in features.items() if isinstance(getattr(feature, "names", 0), list)}


def _named(value: Any, names: list[str] | None) -> Any:
    return names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value


def _formatted(row: Row, formatting_func: Formatting) -> Row:
    try:
        text: Any = formatting_func(row.fields)
    except BaseException as error:  # it is the user's own
        if not is_failure(error):
            raise
        raise QzoError(
            f"{row.where}: formatting_func raises {type(error).__name__}: {one_line(error)}; correct it, or the row"
        ) from error
    if not isinstance(text, str):
        raise QzoError(f"{row.where}: formatting_func returns {shown(text)}; it must return the text of one row")
    return Row(row.where, {"text": text})
