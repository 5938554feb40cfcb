"""The quantization formats that `--quantization` names, for the methods `qzo` and `qzo-full`.

A model is quantized layer by layer as each format does it by default, on `meta` by shapes and bytes alone. What is
measured is memory and time: a library's calibration (AWQ, AQLM) is left out. Libraries are imported where they are
used, on data alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bench.cases.group_sizes import default_group_size
from qzo.errors import QzoError
from qzo.formats.aqlm.layer import AqlmLayout
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.bnb import library as bnb
from qzo.formats.bnb.nesting import nest, unnest
from qzo.formats.gguf.codes import BLOCK_TYPES
from qzo.formats.gguf.layer import GgufLinear
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.hqq import library as hqq
from qzo.formats.torchao import library as torchao
from qzo.formats.torchao.layer import AoInt4Linear
from qzo.models.walk import find_sites, freeze, replace_sites
from qzo.optim.noise import mix_seed
from qzo.quantizers.aqlm import from_weight, random_layer
from qzo.quantizers.quantize import quantize_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING_BITS = 8
FOLLOW = "follow"  # what a record says of offsets that move with their scales; where they stay it says nothing
Build = Callable[[Tensor, Tensor | None, int, int], nn.Module]


@dataclass(frozen=True)
class Quantization:
    """One format.

    Args:
        format, bits: as records say them; bits of a code, codes and codebooks aside.
        build: `build(weight [N, K], bias, group_size, seed)` is a layer; a weight on `meta` gives one without data.
        group_size: weights that share a scale or, in AQLM, a code; None is the whole row, 0 the largest of 128, 64 and
            32 that divides every layer of the model.
        any_group_size: whether another one may be asked for.
        note: what a reader of a record must know.
    """

    format: str
    bits: int
    build: Build
    group_size: int | None = 0
    any_group_size: bool = True
    note: str | None = None


def _gptq(n_bits: int, weight: Tensor, bias: Tensor | None, group_size: int, _: int) -> nn.Module:
    return QuantLinear.from_weight(weight, bias, n_bits, group_size)


def _awq(weight: Tensor, bias: Tensor | None, group_size: int, _: int) -> nn.Module:
    return AwqLinear.from_weight(weight, bias, group_size)


def _nf4(nested: bool, weight: Tensor, bias: Tensor | None, group_size: int, _: int) -> nn.Module:
    layer: Any = bnb.quantize(weight, bias, "nf4", group_size)
    if nested and not weight.is_meta:
        nested_map = bnb.quant_map()
        codes, absmax, offset = nest(layer.scales, nested_map)
        layer.assign(layer.qweight, unnest(codes, absmax, nested_map, offset), layer.quant_map, bias)
    return layer


def _int8(weight: Tensor, bias: Tensor | None, _: int, __: int) -> nn.Module:
    return bnb.quantize(weight, bias, "int8")


def _gguf(kind: str, weight: Tensor, bias: Tensor | None, _: int, __: int) -> nn.Module:
    return GgufLinear.from_weight(weight, bias, next(block for block in BLOCK_TYPES.values() if block.name == kind))


def _hqq(n_bits: int, weight: Tensor, bias: Tensor | None, group_size: int, _: int) -> nn.Module:
    return hqq.quantize(weight, bias, n_bits, group_size)


def _aqlm_random(weight: Tensor, bias: Tensor | None, _: int, seed: int) -> nn.Module:
    std = 0.02 if weight.is_meta else float(weight.float().std())
    return random_layer(weight.shape[1], weight.shape[0], seed, std, bias, weight.dtype, weight.device)


def _aqlm_2x8(weight: Tensor, bias: Tensor | None, _: int, seed: int) -> nn.Module:
    return from_weight(weight, bias, AqlmLayout(2, 8), seed)


def _torchao_int8(weight: Tensor, bias: Tensor | None, _: int, __: int) -> nn.Module:
    return torchao.quantize(weight, bias)


def _torchao_int4(weight: Tensor, bias: Tensor | None, group_size: int, _: int) -> nn.Module:
    return AoInt4Linear.from_weight(weight, bias, group_size)


DEFAULT = "gptq"
RANDOM = "AQLM codes drawn at random: memory, not accuracy"
UNNESTED = "double quantization is undone while scales are trained: the bytes of nf4"
FORMATS: dict[str, Quantization] = {
    DEFAULT: Quantization("gptq", 4, partial(_gptq, 4)),
    **{f"gptq-{bits}": Quantization("gptq", bits, partial(_gptq, bits)) for bits in (2, 3, 4, 8)},
    "awq": Quantization("awq", 4, _awq),
    "nf4": Quantization("nf4", 4, partial(_nf4, False), 64),
    "nf4-double": Quantization("nf4-double", 4, partial(_nf4, True), 64, note=UNNESTED),
    "int8": Quantization("int8", 8, _int8, None, False),
    **{
        f"gguf-{kind.lower()}": Quantization(f"gguf-{kind.lower()}", int(kind[1]), partial(_gguf, kind), 32, False)
        for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
    },
    **{f"hqq-{bits}": Quantization("hqq", bits, partial(_hqq, bits), 64) for bits in (1, 2, 3, 4, 8)},
    "aqlm-1x16": Quantization("aqlm-1x16", 2, _aqlm_random, 8, False, RANDOM),
    "aqlm-2x8": Quantization("aqlm-2x8", 2, _aqlm_2x8, 8, False),
    "torchao-int8": Quantization("torchao-int8", 8, _torchao_int8, None, False),
    "torchao-int4": Quantization("torchao-int4", 4, _torchao_int4),
}


def check_group_size(name: str, group_size: int | None) -> None:
    """Raise QzoError for a group size that the format has no room for."""
    known = FORMATS[name]
    if group_size not in (None, known.group_size) and not known.any_group_size:
        has = f"groups of {known.group_size}" if known.group_size else "one scale for each row"
        raise QzoError(f"group_size={group_size} does not go with quantization {name!r}, which has {has}; leave it out")


def named(about: Mapping[str, Any]) -> str | None:
    """The name of what a record says of its quantization; None for the default and for what is none of `FORMATS`."""
    key = about.get("format"), about.get("bits")
    if key == (FORMATS[DEFAULT].format, FORMATS[DEFAULT].bits):
        return None
    return next((name for name, known in FORMATS.items() if (known.format, known.bits) == key), None)


def quantize_as(
    model: PreTrainedModel, name: str, group_size: int | None = None, seed: int = 0, embeddings: bool = False
) -> dict[str, Any]:
    """Replace, in place, the layers that `qzo.quantize` would; what remains is frozen.

    Args:
        model: with data or on `meta`.
        name: of `FORMATS`.
        group_size: None takes the format's own.
        seed: of codes that are drawn.
        embeddings: put input embedding and head in 8 bits too.

    Returns what a record says of the quantization: format, bits, group_size. Raises QzoError, with a layer's name, for
    sizes that the format cannot hold, and for a missing library.
    """
    known = FORMATS[name]
    chosen = group_size or known.group_size
    if chosen == 0:
        chosen = default_group_size(model)
    sites = find_sites(model)
    if embeddings:
        quantize_embeddings(model, EMBEDDING_BITS, group_size or default_group_size(model))
    replace_sites(
        model, sites, lambda index, weight, bias: known.build(weight, bias, chosen or 0, mix_seed(seed, index))
    )
    freeze(model)
    return {"format": known.format, "bits": known.bits, "group_size": chosen}
