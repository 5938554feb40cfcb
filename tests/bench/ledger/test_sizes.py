"""Sizes with a unit, and what is none."""

import pytest

from bench.ledger.sizes import parse_bytes
from qzo.errors import QzoError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24MB", 24_000_000), ("24 MB", 24_000_000), ("1.5GiB", 3 << 29), ("512B", 512), ("2 kB", 2000), ("2KB", 2000),
     ("1KiB", 1024), ("0B", 0), ("1 TiB", 1 << 40), ("0.1GB", 100_000_000)],
)  # fmt: skip
def test_sizes_are_decimal_or_binary(text: str, nbytes: int):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "24", "MB", "24 XB", "-1MB", "1e3MB", "24 Mb", "24MBB", "1,5GB", "1.MB", "nan B"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(QzoError, match="is not a size; write a number and a unit"):
        parse_bytes(text)
