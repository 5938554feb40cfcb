"""Which positions the tokens of a padded row have, and how many a model has."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError

# What configurations call it; of MPT max_seq_len, where ALiBi needs no table but the bias is made for so many.
LEARNED = ("max_position_embeddings", "n_positions", "max_target_positions")
NAMES = (*LEARNED, "max_seq_len", "max_sequence_length")
UNMASKED = ("rwkv",)  # recurrences that go through padding too


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position of each column of a mask [B, T]: the number of columns before it that do not hold padding; int64 [B, T].

    So a row gets the positions that it has without padding, on whichever side that is and where a gap lies inside.
    Padding after the last token counts on: there a row has 0, 1, 2, ..., what models take without being told. Nothing
    is read, so the mask may be on any device. Extra memory: a few int64 [B, T].
    """
    mask = (attention_mask != 0).long()
    later = mask.flip(1).cummax(1).values.flip(1)  # 1 up to the last token of a row
    gaps = ((1 - mask) * later).cumsum(1)
    return (torch.arange(mask.shape[1], device=mask.device) - gaps).clamp_min(0)


def position_options(model: nn.Module, attention_mask: Tensor | None, columns: int) -> dict[str, Tensor]:
    """`position_ids` of the last columns of a mask [B, T], as an argument, for models that take them.

    Of the others, those that look at distances alone (ALiBi) need none. Raises QzoError where a row has padding in
    front of a token and the model would read it as text: it has learned positions and counts columns.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return {}
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PEFT passes everything on
        inner = inner.get_base_model()
    if "position_ids" in inspect.signature(inner.forward).parameters:
        return {"position_ids": positions_of(attention_mask)[:, -columns:] + _first_position(inner)}
    if counts_columns(inner) and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise QzoError(
            f"a {type(inner).__name__} takes no position_ids and would read padding in front of a text as a part of "
            "it; pad on the right, or make batches of rows of one length, e.g. of one row"
        )
    return {}


def counts_columns(model: nn.Module) -> bool:
    """Whether a model that takes no position_ids has a position for each column, or reads on whatever the mask says."""
    config = text_config(model)
    return getattr(config, "model_type", None) in UNMASKED or any(hasattr(config, name) for name in LEARNED)


def count_positions(model: nn.Module) -> int | None:
    """How many positions a model has by its configuration; None where it names no number."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in NAMES)
    count = next((count for count in found if isinstance(count, int) and count > 0), None)
    return None if count is None else count - _first_position(model)


def check_columns(model: nn.Module, columns: int) -> None:
    """Raise QzoError for rows that are longer than the model has positions."""
    most = count_positions(model)
    if most is not None and columns > most:
        raise QzoError(
            f"a row of {columns} tokens is longer than the {most} positions of this {type(model).__name__}; make the "
            f"encoder with max_length={most} or less"
        )


def _first_position(model: nn.Module) -> int:
    """Of a model's table of positions; RoBERTa and its kin begin after the number that padding has."""
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return 0 if padding is None else padding + 1


def text_config(model: nn.Module) -> Any:
    """The configuration of a model, of one with several parts that of its text; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def row_length(model: nn.Module, asked: int | None, source: str) -> int | None:
    """Tokens that a row may have: as many as asked for, else as many as the model has positions; None, any number.

    Raises QzoError for more than the model has.
    """
    most = count_positions(model)
    if asked is not None and most is not None and asked > most:
        raise QzoError(f"--max-length {asked} is more than the {most} positions of {source}; choose {most} or less")
    return most if asked is None else asked
