"""bitsandbytes NF4 layers in place of a model's linear layers, with data or without.

bitsandbytes is imported where it is used: the other methods run on machines that lack it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.methods.quantized.low_bit import quantize_layers
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 64  # weights that share an absmax
NESTED_BLOCK_SIZE = 256  # absmax that share one of their own


def to_nf4(model: PreTrainedModel, nested: bool = False, compute_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace the layers that transformers would (see `low_bit`) in place; they compute in `compute_dtype`, or in the
    model's dtype.

    `nested` quantizes the absmax too, in 8 bits ("double quantization").
    """
    quantize_layers(model, partial(_nf4_linear, nested, compute_dtype))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what transformers sets; PEFT looks at it
    return model


def _nf4_linear(
    nested: bool, compute_dtype: torch.dtype | None, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    bnb = _library()
    out_features, in_features = weight.shape
    with torch.device("meta"):
        quantized: Any = bnb.nn.Linear4bit(
            in_features, out_features, bias is not None, compute_dtype=compute_dtype or weight.dtype,
            compress_statistics=nested, quant_type="nf4",
        )  # fmt: skip
    quantized.weight = _nf4_weight(weight.contiguous(), nested)
    quantized.weight.module = quantized
    quantized.quant_state = quantized.weight.quant_state
    if bias is not None:
        quantized.bias = nn.Parameter(bias.data, requires_grad=False)
    return quantized


def _nf4_weight(weight: torch.Tensor, nested: bool) -> Any:
    bnb = _library()
    if weight.device.type != "meta":
        parameter: Any = bnb.nn.Params4bit(
            weight, requires_grad=False, blocksize=BLOCK_SIZE, compress_statistics=nested, quant_type="nf4"
        )
        return parameter.to(weight.device)  # quantizes
    blocks = -(-weight.numel() // BLOCK_SIZE)
    absmax = torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta")
    second = {"offset": torch.empty((), device="meta"), "state2": _second_state(blocks)} if nested else {}
    state = bnb.functional.QuantState(
        absmax=absmax, shape=weight.shape, code=torch.empty(16, device="meta"), blocksize=BLOCK_SIZE, quant_type="nf4",
        dtype=weight.dtype, **second,
    )  # fmt: skip
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
    return bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK_SIZE, compress_statistics=nested,
        quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip


def _second_state(blocks: int) -> Any:
    absmax = torch.empty(-(-blocks // NESTED_BLOCK_SIZE), device="meta")
    code = torch.empty(1 << 8, device="meta")
    return _library().functional.QuantState(absmax=absmax, code=code, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32)


@cache
def _library() -> Any:
    with quiet_libraries():
        import bitsandbytes
    return bitsandbytes


def nf4_tensors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Codes, and absmax with the 16-entry table, of all NF4 layers."""
    parts: dict[str, list[torch.Tensor]] = {"codes": [], "scales": []}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts["codes"].append(parameter.data)
            parts["scales"] += [state.absmax, state.code]
            parts["scales"] += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return parts
