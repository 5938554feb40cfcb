"""Rows of data files: JSON lines, JSON, CSV, TSV, parquet, plain text, a folder of them, or a data set of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qzo.errors import QzoError
from qzo.files.bounds import AmbiguousKey, said_once
from qzo.tasks.source.parquet import hub_files, parquet_rows
from qzo.tasks.source.reading import LONGEST_LINE, check_characters, json_lines, lines_of
from qzo.tasks.source.row import Row, shown

HUB = "hub:"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
DELIMITERS = (",", ";", "\t", "|")  # of a .csv, by what its header holds most of
Rows = dict[str, list[Row]]


def read(place: str) -> Rows:
    """Rows by split: "train", and "validation" and "test" where a folder or data set has files of these names.

    Args:
        place: a file; a folder with train.*, validation.* (valid, val, dev, eval) and test.*, or with any files of one
            data set; or hub:owner/name, with a configuration behind another colon.

    Raises QzoError, with file and line, for what is missing, empty, damaged, or in another encoding.
    """
    if place.startswith(HUB):
        return {split: _joined(files) for split, files in hub_files(place.removeprefix(HUB)).items()}
    path = Path(place)
    if not path.is_dir():
        return {"train": _joined([path])}
    by_split = _by_split(path)
    return {split: _joined(files) for split, files in by_split.items()}


def _by_split(folder: Path) -> dict[str, list[Path]]:
    files = sorted(file for file in folder.iterdir() if _reader(file) and not file.name.startswith("."))
    if not files:
        known = ", ".join(f"*{end}" for end in READERS)
        raise QzoError(f"{folder} has no data file; known are {known}. Is it of a task? Then name that by --task")
    named = {split: [file for file in files if _stem(file) in names] for split, names in SPLITS.items()}
    if not named["train"]:
        return {"train": files}
    return {split: found for split, found in named.items() if found}


def _stem(file: Path) -> str:
    """`train` of train.jsonl.gz, and of train-00000-of-00002.parquet."""
    return file.name.partition(".")[0].partition("-")[0].lower()


def _joined(files: list[Path]) -> list[Row]:
    rows: list[Row] = []
    for file in files:
        reader = _reader(file)
        if reader is None:
            raise QzoError(f"{file} is no data file; known are {', '.join(f'*{end}' for end in READERS)}")
        rows += reader(file)
    return rows


def _reader(file: Path) -> Callable[[Path], Iterator[Row]] | None:
    name = file.name.lower().removesuffix(".gz")
    return next((reader for end, reader in READERS.items() if name.endswith(end)), None)


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, such a list under "data", or JSON lines in a file of that name."""
    text = "".join(lines_of(file))
    try:
        content = json.loads(text, object_pairs_hook=said_once)
    except AmbiguousKey as error:
        raise QzoError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data" and text.lstrip().startswith("{"):
            yield from json_lines(file)
            return
        raise QzoError(
            f"{file} is not JSON: {error}; correct it, or name it .jsonl where each line is an object"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list) or not content:
        raise QzoError(f"{file} is {shown(content)}; it must be a list of objects")
    for number, fields in enumerate(content, 1):
        where = f"{file}, entry {number}"
        if not isinstance(fields, dict):
            raise QzoError(f"{where} is {shown(fields)}; it must be a JSON object")
        check_characters(fields, where, text)
        yield Row(where, fields)


def _csv(file: Path) -> Iterator[Row]:
    """Rows under a header; the delimiter is that which the header holds most of."""
    lines = lines_of(file)
    first = next(lines, "")
    delimiter = max(DELIMITERS, key=first.count)
    yield from _table(file, first, lines, delimiter)


def _tsv(file: Path) -> Iterator[Row]:
    lines = lines_of(file)
    yield from _table(file, next(lines, ""), lines, "\t")


def _table(file: Path, first: str, lines: Iterator[str], delimiter: str) -> Iterator[Row]:
    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    before = csv.field_size_limit(LONGEST_LINE)
    try:
        reader = csv.reader(all_lines(), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_header(file, header)
        count = 0
        for values in reader:
            if not any(value.strip() for value in values):
                continue
            where, count = f"{file}, line {reader.line_num}", count + 1
            if len(values) != len(header):
                raise QzoError(f"{where} has {len(values)} values under a header of {len(header)}; quote the delimiter")
            yield Row(where, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise QzoError(
            f"{file}, line {reader.line_num} cannot be read as a table: {error}; correct the line"
        ) from error
    finally:
        csv.field_size_limit(before)
    if not count:
        raise QzoError(f"{file} has no row below its header; add rows")


def _check_header(file: Path, header: list[str]) -> None:
    if not any(header):
        raise QzoError(f"{file} is empty; it must hold a header and rows")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise QzoError(f"{file} has two columns {shown(twice)}; rename one")


def _text(file: Path) -> Iterator[Row]:
    """A text file is one document."""
    text = "".join(lines_of(file))
    if not text.strip():
        raise QzoError(f"{file} is empty; it must hold text")
    yield Row(str(file), {"text": text})


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": parquet_rows,
    ".txt": _text,
}
