"""Texts with labels: label words from the labels, however many there are, and examples of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.tasks.example import Example
from qzo.tasks.source.reading import lines_of
from qzo.tasks.source.row import Row, shown

MOST_LABELS = 1000


def label_of(row: Row) -> str:
    """The row's label as text: a string, a whole number, true or false. Raises QzoError."""
    value = row.get("label", object)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise QzoError(f'{row.where}: "label" is {shown(value)}; it must be text, a whole number, true or false')
    return value.strip()


def labels_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of training rows, numbers by size, others by letters. Raises QzoError for one, and for very many."""
    found = {label_of(row) for row in rows}
    if len(found) < 2:
        raise QzoError(
            f"{rows[0].where} and all other training rows have the label {shown(min(found))}; two different labels "
            "are needed at least: add rows with another"
        )
    if len(found) > MOST_LABELS:
        raise QzoError(
            f"{rows[0].where} and the {len(rows) - 1:,} training rows after it have {len(found):,} different labels, "
            f"which is no classification; more than {MOST_LABELS:,} are not taken: name the columns prompt and "
            "completion instead, by --columns"
        )
    return tuple(sorted(found, key=lambda label: (not label.lstrip("-").isdecimal(), _number(label), label)))


def _number(label: str) -> int:
    return int(label) if label.lstrip("-").isdecimal() else 0


def read_words(file: str | None, labels: Sequence[str]) -> tuple[str, ...]:
    """What the model is to say for each label: the label itself, or what a file tells.

    The file is a JSON object, {"0": "terrible", "1": "great"}, or has lines of a label, a tab and its words.

    Raises QzoError for a file that lacks a label or gives two of them the same words.
    """
    if file is None:
        return tuple(f" {label}" for label in labels)
    words = _words_file(Path(file))
    missing = [label for label in labels if not words.get(label, "").strip()]
    if missing:
        raise QzoError(
            f"{file} has no words for the label {shown(missing[0])}; every label needs some: add a line for it"
        )
    chosen = tuple(f" {words[label].strip()}" for label in labels)
    twice = next((word for word in chosen if chosen.count(word) > 1), None)
    if twice is not None:
        raise QzoError(f"{file} has the words {shown(twice.strip())} for two labels; choose different ones")
    return chosen


def _words_file(file: Path) -> Mapping[str, str]:
    text = "".join(lines_of(file))
    if text.lstrip().startswith("{"):
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise QzoError(f"{file} is not JSON: {error}; correct it, or name a .tsv file") from error
        if not all(isinstance(word, str) for word in content.values()):
            raise QzoError(f"{file} must give text for every label")
        return dict(content)
    words = {}
    for number, line in enumerate(text.splitlines(), 1):
        label, tab, word = line.partition("\t")
        if line.strip() and not tab:
            raise QzoError(f"{file}, line {number} is {shown(line)}; it must be a label, a tab and its words")
        words[label.strip()] = word
    return words


def example_of(row: Row, numbers: Mapping[str, int], words: tuple[str, ...], asked: str) -> Example:
    """Of a row: the text, a line that asks for the label, and the labels' words; `numbers` gives the label's place.

    Raises QzoError for an empty text and a label that no training row has.
    """
    text, label = row.get("text").strip(), label_of(row)
    if not text:
        raise QzoError(f'{row.where}: "text" is empty; write one, or remove the row')
    if label not in numbers:
        known = ", ".join(map(shown, list(numbers)[:10])) + (", ..." if len(numbers) > 10 else "")
        raise QzoError(
            f"{row.where}: no training row has the label {shown(label)}; they have {known}: correct it, or add such "
            "rows to the training data"
        )
    return Example(text, f"\n{asked}:", words, numbers[label])


def asked_by(column: str) -> str:
    """How the prompt asks for what stands in a column: `Issue type` for issue_type."""
    name = " ".join(column.replace("_", " ").replace("-", " ").split())
    return name[:1].upper() + name[1:]
