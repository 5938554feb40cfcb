"""Parquet files, and the data sets of the Hugging Face hub, which has all of them as such files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.files.bounds import check_file
from qzo.files.folder import one_line
from qzo.tasks.source.reading import MOST_LINES
from qzo.tasks.source.row import Row
from qzo.tasks.source.rows import REVISION

SPLITS = ("train", "validation", "test")


def parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a parquet file; numbers of a label become its names where the file tells them, as the hub's do.

    Raises QzoError where pyarrow is not installed, and for a file that it cannot read.
    """
    if find_spec("pyarrow") is None:
        raise QzoError(f"{file} is read with pyarrow, which is not installed; pip install pyarrow")
    from pyarrow import parquet

    check_file(file)
    try:
        opened = parquet.ParquetFile(file)
        if opened.metadata.num_rows > MOST_LINES:
            raise QzoError(f"{file} has more than {MOST_LINES:,} rows; cut it, a run needs far fewer examples")
        names = _class_names(opened.schema_arrow.metadata or {})
        rows = opened.read().to_pylist()
    except QzoError:
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise QzoError(
            f"{file} cannot be read: {one_line(error)}; is it damaged? Then copy or download it again"
        ) from error
    if not rows:
        raise QzoError(f"{file} has no rows; give a file with some")
    for number, row in enumerate(rows, 1):
        fields = {column: _named(value, names.get(column)) for column, value in row.items()}
        yield Row(f"{file}, row {number}", fields)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Column -> names of its classes, as `datasets` writes them into a file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _named(value: Any, names: list[str] | None) -> Any:
    known = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return names[value] if known and names is not None else value


def hub_files(name: str) -> dict[str, list[Path]]:
    """The files of owner/name[:configuration] on the hub by split, downloaded once. Raises QzoError."""
    from huggingface_hub import HfApi, hf_hub_download

    repo, _, config = name.partition(":")
    options: Any = {"repo_type": "dataset", "revision": REVISION}
    try:
        files = [file for file in HfApi().list_repo_files(repo, **options) if file.endswith(".parquet")]
        configs = sorted({file.partition("/")[0] for file in files})
        chosen = config or ("default" if "default" in configs else configs[0] if len(configs) == 1 else "")
        if chosen not in configs:
            raise QzoError(f"hub:{repo} has the configurations {', '.join(configs)}; choose one, hub:{repo}:NAME")
        found = {split: [f for f in files if f.startswith(f"{chosen}/{split}/")] for split in SPLITS}
        if not found["train"]:
            raise QzoError(
                f"hub:{repo}, {chosen}, has no split named train; name another configuration, or download its files "
                "and give them by --data"
            )
        return {
            split: [Path(hf_hub_download(repo, file, **options)) for file in sorted(of_split)]
            for split, of_split in found.items()
            if of_split
        }
    except QzoError:
        raise
    except Exception as error:  # network, authorization, no such data set: all mean that there is no data
        raise QzoError(f"hub:{repo} cannot be had: {one_line(error)}; give a file with --data FILE") from error
