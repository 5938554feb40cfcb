"""bitsandbytes itself: its modules taken over and made again with the trained scales, and weights it quantizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.bnb.layer import BnbLinear4bit, BnbLinear8bit, BnbOrigin, Nested
from qzo.formats.bnb.nesting import NESTED_BLOCK, library, nest, unnest

KINDS = (BnbLinear4bit, BnbLinear8bit)
AVX512 = "packing_format_for_cpu"  # what the library calls it in a quant_state


def adopt(module: nn.Module) -> BnbLinear4bit | BnbLinear8bit | None:
    """Our layer on the codes of a Linear4bit or Linear8bitLt; None for any other module.

    Double quantization is undone, 4 bytes a block; the library's own tensors of it are kept until `release`. Raises
    QzoError for weights that are not quantized, are not in memory, or that a kernel of the library has rewritten.
    """
    names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    if "Linear4bit" in names:
        return _adopt_4bit(module)
    return _adopt_8bit(module) if "Linear8bitLt" in names else None


def _adopt_4bit(module: Any) -> BnbLinear4bit:
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    _check_there(module.weight, state)
    if getattr(state, AVX512, False):
        raise QzoError(
            "a CPU kernel of bitsandbytes rewrote its scales in bf16 at the first forward in eval mode, and their old "
            "values are lost; load the model again and call qzo.adopt before any forward, or call model.train() first"
        )
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        raise QzoError(f"its scales are quantized in blocks of {state.state2.blocksize}; need {NESTED_BLOCK}")
    if len(state.shape) != 2 or tuple(state.shape) != (module.out_features, module.in_features):
        raise QzoError(f"its weight has the shape {tuple(state.shape)}, which is not [out_features, in_features]")
    layer = BnbLinear4bit(module.in_features, module.out_features, state.quant_type, state.blocksize)
    layer.nested, layer.weight_dtype = state.nested, state.dtype
    nested = Nested(state.absmax, state.state2.absmax, state.state2.code, float(state.offset)) if state.nested else None
    layer.came_from(
        BnbOrigin(
            module.compute_dtype,
            module.compute_type_is_set,
            module.weight.dtype,
            nested,
            source_cls=getattr(module, "source_cls", None),
        )
    )
    scales = state.absmax if nested is None else unnest(*nested)
    return layer.assign(
        module.weight.data.contiguous().view(-1).view(torch.uint8).view(-1, 1), scales, state.code, module.bias
    )


def _adopt_8bit(module: Any) -> BnbLinear8bit:
    if module.state.has_fp16_weights:
        raise QzoError("has_fp16_weights=True quantizes anew in every forward; make it with has_fp16_weights=False")
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB  # they move at the first forward
    _check_there(module.weight, scales)
    layer = BnbLinear8bit(module.weight.data, scales, module.bias)
    source_cls = getattr(module, "source_cls", None)
    layer.came_from(BnbOrigin(threshold=module.state.threshold, index=module.index, source_cls=source_cls))
    return layer


def _check_there(weight: Tensor, state: Any) -> None:
    if weight.is_meta:
        raise QzoError("its weight is not in memory; load the model without offloading")
    if state is None:
        raise QzoError("its weight is not quantized yet; call model.to(device) first")


def release(layer: nn.Module) -> nn.Module:
    """The library's Linear4bit or Linear8bitLt on the layer's codes, with its scales. Raises QzoError without it."""
    return _linear4bit(layer) if isinstance(layer, BnbLinear4bit) else _linear8bit(layer)


def quantize(
    weight: Tensor, bias: Tensor | None = None, quant_type: str = "nf4", block_size: int = 64
) -> BnbLinear4bit | BnbLinear8bit:
    """Quantize `weight` [N, K] by the library: quant_type "nf4" or "fp4", or "int8", through fp16, a scale a row.

    A weight on `meta` gives an empty layer. The bias is not copied. Extra memory: 8 to 12 bytes a weight. Raises
    QzoError, also without the library.
    """
    rows, columns = weight.shape
    rest = (bias is not None, weight.dtype, weight.device)
    if quant_type == "int8":
        if weight.is_meta:
            return BnbLinear8bit.empty(columns, rows, *rest)
        codes, scales, _ = library().functional.int8_vectorwise_quant(weight.half())
        return BnbLinear8bit(codes, scales, bias)
    if weight.is_meta:
        return BnbLinear4bit.empty(columns, rows, quant_type, block_size, *rest)
    layer = BnbLinear4bit(columns, rows, quant_type, block_size)
    layer.weight_dtype = weight.dtype
    codes, state = library().functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    return layer.assign(codes, state.absmax, state.code, bias)


def quant_map() -> Tensor:
    """fp32 [256]: what the library rounds scales to in double quantization."""
    table: Tensor = library().functional.create_dynamic_map()
    return table


def _linear4bit(layer: BnbLinear4bit) -> nn.Module:
    """Its module on the same codes; scales that were nested are nested again, as they were where unchanged."""
    bnb, origin = library(), layer.origin or BnbOrigin()
    storage = origin.quant_storage
    names = {"compress_statistics": layer.nested, "quant_type": layer.quant_type, "quant_storage": storage}
    module = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, device="meta", **names)
    state = _quant_state(layer, bnb.functional.QuantState)
    module.weight = bnb.nn.Params4bit(
        layer.qweight.view(-1).view(storage).view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=layer.block_size,
        module=module,
        bnb_quantized=True,
        **names,
    )
    module.bias, module.quant_state = layer.bias, state
    module.compute_dtype, module.compute_type_is_set = origin.compute_dtype, origin.compute_type_is_set
    return _with_source(module, origin)


def _quant_state(layer: BnbLinear4bit, make: Any) -> Any:
    """The library's QuantState of a layer."""
    scales = layer.scales
    state = make(
        absmax=scales,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=layer.quant_map,
        blocksize=layer.block_size,
        quant_type=layer.quant_type,
        dtype=layer.weight_dtype,
    )
    if layer.nested:
        stored = None if layer.origin is None else layer.origin.nested
        if stored is None or not torch.equal(unnest(*stored).to(scales.device), scales):
            table = quant_map() if stored is None else stored.quant_map
            codes, absmax, offset = nest(scales, table)
            stored = Nested(codes, absmax, table, offset)
        codes, absmax, table, mean = (torch.as_tensor(part, device=scales.device) for part in stored)
        state.absmax, state.offset, state.nested = codes, mean, True
        state.state2 = make(absmax=absmax, code=table, blocksize=NESTED_BLOCK, dtype=torch.float32)
    return state


def _linear8bit(layer: Any) -> nn.Module:
    """The library's module on the same codes, in the state before its first forward."""
    bnb, origin = library(), layer.origin or BnbOrigin()
    module = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=origin.threshold,
        index=origin.index,
        device="meta",
    )
    module.weight = bnb.nn.Int8Params(
        layer.qweight, requires_grad=False, has_fp16_weights=False, CB=layer.qweight, SCB=layer.scales
    )
    module.bias = layer.bias
    return _with_source(module, origin)


def _with_source(module: Any, origin: BnbOrigin) -> nn.Module:
    """Note which class transformers replaced, as it does itself."""
    if origin.source_cls is not None:
        module.source_cls = origin.source_cls
    return module
