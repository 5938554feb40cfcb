"""Full fine-tuning in the three conventions that people quote, and by plain SGD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bench.cases.case import BenchCase
from bench.methods.activations.checkpointing import enable_checkpointing
from bench.methods.optimizers.adamw import MixedAdamW, fused_adamw
from bench.methods.prepared import Prepared, first_order_step
from bench.methods.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LR = 1e-5


def ft_bf16(case: BenchCase, world: World) -> Prepared:
    """Weights, gradients and AdamW moments in bf16: 8 bytes a parameter."""
    model = _model(case, world, torch.bfloat16)
    optimizer = fused_adamw(model.parameters(), lr=LR)
    return Prepared(model, optimizer, first_order_step(model, optimizer), "bfloat16", "adamw-bf16")


def ft_mixed(case: BenchCase, world: World) -> Prepared:
    """Weights and gradients in bf16, AdamW moments in fp32: 12 bytes a parameter."""
    model = _model(case, world, torch.bfloat16)
    optimizer = MixedAdamW(model.parameters(), lr=LR)
    return Prepared(model, optimizer, first_order_step(model, optimizer), "bfloat16", "adamw-fp32")


def ft_amp(case: BenchCase, world: World) -> Prepared:
    """Everything in fp32, the forward under bf16 autocast (the Hugging Face Trainer's `bf16=True`): 16 bytes."""
    model = _model(case, world, torch.float32)
    optimizer = fused_adamw(model.parameters(), lr=LR)
    step = first_order_step(model, optimizer, world.autocast)
    return Prepared(model, optimizer, step, "bfloat16-autocast", "adamw-fp32")


def ft_sgd(case: BenchCase, world: World) -> Prepared:
    """bf16 weights and gradients and SGD without momentum: 4 bytes a parameter."""
    model = _model(case, world, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return Prepared(model, optimizer, first_order_step(model, optimizer), "bfloat16", "sgd")


def _model(case: BenchCase, world: World, dtype: torch.dtype) -> PreTrainedModel:
    model = world.model(dtype)
    if case.gradient_checkpointing:
        enable_checkpointing(model, world, {})
    world.place(model)
    return model.train()
