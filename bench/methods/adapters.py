"""LoRA and QLoRA as PEFT and bitsandbytes run them; both are imported where they are used."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from bench.adamw import fused_adamw
from bench.case import BenchCase
from bench.methods.nf4 import BLOCK_SIZE, to_nf4
from bench.methods.prepared import Prepared, checkpoint_options, first_order_step
from bench.worlds import World

RANK, ALPHA = 8, 16  # as in the paper
LR = 1e-4


def lora(case: BenchCase, world: World) -> Prepared:
    """Adapters on the query and value projections of a frozen bf16 model."""
    model = world.model(torch.bfloat16)
    model.requires_grad_(False)
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable(checkpoint_options(world))
    return _adapted(model, world)


def qlora(case: BenchCase, world: World) -> Prepared:
    """The same adapters on an NF4 model prepared by PEFT, which turns every unquantized parameter into fp32."""
    from peft import prepare_model_for_kbit_training

    model = to_nf4(world.model(torch.bfloat16))
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=case.gradient_checkpointing,
        gradient_checkpointing_kwargs=checkpoint_options(world),
    )
    prepared = _adapted(model, world)
    prepared.quantization = {"format": "nf4", "bits": 4, "group_size": BLOCK_SIZE}
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        prepared.notes.append("bitsandbytes leaves stacked MoE experts unquantized, and PEFT turns them into fp32")
    return prepared


def _adapted(model: PreTrainedModel, world: World) -> Prepared:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_targets(model), task_type="CAUSAL_LM")
    with torch.device(model.device):
        adapted = world.place(get_peft_model(model, config)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = fused_adamw(trained, lr=LR)
    return Prepared(adapted, optimizer, first_order_step(adapted, optimizer), "bfloat16", "adamw-fp32")


def _targets(model: PreTrainedModel) -> list[str]:
    """Query and value projections; where they are one matrix (GPT-2), the layer PEFT adapts by default."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if {"q_proj", "v_proj"} <= leaves:
        return ["q_proj", "v_proj"]
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[model.config.model_type])
