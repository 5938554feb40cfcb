"""GPTQ on a whole model: its calibration batches checked, its experts opened, every layer replaced."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.layer import scale_dtype
from qzo.kernels.rounding.gptq import GptqOptions, gptq
from qzo.models.experts import QuantExperts, looks_like_experts
from qzo.models.walk import candidates, put, weight_of
from qzo.quantizers.layer_inputs import quantize_in_order
from qzo.quantizers.selection import Selection
from qzo.quantizers.trace import Batch, Paths, trace


def read_batches(model: nn.Module, calibration: Iterable[Batch]) -> list[Batch]:
    """The batches as a list. Raises QzoError for none, tokens that the model does not know, and a model on `meta`."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise QzoError('method="gptq" needs weights, but the model is on meta; load it, or choose method="rtn"')
    batches = list(calibration)
    if not batches:
        raise QzoError("calibration is empty; give at least one batch of input_ids [batch, tokens]")
    getter = getattr(model, "get_input_embeddings", None)
    for number, batch in enumerate(batches):
        ids = batch if isinstance(batch, Tensor) else batch.get("input_ids")
        if getter is not None and ids is not None:
            _check_ids(number, ids, model, getter().num_embeddings)
    return batches


def _check_ids(number: int, ids: Tensor, model: nn.Module, vocabulary: int) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise QzoError(
            f"calibration batch {number} is {ids.dtype} {tuple(ids.shape)}; need input_ids [batch, tokens] of "
            "integers: give those of a tokenizer"
        )
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise QzoError(
            f"calibration batch {number} has {ids.shape[1]} tokens a sequence, but the model reads {longest}; give "
            "shorter ones (--seq-len)"
        )
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise QzoError(
            f"calibration batch {number} has tokens {low} ... {high}, but the model knows 0 ... {vocabulary - 1}; "
            "give those of its own tokenizer"
        )


@torch.no_grad()
def quantize_gptq(model: nn.Module, options: GptqOptions, batches: list[Batch], selection: Selection) -> None:
    """Replace every layer that is selected by a QuantLinear; the model is in its own mode again afterwards.

    An expert that the router never chose gets round-to-nearest codes. Raises QzoError, with the layer's name.
    """
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        _open_experts(model, selection)
        sites = [site for site in candidates(model) if not selection.keeps(site.paths[0])]
        dtypes = {site.paths: weight_of(site.module).dtype for site in sites}
        plan = trace(model, sites, batches[0])
        del sites

        def replace(paths: Paths, hessian: Tensor) -> None:
            layer = model.get_submodule(paths[0])
            codes = gptq(weight_of(layer), hessian, options, scale_dtype(dtypes[paths]))
            put(model, paths, QuantLinear.from_codes(*codes, bias=layer.bias, n_bits=options.n_bits))  # type: ignore[arg-type]

        quantize_in_order(model, plan, batches, replace)
    finally:
        for path, module in model.named_modules():  # parents come first
            module.training = modes.setdefault(path, modes[path.rpartition(".")[0]])


def _open_experts(model: nn.Module, selection: Selection) -> None:
    """Put a linear layer for each expert in the place of stacked weights, which the layers go on using."""

    def build(_: int, weight: Tensor, bias: Tensor | None) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    for path, module in list(model.named_modules()):
        if looks_like_experts(module) and not selection.keeps(path):
            put(model, (path,), QuantExperts.from_experts(module, build, 0))
