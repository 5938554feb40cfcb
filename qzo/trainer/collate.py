"""Rows of different lengths as one batch, where no collator was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # transformers' label for "no label here"
Row = dict[str, Any]
Collate = Callable[[list[Row]], dict[str, Any]]


def padding(collate: Collate, pad_id: int, left: bool = False) -> Collate:
    """`collate`, which stacks rows of one length, for rows of any: those of different lengths are filled up before.

    What is as long as a row's `input_ids` is filled up with it: labels with -100, which no loss counts, input_ids with
    `pad_id`, all else with 0. An `attention_mask` is added where there is none. Other columns are left as they are.
    """

    def padded(rows: list[Row]) -> dict[str, Any]:
        lengths = [_length(row.get("input_ids")) for row in rows]
        if len(set(lengths)) < 2 or None in lengths:
            return collate(rows)
        most = max(length for length in lengths if length is not None)
        return collate([_filled(row, most, pad_id, left) for row in rows])

    return padded


def _filled(row: Row, most: int, pad_id: int, left: bool) -> Row:
    length = len(row["input_ids"])
    fill = {"input_ids": pad_id, "labels": IGNORED}
    whole = {**row, "attention_mask": row.get("attention_mask", [1] * length)}
    return {
        name: _extended(value, most - length, fill.get(name, 0), left) if _length(value) == length else value
        for name, value in whole.items()
    }


def _extended(value: Any, count: int, fill: int, left: bool) -> Tensor:
    row = torch.as_tensor(value)
    more = torch.full((count,), fill, dtype=row.dtype)
    return torch.cat([more, row] if left else [row, more])


def _length(value: Any) -> int | None:
    """Of a list or tensor with one dimension."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() == 1 else None
    return len(value) if isinstance(value, list | tuple) else None
