"""A layer of every format that kernels for a GPU read, with random codes, at whatever shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from qzo.formats.awq.layer import AwqLinear
from qzo.formats.bnb.layer import BnbLinear4bit
from qzo.formats.gguf.codes import BLOCK_TYPES
from qzo.formats.gguf.layer import GgufLinear
from qzo.formats.gptq.layer import QuantLinear

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}
Shape = tuple[int, int]


def gptq(
    shape: Shape, n_bits: int = 4, group_size: int = 32, symmetric: bool = True, act_order: bool = False,
    short_group: bool = False, dtype: torch.dtype = torch.float16,
) -> QuantLinear:  # fmt: skip
    """With an even number of groups where `act_order`, whose order is then any."""
    rows, columns = shape
    layer = QuantLinear.empty(columns, rows, n_bits, group_size, dtype=dtype, short_group=short_group)
    _random(layer.qweight)
    layer.qzeros.random_(-(2**31), 2**31 - 1)
    if symmetric:  # 0b1000 1000 ..., for 3 bits any one zero point needs a pattern of 96 bits
        layer.qzeros.fill_({2: -0x55555556, 4: -0x77777778, 8: -0x7F7F7F80}.get(n_bits, 0))
    if act_order:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(columns)])
    _scales(layer.scales)
    layer.read_layout()
    assert (layer.zero is not None) == symmetric and layer.act_order == act_order
    return layer


def awq(shape: Shape, group_size: int = 32) -> AwqLinear:
    """Zero points differ."""
    layer = AwqLinear.empty(shape[1], shape[0], group_size)
    _random(layer.qweight)
    _random(layer.qzeros)
    _scales(layer.scales)
    return layer


def gguf(shape: Shape, name: str) -> GgufLinear:
    """Scales, and offsets where there are any, may be negative."""
    layer = GgufLinear.empty(shape[1], shape[0], TYPES[name])
    _random(layer.blocks)
    for tensor in layer.views().values():
        _scales(tensor)
    return layer


def nf4(shape: Shape, block_size: int = 64) -> BnbLinear4bit:
    """Blocks may go on from one row to the next."""
    layer = BnbLinear4bit.empty(shape[1], shape[0], "nf4", block_size)
    _random(layer.qweight)
    _scales(layer.scales)
    layer.quant_map.copy_(torch.randn(16).sort().values)
    return layer


def _random(codes: torch.Tensor) -> None:
    info = torch.iinfo(codes.dtype)
    codes.random_(info.min, info.max)


def _scales(tensor: torch.Tensor) -> None:
    tensor.copy_(torch.randn(tensor.shape) * 0.1)


# name -> (shape -> layer); what a kernel is compiled for differs between any two of them
FORMATS: dict[str, Callable[[Shape], nn.Module]] = {
    **{f"gptq-{n_bits}": partial(gptq, n_bits=n_bits) for n_bits in (2, 3, 4, 8)},
    **{f"gptq-{n_bits}-zeros": partial(gptq, n_bits=n_bits, symmetric=False) for n_bits in (2, 3, 4, 8)},
    "gptq-3-zeros-order": partial(gptq, n_bits=3, symmetric=False, act_order=True),
    "gptq-4-zeros-order": partial(gptq, symmetric=False, act_order=True),
    "awq": awq,
    "gguf-q4_0": partial(gguf, name="Q4_0"),
    "gguf-q4_1": partial(gguf, name="Q4_1"),
    "gguf-q8_0": partial(gguf, name="Q8_0"),
    "nf4": nf4,
}
