"""Fixtures of the report tests: the methods of a default run on llama2-13b, in memory and in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_records import all_records, save

from bench.records.record import Record


@pytest.fixture
def records() -> dict[str, Record]:
    return all_records()


@pytest.fixture
def folder(tmp_path: Path, records: dict[str, Record]) -> Path:
    """A results folder with all ten methods."""
    return save(tmp_path / "llama2-13b", records)
