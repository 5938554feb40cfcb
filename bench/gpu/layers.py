"""Layers of every format that kernels for a GPU read, with random codes, made without the formats' libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from qzo.formats.awq.layer import AwqLinear
from qzo.formats.bnb.layer import BnbLinear4bit
from qzo.formats.gguf.codes import BLOCK_TYPES
from qzo.formats.gguf.layer import GgufLinear
from qzo.formats.gptq.layer import QuantLinear

Layer = QuantLinear | AwqLinear | GgufLinear | BnbLinear4bit
Shape = tuple[int, int]
SPREAD = 0.02  # of weights


def _gptq(shape: Shape, device: torch.device, n_bits: int, symmetric: bool = True, ordered: bool = False) -> Layer:
    weight = torch.randn(shape, device=device).mul_(SPREAD).to(torch.bfloat16)
    layer = QuantLinear.from_weight(weight, None, n_bits, _group(shape), symmetric)
    if ordered:
        layer.g_idx.copy_(layer.g_idx[torch.randperm(shape[1], device=device)])
        layer.read_layout()
    return layer


def _awq(shape: Shape, device: torch.device) -> Layer:
    weight = torch.randn(shape, device=device).mul_(SPREAD).to(torch.bfloat16)
    return AwqLinear.from_weight(weight, None, _group(shape))


def _group(shape: Shape) -> int:
    return min(128, shape[1])


def _gguf(shape: Shape, device: torch.device, name: str) -> Layer:
    kind = next(kind for kind in BLOCK_TYPES.values() if kind.name == name)
    layer = GgufLinear.empty(shape[1], shape[0], kind, device=device)
    layer.blocks.random_(0, 256)
    for tensor in layer.views().values():
        tensor.copy_(torch.randn(tensor.shape, device=device).mul_(SPREAD / 8))
    return layer


def _nf4(shape: Shape, device: torch.device) -> Layer:
    layer = BnbLinear4bit.empty(shape[1], shape[0], device=device)
    layer.qweight.random_(0, 256)
    layer.scales.uniform_(SPREAD, 4 * SPREAD)
    layer.quant_map.copy_(torch.randn(16, device=device).sort().values)
    return layer


FORMATS: dict[str, Callable[[Shape, torch.device], Layer]] = {  # most wanted first
    "gptq-4": partial(_gptq, n_bits=4),
    "gguf-q4_1": partial(_gguf, name="Q4_1"),
    "nf4": _nf4,
    "awq": _awq,
    "gptq-4-order": partial(_gptq, n_bits=4, symmetric=False, ordered=True),
    "gguf-q4_0": partial(_gguf, name="Q4_0"),
    "gguf-q8_0": partial(_gguf, name="Q8_0"),
    "gptq-3": partial(_gptq, n_bits=3),
    "gptq-2": partial(_gptq, n_bits=2),
    "gptq-8": partial(_gptq, n_bits=8),
}
