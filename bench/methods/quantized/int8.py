"""bitsandbytes' int8 layers (LLM.int8) in place of a model's linear layers, on tensors without data."""

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
        codes, stats = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    quantized.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=stats)
    if bias is not None:
        quantized.bias = nn.Parameter(bias.data, requires_grad=False)
    return quantized


def quantize_rows(ledger: Ledger, func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8_vectorwise_quant of activations [T, K] in fp16: codes, one scale a row, and the columns with outliers, of
    which there are none (bitsandbytes/backends/cuda/ops.py).
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
