"""What rows are, told by their fields, whose names are those of TRL's data set formats.

preference   chosen and rejected, and prompt where they do not begin with it
chat         messages
completion   prompt and completion
classes      text and label
text         text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qzo.errors import QzoError
from qzo.tasks.source.row import Row, shown


@dataclass(frozen=True)
class Kind:
    """A kind of rows: the fields it needs, those it may have, and what it is in words."""

    name: str
    needs: tuple[str, ...]
    text: str
    may_have: tuple[str, ...] = ()


PREFERENCE = Kind("preference", ("chosen", "rejected"), "pairs of a better and a worse answer", ("prompt",))
CHAT = Kind("chat", ("messages",), "conversations, of which the assistant's turns are learnt")
COMPLETION = Kind("completion", ("prompt", "completion"), "prompts with completions, which are learnt")
CLASSES = Kind("classes", ("text", "label"), "texts with labels")
TEXT = Kind("text", ("text",), "plain text, all of it learnt")
PROMPTS = Kind("prompts", ("prompt",), "prompts, whose completions a function scores")  # where there is a reward
KINDS = (PREFERENCE, CHAT, COMPLETION, CLASSES, TEXT)  # the first whose fields are there
FIELDS = tuple(dict.fromkeys(name for kind in KINDS for name in (*kind.needs, *kind.may_have)))


def kind_of(rows: Sequence[Row]) -> Kind:
    """The kind of some rows, by the fields of the first. Raises QzoError where they fit none."""
    fields = rows[0].fields
    kind = next((kind for kind in KINDS if all(name in fields for name in kind.needs)), None)
    if kind is None:
        wanted = "; ".join(" and ".join(kind.needs) for kind in KINDS)
        raise QzoError(
            f"{rows[0].where} has the fields {', '.join(map(shown, fields)) or 'none'}; needed are {wanted}. Name "
            "them by --columns, e.g. --columns prompt=question,completion=answer"
        )
    if kind is COMPLETION and "label" in fields:
        raise QzoError(
            f"{rows[0].where} has prompt, completion and label, which TRL calls unpaired preference and which is not "
            "trained here; drop the column label, or make rows with chosen and rejected"
        )
    return kind


def parse_columns(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` as {"prompt": "question", ...}. Raises QzoError."""
    columns: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        field, equals, name = (piece.strip() for piece in part.partition("="))
        if not (equals and name) or field not in FIELDS:
            raise QzoError(
                f'--columns "{part.strip()}" is not FIELD=COLUMN with a field of {", ".join(FIELDS)}: correct it'
            )
        if field in columns or name in columns.values():
            raise QzoError(f'--columns "{text}" names {field if field in columns else name} twice; name each once')
        columns[field] = name
    return columns


def renamed(rows: Iterable[Row], columns: Mapping[str, str]) -> list[Row]:
    """The rows with fields under the names that are known here. Raises QzoError for a column that is not there."""
    if not columns:
        return list(rows)
    changed = []
    for row in rows:
        missing = next((name for name in columns.values() if name not in row.fields), None)
        if missing is not None:
            raise QzoError(
                f"{row.where} has no column {shown(missing)}; it has "
                f"{', '.join(map(shown, row.fields)) or 'none'}: name one of them"
            )
        rest = {name: value for name, value in row.fields.items() if name not in columns.values()}
        changed.append(Row(row.where, {**rest, **{field: row.fields[name] for field, name in columns.items()}}))
    return changed
