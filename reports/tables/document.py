"""The whole report as data: title, headline, what was run, tables; and its Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.records import Record, method_of, world_of
from reports.tables.breakdown import roles_table, totals_table
from reports.tables.cards import cards_table
from reports.tables.headline import headline
from reports.tables.published import published_table
from reports.tables.reduction import reduction_table
from reports.tables.sizes import NOT_KNOWN
from reports.tables.table import Table

VERSIONS = ("torch", "transformers", "python", "driver")


@dataclass(frozen=True)
class Document:
    """A report, ready to be shown."""

    title: str
    setting: str
    headline: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    tables: Sequence[Table]


def build(records: Sequence[Record]) -> Document:
    """The report on the records of one folder."""
    tables = [roles_table(records), totals_table(records), reduction_table(records), cards_table(records)]
    published = published_table(records)
    facts = {name: _shared(records, get) for name, get in FACTS.items()}
    models = " and ".join(dict.fromkeys(record["case"]["model"] for record in records))
    return Document(
        title=f"{models}: where the memory of fine-tuning goes",
        setting=f"batch {facts['batch']}, {facts['tokens a sequence']} tokens, {facts['world and GPU']}",
        headline=headline(records),
        facts=list(facts.items()),
        notes=_notes(records),
        tables=[*tables, *([published] if published else [])],
    )


def to_markdown(document: Document) -> str:
    """The report as one Markdown text."""
    facts = [f"- {name}: {value}" for name, value in document.facts]
    notes = [f"- {note}" for note in document.notes]
    head = [f"# {document.title}", document.headline, "\n".join([*facts, *notes])]
    return "\n\n".join(part for part in [*head, *(table.to_markdown() for table in document.tables)] if part)


def _parameters(record: Record) -> str:
    total = record["parameters"]["total"]
    return NOT_KNOWN if total is None else f"{total:,}"


def _versions(record: Record) -> str:
    environment = record["environment"]
    parts = [f"{name} {environment[name]}" for name in VERSIONS if environment[name]]
    if environment["commit"]:
        parts.append(f"commit {environment['commit'][:12]}{' with changes' if environment['dirty'] else ''}")
    return ", ".join(parts) or NOT_KNOWN


FACTS: dict[str, Callable[[Record], str]] = {
    "model": lambda record: str(record["case"]["model"]),
    "parameters": _parameters,
    "batch": lambda record: str(record["case"]["batch_size"]),
    "tokens a sequence": lambda record: str(record["case"]["seq_len"]),
    "dtype": lambda record: record["case"]["dtype"] or NOT_KNOWN,
    "attention": lambda record: record["case"]["attention"] or NOT_KNOWN,
    "gradient checkpointing": lambda record: "on" if record["case"]["gradient_checkpointing"] else "off",
    "world and GPU": world_of,
    "platform": lambda record: record["environment"]["platform"] or NOT_KNOWN,
    "versions": _versions,
}


def _shared(records: Sequence[Record], get: Callable[[Record], str]) -> str:
    """The value that most records have, then each other known value with the methods that have it."""
    values = {method_of(record): get(record) for record in records}
    values = {method: value for method, value in values.items() if value != NOT_KNOWN} or values
    ranked = [value for value, _ in Counter(values.values()).most_common()]
    others = [f"{value} ({', '.join(m for m in values if values[m] == value)})" for value in ranked[1:]]
    return "; ".join([ranked[0], *others])


def _notes(records: Sequence[Record]) -> list[str]:
    """The records' own notes, each once, with the methods that carry it unless all do."""
    carriers: dict[str, list[str]] = {}
    for record in records:
        for note in record.get("notes") or []:
            carriers.setdefault(note, []).append(method_of(record))
    return [
        f"note: {note}" if len(methods) == len(records) else f"note ({', '.join(methods)}): {note}"
        for note, methods in carriers.items()
    ]
