"""LoRA and QLoRA as PEFT and bitsandbytes run them; both are imported where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.cases.case import BenchCase
from bench.methods.adamw import fused_adamw
from bench.methods.nf4 import BLOCK_SIZE, to_nf4
from bench.methods.prepared import Prepared, checkpoint_options, first_order_step
from bench.methods.targets import adapter_targets
from bench.methods.world import World
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK, ALPHA = 8, 16  # as in the paper
LR = 1e-4


def lora(case: BenchCase, world: World) -> Prepared:
    """Adapters on the query and value projections of a frozen bf16 model."""
    return _prepared(frozen_base(world, torch.bfloat16, case.gradient_checkpointing), world)


def qlora(case: BenchCase, world: World) -> Prepared:
    """The same adapters on an NF4 model prepared by PEFT, which turns every unquantized parameter into fp32."""
    model = nf4_base(world, torch.bfloat16, case.gradient_checkpointing)
    prepared = _prepared(model, world)
    prepared.quantization = {"format": "nf4", "bits": 4, "group_size": BLOCK_SIZE}
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        prepared.notes.append("bitsandbytes leaves stacked MoE experts unquantized, and PEFT turns them into fp32")
    return prepared


def frozen_base(world: World, dtype: torch.dtype, checkpointing: bool) -> PreTrainedModel:
    """The model in `dtype` without trainable parameters."""
    model = world.model(dtype)
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpoint_options(world))
    return model


def nf4_base(world: World, dtype: torch.dtype, checkpointing: bool) -> PreTrainedModel:
    """The model in NF4, computing in `dtype`, as PEFT prepares it for training."""
    return prepared_nf4(to_nf4(world.model(dtype)), world, checkpointing)


def prepared_nf4(model: PreTrainedModel, world: World, checkpointing: bool) -> PreTrainedModel:
    """PEFT's preparation of a quantized model: everything unquantized in fp32, nothing trainable."""
    with quiet_libraries():
        from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs=checkpoint_options(world),
    )


def add_adapters(
    model: PreTrainedModel, world: World, rank: int, alpha: int, targets: Sequence[str]
) -> tuple[nn.Module, list[nn.Parameter]]:
    """PEFT's model on the world's device, and what is trained in it (fp32)."""
    with quiet_libraries():
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")
    with torch.device(model.device):
        adapted = world.place(get_peft_model(model, config)).train()
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def _prepared(model: PreTrainedModel, world: World) -> Prepared:
    adapted, trained = add_adapters(model, world, RANK, ALPHA, adapter_targets(model))
    optimizer = fused_adamw(trained, lr=LR)
    return Prepared(adapted, optimizer, first_order_step(adapted, optimizer), "bfloat16", "adamw-fp32")
