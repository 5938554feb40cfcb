"""LoRA and QLoRA as PEFT and bitsandbytes run them; both are imported where they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.cases.case import BenchCase
from bench.cases.recipes.table import LORA, QLORA
from bench.methods.activations.checkpointing import checkpoint_options
from bench.methods.prepared import Prepared
from bench.methods.recipes import recipe_method
from bench.methods.world import World
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora(case: BenchCase, world: World) -> Prepared:
    """Adapters on the query and value projections of a frozen bf16 model, under bf16 autocast."""
    return recipe_method(case.recipe or LORA)(case, world)


def qlora(case: BenchCase, world: World) -> Prepared:
    """The same adapters on an NF4 model prepared by PEFT, which turns every unquantized parameter into fp32."""
    return recipe_method(case.recipe or QLORA)(case, world)


def frozen_base(world: World, dtype: torch.dtype, checkpointing: bool) -> PreTrainedModel:
    """The model in `dtype` without trainable parameters."""
    model = world.model(dtype)
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpoint_options(world))
    return model


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
