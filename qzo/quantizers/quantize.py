"""Quantization of a whole model in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from qzo.checkpoints.save import writes_itself
from qzo.errors import QzoError, named
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.vocabulary import QuantEmbedding, TiedQuantHead, check_table
from qzo.kernels.rounding.gptq import GptqOptions
from qzo.kernels.rounding.sizes import check_bits
from qzo.models.walk import freeze, output_head, replace_sites
from qzo.quantizers.gptq_model import quantize_gptq, read_batches
from qzo.quantizers.selection import Patterns, select
from qzo.quantizers.trace import Batch


def quantize(
    model: nn.Module,
    n_bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "rtn",
    embeddings: int | None = None,
    calibration: Iterable[Batch] | None = None,
    act_order: bool = False,
    static_groups: bool = False,
    damping: float = 0.01,
    skip: Patterns = None,
    only: Patterns = None,
) -> nn.Module:
    """Replace, in place, every linear layer but the heads by a QuantLinear; returns the model.

    W ≈ Δ ⊙ W_int: see `QuantLinear`, `round_to_nearest` and `gptq`. Linear layers are nn.Linear, subclasses that
    compute the same, transformers' Conv1D and the stacked experts of mixture models. Old weights are freed layer by
    layer; every parameter that remains is frozen. "rtn" works on a model on `meta`, without data. Move the model to its
    device and dtype before `qzo.scales`.

    A layer that the layout cannot hold (in_features that the group size does not divide, a router of a few columns)
    stays in 16 bits, and is told of by a warning of the logger "qzo"; where that is more than half of the weights, it
    is an error.

    Args:
        model: any nn.Module; the head is what `get_output_embeddings()` names.
        n_bits: 2, 3, 4 or 8.
        group_size: weights along K that share a scale; -1 is the whole row.
        symmetric: one zero point 2^(b-1) for all groups, or one for each.
        method: "rtn", round to nearest, or "gptq", which needs `calibration` and makes the error of each layer's
            output small, on the inputs that it gets from the quantized layers before it.
        embeddings: 8 quantizes input embedding and head too (symmetric, sharing the codes where they are tied). 8-bit
            scales are 17 times smaller than 4-bit ones of like weights: train them, if at all, with a smaller `eps`.
        calibration: batches of text for "gptq": input_ids int64 [batch, tokens], or mappings of keyword arguments;
            read once. 64 sequences of 128 tokens do, best without padding, which counts as text. Extra memory: see
            `quantize_in_order`.
        act_order, static_groups, damping: for "gptq", see `GptqOptions`.
        skip: names of modules that stay in 16 bits. A name is the path of a module or the end of one, in whole parts,
            with * for anything: "mlp.gate", "layers.0", "*_proj"; all layers inside a module that is named are named
            too. "re:" before a regular expression matches paths from their start. One name, or several.
        only: such names too; what they do not name stays in 16 bits.

    Raises QzoError, with the layer's name; before the first layer is replaced for all that can be known by then.
    """
    options = _options(method, calibration, n_bits, group_size, symmetric, act_order, static_groups, damping)
    if embeddings not in (None, 8):
        raise QzoError(f"embeddings={embeddings} is not supported; choose 8 bits, or None to leave them unquantized")
    check_bits(n_bits)
    selection = select(model, n_bits, group_size, skip, only)
    batches = [] if calibration is None else read_batches(model, calibration)
    if embeddings is not None:
        quantize_embeddings(model, embeddings, group_size)

    if options is not None:
        selection.sites.clear()  # they would keep the old layers alive
        quantize_gptq(model, options, batches, selection)
        selection.tell()
        writes_itself(model)
        return freeze(model)

    def build(_: int, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        return QuantLinear.from_weight(weight, bias, n_bits, group_size, symmetric)

    replace_sites(model, selection.sites, build)
    selection.tell()
    writes_itself(model)
    return freeze(model)


def _options(
    method: str, calibration: Iterable[Batch] | None, n_bits: int, group_size: int, symmetric: bool, *gptq_only: Any
) -> GptqOptions | None:
    """What GPTQ is told, None for another method."""
    if method == "gptq":
        if calibration is None:
            raise QzoError('method="gptq" needs calibration text: pass calibration=[input_ids, ...]')
        return GptqOptions(n_bits, group_size, symmetric, *gptq_only)
    if method != "rtn":
        raise QzoError(f'method="{method}" is not known; choose "rtn" or "gptq"')
    if calibration is not None or any(gptq_only[:2]):
        raise QzoError('method="rtn" knows no calibration, act_order or static_groups; choose method="gptq"')
    return None


def quantize_embeddings(model: nn.Module, n_bits: int, group_size: int) -> None:
    """Input embedding -> QuantEmbedding, head -> TiedQuantHead, in place; both are checked before either is replaced.

    `n_bits` and `group_size` as in `quantize`. Raises QzoError, with the module's name.
    """
    getter = getattr(model, "get_input_embeddings", None)
    embedding, head = None if getter is None else getter(), output_head(model)
    if type(embedding) is not nn.Embedding:
        raise QzoError(
            f"embeddings={n_bits}: the input embedding is a {type(embedding).__name__}, not nn.Embedding; leave "
            "embeddings out"
        )
    if head is not None and type(head) is not nn.Linear:
        raise QzoError(
            f"embeddings={n_bits}: the output head is a {type(head).__name__}, not nn.Linear; leave embeddings out"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    for module in (embedding, head):
        if module is not None:
            with named(paths[id(module)]):
                check_table(module.weight.shape[1], n_bits, group_size)
    table = QuantEmbedding.from_weight(embedding.weight.detach(), n_bits, group_size)
    if head is not None:
        tied = head.weight is embedding.weight
        own = table if tied else QuantEmbedding.from_weight(head.weight.detach(), n_bits, group_size)
        model.set_submodule(paths[id(head)], TiedQuantHead(own, head.bias))
    model.set_submodule(paths[id(embedding)], table)
