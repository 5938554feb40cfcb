"""GPTQ checkpoints of 2, 3, 4 and 8 bits, both versions, with and without act-order, by a reader and writer of bits.

Those are checked against gptqmodel's own packing in `test_gptqmodel.py`, in the environment that it needs.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from format_cases import FormatCase
from gptq_files import slow_weight, write_gptq
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def write(plain: Path, out: Path, n_bits: int, version: str, act_order: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        write_gptq(model, out, n_bits, 32, version, act_order)


def scales(out: Path) -> dict[str, Tensor]:
    """Layer path -> scales, of the file."""
    tensors = load_file(out / "model.safetensors")
    return {name.removesuffix(".scales"): t.float() for name, t in tensors.items() if name.endswith(".scales")}


def logits(out: Path, input_ids: Tensor) -> Tensor:
    """Of a plain fp32 model with the weights that the bits stand for."""
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    tensors = load_file(out / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for path in scales(out):
        state[f"{path}.weight"] = slow_weight(tensors, path, settings["bits"], settings["checkpoint_format"])
        del state[f"{path}.scales"]
    return plain_logits(config, state, input_ids)


def plain_logits(config: dict, state: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """Logits of an unquantized model."""
    from transformers import AutoConfig

    kind = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(kind, dtype=torch.float32).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model(input_ids).logits


KINDS = {
    "llama": [(2, 1, False), (3, 2, True), (4, 1, False), (8, 2, True)],
    "opt": [(3, 1, False), (4, 1, True)],
}
CASES = [
    FormatCase(
        f"gptq-{n_bits}bit-v{version}{'-act-order' if act_order else ''}",
        family,
        partial(write, n_bits=n_bits, version="gptq" if version == 1 else "gptq_v2", act_order=act_order),
        scales,
        logits,
    )
    for family, kinds in KINDS.items()
    for n_bits, version, act_order in kinds
]
