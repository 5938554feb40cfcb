"""A published row, and what a reader makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.cases.models import ModelSource
from bench.cases.recipes.recipe import Recipe
from bench.validation.measurement import source_of

Row = Mapping[str, Any]
Change = Callable[[nn.Module], None]  # in place
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WHOLE = ("full-finetuning", "full", "ft-bf16")


@dataclass(frozen=True)
class Published:
    """A row in the words of a recipe, and what its framework did that the installed libraries do not.

    `loaded` changes the model as it is loaded, before there are adapters; `changes` the model that is trained.
    `alike`: a layer leaves nothing behind that the model sees, so that two of them can stand for all.
    `build` makes the framework's own model, where it is not that of transformers.
    `sampled`: process bytes were read at intervals, which see what every step reserves and miss what one step does.
    """

    recipe: Recipe
    source: ModelSource
    loaded: tuple[Change, ...] = ()
    changes: tuple[Change, ...] = ()
    alike: bool = True
    build: Callable[[torch.dtype], nn.Module] | None = None
    sampled: bool = False


def model_of(row: Row) -> ModelSource:
    """The row's model."""
    return source_of(row["model_id"], row["architecture"])


def flash_model_of(row: Row) -> ModelSource:
    """The row's model under FlashAttention 2, which has a sliding window in its kernel and so needs no mask for it."""
    source = model_of(row)
    if getattr(source.config, "sliding_window", None):
        source.config.sliding_window = None
    return source


def lora(row: Row, **options: Any) -> dict[str, Any] | None:
    """Options of LoraConfig; None where every weight is trained."""
    if row["method"] in WHOLE:
        return None
    stated = {"r": row["lora_rank"], "lora_alpha": row["lora_rank"], "target_modules": row["lora_targets"]}
    return stated | {"lora_dropout": row.get("lora_dropout") or 0.0, "task_type": "CAUSAL_LM"} | options


def checkpointing(row: Row) -> dict[str, Any]:
    """The Trainer's arguments for it."""
    return {"gradient_checkpointing": True} if row.get("gradient_checkpointing") else {}
