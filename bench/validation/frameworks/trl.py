"""What trl's SFTTrainer does to a model beside what PEFT does."""

from __future__ import annotations

import torch
from torch import nn

SIXTEEN_BIT = ("lm_head", "embed_tokens", "wte", "wpe")


def adapters_cast_by_trl(model: nn.Module) -> None:
    """`peft_module_casting_to_bf16`, for 4-bit models under bf16: norms in fp32, vocabulary back from fp32 to bf16
    (trl/trainer/utils.py of 0.13).
    """
    for name, module in model.named_modules():
        if "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in SIXTEEN_BIT) and getattr(module, "weight", None) is not None:
            module.to(torch.bfloat16)
