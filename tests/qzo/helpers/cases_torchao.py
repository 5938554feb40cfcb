"""torchao through transformers' TorchAoConfig; int4, whose making needs a further package, from its tensors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from format_cases import FormatCase
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig


def options(kind: str) -> Any:
    """The library's settings of a kind of case."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == "intx4":
        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return Int8WeightOnlyConfig(granularity=PerGroup(32)) if kind == "int8-group" else Int8WeightOnlyConfig()


def _write(kind: str, plain: Path, out: Path) -> None:
    config = TorchAoConfig(options(kind))
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    if kind == "int4":
        for module in linear_layers(model).values():
            module.weight = nn.Parameter(int4_tensor(module.weight.dequantize()), requires_grad=False)
    model.save_pretrained(out)


def int4_tensor(weight: Tensor, group_size: int = 32) -> Any:
    """An Int4Tensor by its definition: sixteen steps from least to greatest, codes -8 ... 7, two to a byte."""
    from torchao.quantization import Int4Tensor

    grouped = weight.unflatten(1, (-1, group_size))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    scale = (high - low) / 15
    codes = ((grouped - low) / scale).round().clamp(0, 15).flatten(1).int() - 8
    words = ((codes[:, 1::2] & 15) * 16 + (codes[:, ::2] & 15)).to(torch.uint8).view(torch.int8)
    scale, zero = (tensor[..., 0].t().contiguous() for tensor in (scale, low + 8 * scale))
    return Int4Tensor(words, scale, zero, [1, group_size], weight.shape)


def int4_product(weight: Any, x: Tensor) -> Tensor:
    """x Wᵀ of an Int4Tensor, by PyTorch's own int4 operator for the CPU."""
    words = weight.qdata.view(torch.uint8).int()
    codes = torch.stack((words & 15, words >> 4), dim=-1).flatten(1)
    codes = (codes + 8) % 16  # from two's complement to q + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.stack((weight.scale, weight.zero_point), dim=-1).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.reshape(-1, x.shape[-1]), packed, weight.block_size[1], both)
    return y.view(*x.shape[:-1], -1)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> nn.Linear with a quantized weight."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight).__module__.startswith("torchao")
    }


def read(out: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def _scales(out: Path) -> dict[str, Tensor]:
    return {path: module.weight.scale for path, module in linear_layers(read(out)).items()}


def _logits(out: Path, input_ids: Tensor) -> Tensor:
    model = read(out)
    for module in linear_layers(model).values():
        if type(module.weight).__name__ == "Int4Tensor":
            module.forward = partial(_int4_forward, module)
    with torch.no_grad():
        return model(input_ids).logits


def _int4_forward(module: Any, x: Tensor) -> Tensor:
    y = int4_product(module.weight, x)
    return y if module.bias is None else y + module.bias


CASES = [
    FormatCase(
        name=f"torchao-{kind}",
        family=family,
        write=partial(_write, kind),
        scales=_scales,
        logits=_logits,
        tolerance=1e-4,
        needs=("torchao",),
    )
    for kind, family in (
        ("int8", "llama"),
        ("int8", "opt"),
        ("int8-group", "llama"),
        ("intx4", "llama"),
        ("int4", "llama"),
        ("int4", "opt"),
    )
]
