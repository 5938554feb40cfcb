"""One row of data: its fields, and where it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError


@dataclass(frozen=True)
class Row:
    """The fields of one row, and where it stands, for errors."""

    where: str
    fields: dict[str, Any]

    def get(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """A field of this type. Raises QzoError where it is missing or something else."""
        if name not in self.fields:
            raise QzoError(
                f'{self.where} has no field "{name}"; it has {", ".join(map(str, self.fields)) or "none"}; add it'
            )
        value = self.fields[name]
        if not isinstance(value, kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise QzoError(f'{self.where}: field "{name}" is {shown(value)}; it must be of type {wanted}')
        return value

    def label(self, indices: dict[Any, int], name: str = "label") -> int:
        """The index of the row's label. Raises QzoError for one that the task does not have."""
        value = self.get(name, object)
        try:
            return indices[value]
        except (KeyError, TypeError):
            known = ", ".join(json.dumps(label) for label in indices)
            raise QzoError(
                f'{self.where}: unknown label {shown(value)} in "{name}"; it must be one of {known}'
            ) from None

    def inner(self, fields: Any, name: str) -> Row:
        """A row inside this row, e.g. a question of a passage."""
        if not isinstance(fields, dict):
            raise QzoError(f"{self.where}: {name} is {shown(fields)}; it must be a JSON object")
        return Row(f"{self.where}, {name}", fields)


def shown(value: Any) -> str:
    """A value as an error may quote it, on one line and not long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
