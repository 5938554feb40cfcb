"""A table as data: made once, shown as Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Table:
    """Cells are ready to read. The first `text_columns` columns stand left, the others right; `notes` stand below."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    text_columns: int = 1

    def to_markdown(self) -> str:
        """A heading, a pipe table and a bullet for each note."""
        align = ["left" if column < self.text_columns else "right" for column in range(len(self.headers))]
        rows = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in self.rows]
        grid = tabulate(rows, headers=self.headers, tablefmt="pipe", colalign=align, disable_numparse=True)
        notes = [f"- {_one_line(note)}" for note in self.notes]
        return "\n".join([f"## {self.title}", "", grid, *([""] if notes else []), *notes])


def _one_line(text: str) -> str:
    return " ".join(text.split())
