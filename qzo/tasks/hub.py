"""Rows of a task from the Hugging Face hub, read from the parquet files that it keeps of every data set."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from qzo.errors import QzoError
from qzo.tasks.rows import Row

REVISION = "refs/convert/parquet"  # the hub's own conversion: CONFIG/SPLIT/0000.parquet


def hub_rows(repo: str, config: str) -> dict[str, list[Row]]:
    """Rows "train" and "test", which is the public validation split. Downloads once, then reads the cache.

    Raises QzoError where pyarrow is not installed or the hub cannot be reached.
    """
    return {"train": _split(repo, config, "train"), "test": _split(repo, config, "validation")}


def _split(repo: str, config: str, split: str) -> list[Row]:
    if find_spec("pyarrow") is None:
        raise QzoError(
            f"{repo} on the hub is read with pyarrow: pip install pyarrow; or give JSON lines with --data DIR"
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
