"""Quantization of a whole model in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qzo.embedding import QuantEmbedding, TiedQuantHead, check_table
from qzo.errors import QzoError, named
from qzo.layout import check_layout
from qzo.linear import QuantLinear
from qzo.walk import Site, find_sites, freeze, output_head, replace_sites


def quantize(
    model: nn.Module,
    n_bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    method: str = "rtn",
    embeddings: int | None = None,
) -> nn.Module:
    """Replace, in place, every linear layer but the output head by a QuantLinear; returns the model.

    W ≈ Δ ⊙ W_int: see `QuantLinear` and `round_to_nearest`. Linear layers are nn.Linear, transformers' Conv1D and the
    stacked experts of mixture models. Old weights are freed layer by layer; every parameter that remains is frozen.
    Works on a model on `meta`, without data. Move the model to its device and dtype before `qzo.scales`.

    Args:
        model: any nn.Module; the head is what `get_output_embeddings()` names.
        n_bits: 2, 4 or 8.
        group_size: weights along K that share a scale; -1 is the whole row.
        symmetric: one zero point 2^(b-1) for all groups, or one for each.
        method: "rtn", round to nearest.
        embeddings: 8 quantizes input embedding and head too (symmetric, sharing the codes where they are tied). 8-bit
            scales are 17 times smaller than 4-bit ones of like weights: train them, if at all, with a smaller `eps`.

    Raises QzoError, with the layer's name, before the first layer is replaced.
    """
    if method != "rtn":
        raise QzoError(f'method="{method}" is not known; choose "rtn"')
    if embeddings not in (None, 8):
        raise QzoError(f"embeddings={embeddings} is not supported; choose 8 bits, or None to leave them unquantized")
    sites = find_sites(model)
    _check_sites(sites, n_bits, group_size)
    if embeddings is not None:
        _quantize_embeddings(model, embeddings, group_size)

    def build(_: int, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        return QuantLinear.from_weight(weight, bias, n_bits, group_size, symmetric)

    replace_sites(model, sites, build)
    return freeze(model)


def _check_sites(sites: list[Site], n_bits: int, group_size: int) -> None:
    layers = [layer for site in sites for layer in site.shapes()]
    common = math.gcd(*(shape.in_features for _, shape in layers))
    for name, shape in layers:
        with named(name):
            check_layout(shape.in_features, shape.out_features, n_bits, group_size, common)
    for site in sites:
        with named(site.paths[0]):
            _check_finite(site.module)


def _check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_meta and not bool(torch.isfinite(torch.stack(parameter.detach().aminmax())).all()):
            raise QzoError(f"{name} has values that are not finite")


def _quantize_embeddings(model: nn.Module, n_bits: int, group_size: int) -> None:
    """Input embedding -> QuantEmbedding, head -> TiedQuantHead; both are checked before either is replaced."""
    getter = getattr(model, "get_input_embeddings", None)
    embedding, head = None if getter is None else getter(), output_head(model)
    if type(embedding) is not nn.Embedding:
        raise QzoError(f"embeddings={n_bits}: the input embedding is a {type(embedding).__name__}, not nn.Embedding")
    if head is not None and type(head) is not nn.Linear:
        raise QzoError(f"embeddings={n_bits}: the output head is a {type(head).__name__}, not nn.Linear")
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
