"""Embedding and output head that share one table of low-bit codes."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import Device, Quantized, frozen, scale_dtype
from qzo.kernels.rebuilt import chunked_linear
from qzo.kernels.rounding.rtn import round_to_nearest
from qzo.kernels.rounding.sizes import check_bits, resolve_group_size


class QuantEmbedding(Quantized):
    """E[v, k] = (q[v, k] - 2^(b-1)) * scale[v, k // g]; forward gathers the rows asked for, then dequantizes them.

    Buffers: codes uint8 [V, K*b/8], lowest bits first; scales [V, K/g] fp32 or fp16. Rows are gathered from either,
    so the dequantized table never exists. `dtype` is the dtype of the rows returned. Build with `empty` or
    `from_weight`.
    """

    codes: Tensor
    scales: Tensor
    is_table = True

    def __init__(self, codes: Tensor, scales: Tensor, n_bits: int, dtype: torch.dtype) -> None:
        """Take codes [V, K*b/8] and scales [V, K/g] as they are."""
        super().__init__()
        self.n_bits, self.dtype = n_bits, dtype
        self.num_embeddings, self.embedding_dim = codes.shape[0], codes.shape[1] * 8 // n_bits
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def empty(
        cls,
        num_embeddings: int,
        embedding_dim: int,
        n_bits: int = 8,
        group_size: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> QuantEmbedding:
        """A table with uninitialized tensors on any device, `meta` included. Raises QzoError."""
        group_size = check_table(embedding_dim, n_bits, group_size)
        codes = torch.empty(num_embeddings, embedding_dim * n_bits // 8, dtype=torch.uint8, device=device)
        scales = torch.empty(num_embeddings, embedding_dim // group_size, dtype=scale_dtype(dtype), device=device)
        return cls(codes, scales, n_bits, dtype)

    @classmethod
    def from_weight(cls, weight: Tensor, n_bits: int = 8, group_size: int = 128) -> QuantEmbedding:
        """Quantize `weight` [V, K] by symmetric round-to-nearest; a weight on `meta` gives `empty`. Raises QzoError."""
        rows, columns = weight.shape
        if weight.is_meta:
            return cls.empty(rows, columns, n_bits, group_size, weight.dtype, weight.device)
        group_size = check_table(columns, n_bits, group_size)
        codes, scales, _ = round_to_nearest(weight, n_bits, group_size, True, scale_dtype(weight.dtype))
        packed = torch.zeros(rows, columns * n_bits // 8, dtype=torch.uint8, device=weight.device)
        for position in range(8 // n_bits):
            packed.bitwise_or_(codes[:, position :: 8 // n_bits] << (position * n_bits))
        return cls(packed, scales, n_bits, weight.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] int -> [..., K]; differentiable in `scales` where it requires a gradient."""
        codes = nn.functional.embedding(input_ids, self.codes)
        rows = self._dequantize(codes, nn.functional.embedding(input_ids, self.scales), self.dtype)
        return rows.view(*input_ids.shape, self.embedding_dim)

    def project(self, x: Tensor) -> Tensor:
        """x Eᵀ, [..., K] -> [..., V]; differentiable in x and, where it requires a gradient, in the scales."""
        return chunked_linear(x, self.rows, (self.num_embeddings, self.embedding_dim), self.scales)

    def whole(self) -> Tensor:
        """The dequantized table [V, K] in the dtype of its rows."""
        return self.rows(0, self.num_embeddings, self.dtype, self.scales)

    def rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of the dequantized table, [stop - start, K]."""
        return self._dequantize(self.codes[start:stop], scales[start:stop], dtype).view(-1, self.embedding_dim)

    def _dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """codes [..., K*b/8] and scales [..., K/g] -> [..., K/g, g], computed in fp32 and rounded once."""
        shifts = torch.arange(0, 8, self.n_bits, dtype=torch.uint8, device=codes.device)
        levels = torch.bitwise_right_shift(codes[..., None], shifts).bitwise_and_(2**self.n_bits - 1)
        values = levels.reshape(*scales.shape, -1).to(torch.float32).sub_(2 ** (self.n_bits - 1))
        scale = scales.float()[..., None]
        return (values * scale if scale.requires_grad else values.mul_(scale)).to(dtype)


class Table(Protocol):
    """A vocabulary that multiplies too."""

    def project(self, x: Tensor) -> Tensor:
        """x Eᵀ, [..., K] -> [..., V]."""

    def whole(self) -> Tensor:
        """E [V, K], made anew at each call."""


class TiedQuantHead(nn.Module):
    """logits = h Eᵀ + bias over a table of codes, shared with the input embedding where the two are tied.

    Logits are computed for `CHUNK_ELEMENTS` of the vocabulary at a time. `table` adds no memory when it is shared.
    """

    def __init__(self, table: Table, bias: Tensor | None = None) -> None:
        """Use `table` as it is; `bias` [V] is frozen."""
        super().__init__()
        self.table: Table = table
        self.bias = frozen(bias)

    @property
    def weight(self) -> Tensor:
        """E [V, K] as a head has it, for losses that multiply with it themselves; made anew, and not kept."""
        return self.table.whole()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., V] in x's dtype; differentiable in x and, where it requires a gradient, in the scales."""
        y = self.table.project(x)
        return y if self.bias is None else y.add_(self.bias)


def check_table(embedding_dim: int, n_bits: int, group_size: int) -> int:
    """Return the group size of a table of this width; raise QzoError where codes do not fill whole bytes."""
    check_bits(n_bits)
    if 8 % n_bits or embedding_dim * n_bits % 8:
        raise QzoError(f"embedding_dim={embedding_dim} of {n_bits}-bit codes does not fill whole bytes; use 8 bits")
    return resolve_group_size(embedding_dim, group_size)
