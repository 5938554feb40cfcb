"""Records and other JSON on disk: read with every check, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bench.records.record import Record, validate_record
from bench.records.summary import in_order
from qzo.durable import reason, replace_file
from qzo.errors import QzoError


def make_folder(out: Path) -> None:
    """Create the result folder and prove that it can be written, before any work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise QzoError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from error


def load_cells(path: str | Path) -> dict[str, Record]:
    """Method -> record, from a results folder, a record file, or a file with `{"records": [...]}`.

    Raises:
        QzoError: nothing there, damaged, or two records of one method; the path is named.
    """
    path = Path(path)
    if path.is_dir():
        return load_results(path)
    content = read_json(path)
    records = content["records"] if isinstance(content, dict) and "records" in content else [content]
    cells: dict[str, Record] = {}
    try:
        if not isinstance(records, list) or not records:
            raise QzoError("holds no records; write it by `python -m bench run`")
        for record in map(validate_record, records):
            method = record["case"]["method"]
            if method in cells:
                raise QzoError(f"two records of the method {method!r}; remove one, cells are matched by method")
            cells[method] = record
    except QzoError as error:
        raise QzoError(f"{path}: {error}") from error
    return cells


SUMMARY = "summary.json"


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        QzoError: it cannot be read, or is not JSON; the path is named.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise QzoError(f"cannot read {path}: {error.strerror}; name another file") from error
    except ValueError as error:  # also bytes that are not UTF-8
        raise QzoError(f"{path} is damaged, not JSON ({error}); delete it and run that cell again") from error


def write_json(path: str | Path, value: Any) -> Path:
    """Write under a temporary name, then rename: a reader sees the old file or the new one, never half of it.

    Raises:
        QzoError: the folder cannot be made or written.
    """
    path = Path(path)
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QzoError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except QzoError as error:
        raise QzoError(f"cannot write {path}: {reason(error.__cause__ or error)}; choose another folder") from error
    return path


def read_record(path: str | Path) -> Record:
    """The validated record in a file.

    Raises:
        QzoError: it cannot be read, is not JSON, or breaks the schema; the path is named.
    """
    content = read_json(path)
    try:
        return validate_record(content)
    except QzoError as error:
        raise QzoError(f"{path}: {error}") from error


def write_record(folder: str | Path, record: Record) -> Path:
    """Write a record to `folder/<method>.json`, atomically.

    Raises:
        QzoError: it breaks the schema, or the folder cannot be written.
    """
    return write_json(Path(folder) / f"{validate_record(record)['case']['method']}.json", record)


def load_results(folder: str | Path) -> dict[str, Record]:
    """Method -> record of every `<method>.json` in a folder, in the order of `METHODS`.

    Raises:
        QzoError: no such folder, no record in it, or a damaged file, which is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise QzoError(f"no folder {folder}; give the one that `bench run --out` wrote")
    records = {}
    for path in folder.glob("*.json"):
        if path.name == SUMMARY:
            continue
        record = read_record(path)
        if record["case"]["method"] != path.stem:
            raise QzoError(
                f"{path} holds the method {record['case']['method']!r}; rename it, a file is named after its method"
            )
        records[path.stem] = record
    if not records:
        raise QzoError(f"no records in {folder}; run `python -m bench run MODEL --out {folder}` first")
    return in_order(records)
