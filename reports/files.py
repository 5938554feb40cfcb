"""The files of a report: rendered all first, then written, so that an error leaves nothing half-done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from reports.errors import ReportError
from reports.records import Record, load
from reports.render.csv import to_csv
from reports.tables.document import Document, build, to_markdown


def tables(folder: str | Path) -> str:
    """The tables of a results folder as Markdown.

    Raises:
        ReportError: no such folder, no records, or a damaged record.
    """
    return to_markdown(build(load(folder)))


def write(folder: str | Path, formats: Sequence[str] | None = None) -> list[Path]:
    """Write tables.md, tables.csv, report.html and memory.png (those in `formats`) into a results folder.

    Args:
        folder: with one `<method>.json` a method.
        formats: some of `FORMATS`; None means `DEFAULT_FORMATS`.

    Raises:
        ReportError: unknown format, no such folder, no records, a damaged record, or the folder cannot be written.
    """
    chosen = [name.strip() for name in (DEFAULT_FORMATS if formats is None else formats)]
    unknown = [name for name in chosen if name not in FORMATS]
    if unknown or not chosen:
        raise ReportError(f"unknown format {', '.join(unknown) or '(none)'!r}; choose from {', '.join(FORMATS)}")
    records = load(folder)
    document = build(records)
    contents = {Path(folder) / FORMATS[name][0]: FORMATS[name][1](document, records) for name in chosen}
    for path, content in contents.items():
        _write_atomically(path, content)
    return list(contents)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror}; free some space, or name another folder") from error


def _markdown(document: Document, records: Sequence[Record]) -> bytes:
    return (to_markdown(document) + "\n").encode()


def _csv(document: Document, records: Sequence[Record]) -> bytes:
    return to_csv(records).encode()


def _png(document: Document, records: Sequence[Record]) -> bytes:
    from reports.render.png import to_png  # matplotlib takes longer to import than the tables take to make

    return to_png(records, document.title, document.setting)


def _html(document: Document, records: Sequence[Record]) -> bytes:
    from reports.page.html import to_html

    return to_html(document, _png(document, records)).encode()


FORMATS: dict[str, tuple[str, Callable[[Document, Sequence[Record]], bytes]]] = {
    "md": ("tables.md", _markdown),
    "csv": ("tables.csv", _csv),
    "html": ("report.html", _html),
    "png": ("memory.png", _png),
}
DEFAULT_FORMATS = ("md", "csv", "png")
