"""bitsandbytes' int8 layers (LLM.int8) in place of a model's linear layers, with data or without.

On a GPU activations are quantized too, and what backward needs of them is their 16-bit self. On a CPU a layer that is
trained through rebuilds its whole weight in the dtype of the activations (autograd/_functions.py, MatMul8bitFp).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.ledger.ledger import Ledger
from bench.methods.quantized.low_bit import quantize_layers
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THRESHOLD = 6.0  # of a column of activations, above which it is multiplied unquantized: BitsAndBytesConfig's default


def to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the layers that transformers would (see `low_bit`) in place."""
    quantize_layers(model, _int8_linear)
    model.is_loaded_in_8bit = True  # type: ignore[assignment]  # what transformers sets; PEFT looks at it
    return model


def _int8_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    bnb = _library()
    rows, columns = weight.shape
    with torch.device("meta"):
        quantized: Any = bnb.nn.Linear8bitLt(
            columns, rows, bias is not None, has_fp16_weights=False, threshold=THRESHOLD
        )
    quantized.weight = _int8_weight(weight)
    if bias is not None:
        quantized.bias = nn.Parameter(bias.data, requires_grad=False)
    return quantized


def _int8_weight(weight: Tensor) -> Any:
    """[N, K] in int8 with an fp32 scale a row; bitsandbytes quantizes what comes from the host's memory."""
    kind = _library().nn.Int8Params
    if not weight.is_meta:
        return kind(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    codes, stats = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(weight.shape[0], dtype=torch.float32)
    return kind(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=stats)


def int8_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Codes and scales of all int8 layers; a scale is with the weight until the layer's first forward, then in its
    state.
    """
    parts: dict[str, list[Tensor]] = {"codes": [], "scales": []}
    for layer in model.modules():
        weight: Any = layer._parameters.get("weight")
        if hasattr(weight, "SCB"):
            parts["codes"].append(weight.data)
            parts["scales"].append(weight.SCB if weight.SCB is not None else layer.state.SCB)  # type: ignore[union-attr, arg-type]
    return parts


def quantize_rows(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8_vectorwise_quant of activations [T, K] in fp16: codes, one scale a row, and the columns with outliers, of
    which there are none (bitsandbytes/backends/cuda/ops.py). How many there are hangs on the weights; each is kept for
    backward. Random ones give every down projection of Llama-3.2-1B 795 of 8,192: 0.8 % of a step's bytes.
    """
    rows = args[0]
    threshold = kwargs.get("threshold", args[1] if len(args) > 1 else 0.0)
    stats = rows.new_empty(rows.numel() // rows.shape[-1], dtype=torch.float32)
    ledger.see(stats)
    codes = rows.new_empty(rows.shape, dtype=torch.int8)
    ledger.see(codes)
    if not threshold:
        return codes, stats, None
    size = ledger.allocate(rows.nbytes)  # of every number
    ledger.release(ledger.allocate(rows.numel()))  # whether it is an outlier
    ledger.release(size)
    return codes, stats, rows.new_empty(0, dtype=torch.int64)


def mixed_product(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """int8_mixed_scaled_mm without outliers: sums in int32, then scaled in fp16, then in the activations' dtype."""
    rows, codes, weight = args[:3]
    shape = *codes.shape[:-1], weight.shape[0]
    nothing = rows.new_empty(0)
    sums = ledger.allocate(4 * rows.shape[:-1].numel() * weight.shape[0])
    scaled = rows.new_empty(shape, dtype=torch.float16)
    ledger.see(scaled)
    out = scaled.to(rows.dtype)
    ledger.see(out)
    ledger.release(sums)
    return out, nothing


@cache
def int8_rules() -> dict[Any, Any]:
    """Operators of bitsandbytes that have a result which depends on data."""
    _library()
    operators = torch.ops.bitsandbytes
    return {
        operators.int8_vectorwise_quant.default: quantize_rows,
        operators.int8_mixed_scaled_mm.default: mixed_product,
    }


def _library() -> Any:
    with quiet_libraries():
        import bitsandbytes
    return bitsandbytes
