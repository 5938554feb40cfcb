"""AQLM 1x16: eight weights share one 16-bit code into a codebook of their layer, two bits a weight.

Layout of the `aqlm` library: Egiazarian et al., "Extreme Compression of Large Language Models via Additive
Quantization", arXiv 2401.06118. Codes are drawn at random here: for measuring memory and time, not accuracy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qzo.chunked import RebuiltLinear
from qzo.errors import QzoError
from qzo.linear import Device
from qzo.noise import mix_seed
from qzo.walk import LinearShape, find_sites, freeze, replace_sites

GROUP_SIZE = 8  # weights to a code
CODEBOOK_SIZE = 2**16


class AqlmLinear(RebuiltLinear):
    """y = x Wᵀ + bias with W[n, 8j : 8j+8] = scale[n] * codebook[code[n, j]].

    Buffers: codes int16 [N, K/8, 1] (read as unsigned), codebooks [1, 65536, 1, 8] and scales [N, 1, 1, 1], both in
    the working dtype. `bias` is a frozen parameter [N] or None. W is rebuilt chunk by chunk and never whole. Build
    with `empty` or `random`.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """Take the tensors as they are."""
        super().__init__()
        self.out_features, self.in_features = codes.shape[0], codes.shape[1] * GROUP_SIZE
        for name, tensor in (("codes", codes), ("codebooks", codebooks), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AqlmLinear:
        """A layer with uninitialized tensors on any device, `meta` included. Raises QzoError if 8 does not divide K."""
        _check(LinearShape(in_features, out_features))
        codes = torch.empty(out_features, in_features // GROUP_SIZE, 1, dtype=torch.int16, device=device)
        codebooks = torch.empty(1, CODEBOOK_SIZE, 1, GROUP_SIZE, dtype=dtype, device=device)
        scales = torch.empty(out_features, 1, 1, 1, dtype=dtype, device=device)
        return cls(codes, codebooks, scales, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        seed: int = 0,
        std: float = 0.02,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AqlmLinear:
        """A layer whose W has standard deviation `std`: uniform codes, normal codebook; global RNG untouched."""
        layer = cls.empty(in_features, out_features, False, dtype, device)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.scales.fill_(std)
        if not layer.codes.is_meta:
            generator = torch.Generator(device=layer.codes.device).manual_seed(mix_seed(seed))
            layer.codes.random_(-(2**15), 2**15, generator=generator)
            layer.codebooks.normal_(generator=generator)
        return layer

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W, [stop - start, K]."""
        index = self.codes[start:stop, :, 0].to(torch.int32).bitwise_and_(CODEBOOK_SIZE - 1)
        vectors = nn.functional.embedding(index, self.codebooks.view(CODEBOOK_SIZE, GROUP_SIZE))
        rows = vectors.view(stop - start, self.in_features)
        scale = scales[start:stop].view(-1, 1)
        return (rows * scale if scale.requires_grad else rows.mul_(scale)).to(dtype)


def quantize_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Replace the layers that `qzo.quantize` would by AqlmLinear with random codes, in place; returns the model.

    Each layer keeps the standard deviation of its weight (0.02 on `meta`), its bias, dtype and device. What remains
    is frozen. Raises QzoError before the first layer is replaced.
    """
    sites = find_sites(model)
    for site in sites:
        for name, shape in site.shapes():
            _check(shape, name)
    replace_sites(model, sites, partial(_random_like, seed))
    return freeze(model)


def _random_like(seed: int, index: int, weight: Tensor, bias: Tensor | None) -> AqlmLinear:
    std = 0.02 if weight.is_meta else float(weight.float().std())
    rows, columns = weight.shape
    return AqlmLinear.random(columns, rows, mix_seed(seed, index), std, bias, weight.dtype, weight.device)


def _check(shape: LinearShape, name: str = "") -> None:
    if shape.in_features % GROUP_SIZE:
        layer = f"{name}: " if name else ""
        raise QzoError(
            f"{layer}in_features={shape.in_features} is not divisible by {GROUP_SIZE}, the weights to an AQLM code; "
            "use qzo.quantize"
        )
