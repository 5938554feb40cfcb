"""AWQ checkpoints in AutoAWQ's layout "gemm", by the slow reader and writer of `awq_files`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from awq_files import slow_weight, write_awq
from cases_gptq import plain_logits, scales
from format_cases import FormatCase
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def write(plain: Path, out: Path) -> None:
    write_awq(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), out, 32)


def logits(out: Path, input_ids: Tensor) -> Tensor:
    """Of a plain fp32 model with the weights that the nibbles stand for."""
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    tensors = load_file(out / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for path in scales(out):
        state[f"{path}.weight"] = slow_weight(tensors, path)
        del state[f"{path}.scales"]
    return plain_logits(config, state, input_ids)


CASES = [FormatCase("awq", family, write, scales, logits) for family in ("llama", "opt")]
