"""Weights of torchao as layers: int8 and int4, weight-only, on the very tensors of its subclasses.

AoInt8Linear   Int8Tensor, IntxUnpackedToInt8Tensor         W = (codes - zero_points) * scales
AoInt4Linear   Int4Tensor, Int4TilePackedTo4dTensor,        W = q * scales + offsets
               Int4OpaqueTensor
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import SCALE_DTYPES, CodesAsQweight, Device, RebuiltLinear, frozen
from qzo.formats.torchao.codes import WORD_DTYPE, unpacked, words_shape
from qzo.kernels import by_row
from qzo.kernels.constants import constant

TWOS_COMPLEMENT = (*range(8), *range(-8, 0))  # what four bits stand for


@dataclass(frozen=True)
class AoOrigin:
    """What the library's tensor needs besides its data, for `qzo.release`.

    Args:
        kind: its class, or the name of it.
        attributes: keyword -> value for its constructor.
        module: the nn.Linear that was taken over, to be given back; None for a layer from a file.
    """

    kind: type | str
    attributes: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None


class _AoLinear(CodesAsQweight, RebuiltLinear):
    """What both kinds share: buffers, bias and the way back."""

    codes: Tensor

    def __init__(self, shape: tuple[int, int], codes: Tensor, scales: Tensor, bias: Tensor | None, origin: AoOrigin):
        super().__init__()
        self.out_features, self.in_features = shape
        self.came_from(origin)
        self.compute_dtype: torch.dtype = origin.attributes.get("dtype", scales.dtype)
        if scales.dtype not in SCALE_DTYPES:
            raise QzoError(f"scales are {scales.dtype}; only float32, float16 and bfloat16 can be trained")
        if bias is not None and tuple(bias.shape) != shape[:1]:
            raise QzoError(f"the bias has shape {tuple(bias.shape)}, need {shape[:1]}")
        self.register_buffer("codes", codes.detach())
        self.register_buffer("scales", scales.detach())
        self.bias = frozen(bias)

    @property
    def type_name(self) -> str:
        """The library's class, e.g. Int8Tensor."""
        kind = self.origin.kind
        return kind if isinstance(kind, str) else str(kind.__name__)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scales={tuple(self.scales.shape)}, bias={self.bias is not None}"
        )


class AoInt8Linear(_AoLinear):
    """y = x Wᵀ + bias with W[n, k] = (codes[n, k] - zero_points[i, j]) * scales[i, j], i = n // b, j = k // g.

    Buffers: codes int8 [N, K]; scales [N / b, K / g] in fp32, fp16 or bf16; zero_points of the same shape, int8 or
    floating, or None. Rows have scales of their own (b = 1), or all share one (b = N, g = K).
    """

    zero_points: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None = None,
        bias: Tensor | None = None,
        origin: AoOrigin | None = None,
    ) -> None:
        """Take the tensors as they are. Raises QzoError for shapes and dtypes that do not belong together."""
        if codes.ndim != 2 or codes.dtype != torch.int8 or scales.ndim != 2 or not scales.numel():
            raise QzoError(
                f"codes are {codes.dtype} {tuple(codes.shape)}, scales have shape {tuple(scales.shape)}; "
                "need int8 [N, K] and two dimensions"
            )
        if any(size % count for size, count in zip(codes.shape, scales.shape, strict=True)):
            raise QzoError(f"scales have shape {tuple(scales.shape)}, which does not divide {tuple(codes.shape)}")
        if zero_points is not None and zero_points.shape != scales.shape:
            raise QzoError(f"zero points have shape {tuple(zero_points.shape)}, scales {tuple(scales.shape)}")
        rows, columns = codes.shape
        super().__init__((rows, columns), codes, scales, bias, origin or AoOrigin("Int8Tensor"))
        self.register_buffer("zero_points", None if zero_points is None else zero_points.detach())
        self.group_size = columns // scales.shape[1]
        self.n_bits = _bits_of(self.origin.attributes.get("target_dtype"))

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        group_size: int = -1,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AoInt8Linear:
        """A layer as Int8WeightOnlyConfig makes it, uninitialized, on any device; -1 is a scale for the whole row."""
        groups = 1 if group_size == -1 else in_features // group_size
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scales = torch.empty(out_features, groups, device=device)
        zeros = torch.empty(out_features, groups, dtype=torch.int8, device=device)
        bias_data = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        attributes = {"block_size": [1, in_features // groups], "dtype": dtype}
        return cls(codes, scales, zeros, bias_data, AoOrigin("Int8Tensor", attributes))

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`."""
        if by_row.can_rebuild(rows := self._by_row(start, stop, scales), dtype):
            return by_row.rebuild(rows, dtype)
        index = self._groups(start, stop)
        numbers = self.codes[start:stop].float().view(stop - start, scales.shape[1], -1)
        if self.zero_points is not None:
            numbers.sub_(self.zero_points.index_select(0, index).float()[..., None])
        scale = scales.index_select(0, index).float()[..., None]
        numbers = numbers * scale if scale.requires_grad else numbers.mul_(scale)
        return numbers.flatten(1).to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows:
        zeros, shape = self.zero_points, (stop - start, self.in_features)
        index = slice(start, stop) if len(scales) == self.out_features else self._groups(start, stop)
        zeros = None if zeros is None else zeros[index]
        return by_row.Rows(self.codes[start:stop], by_row.Order.BYTES, shape, scales[index], zeros)

    def _groups(self, start: int, stop: int) -> Tensor:
        """For each row the number of its scales."""
        share = self.out_features // len(self.scales)  # rows that have their scales in common
        return torch.arange(start, stop, device=self.scales.device) // share


class AoInt4Linear(_AoLinear):
    """y = x Wᵀ + bias with W[n, k] = q[n, k] * scales[k // g, n] + offsets[k // g, n], q = -8 ... 7.

    Buffers: codes in one of the three orders of `qzo.formats.torchao.codes`; scales and offsets [K / g, N] in one
    floating dtype, of "tiles" with padding. Where the library keeps both in one tensor, they are copies of its parts.
    An offset is no multiple of a scale: for a weight to move as a whole it follows, see `qzo.optim.offsets`.
    """

    offsets: Tensor
    n_bits = 4

    def __init__(
        self,
        order: str,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        offsets: Tensor,
        bias: Tensor | None = None,
        origin: AoOrigin | None = None,
    ) -> None:
        """Take the tensors as they are. Raises QzoError for shapes and dtypes that do not belong together."""
        padded = shape if order != "tiles" or codes.ndim != 4 else (codes.shape[0] * 8, codes.shape[1] * 128)
        wanted = words_shape(order, *padded)
        if codes.dtype != WORD_DTYPE[order] or tuple(codes.shape) != wanted or any(map(int.__lt__, padded, shape)):
            raise QzoError(f"codes are {codes.dtype} {tuple(codes.shape)}, need {WORD_DTYPE[order]} {wanted}")
        groups = len(scales) if scales.ndim == 2 else 0
        if not groups or tuple(scales.shape) != (groups, padded[0]) or padded[1] % groups or shape[1] % groups:
            raise QzoError(f"scales have shape {tuple(scales.shape)}, which does not divide {padded[::-1]}")
        if offsets.shape != scales.shape or offsets.dtype != scales.dtype:
            raise QzoError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}, unlike the scales")
        super().__init__(shape, codes, scales, bias, origin or AoOrigin("Int4Tensor"))
        self.order, self.group_size = order, padded[1] // groups
        self.register_buffer("offsets", offsets.detach())

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AoInt4Linear:
        """A layer as Int4WeightOnlyConfig makes it (Int4Tensor), with uninitialized tensors on any device."""
        shape = out_features, in_features
        codes = torch.empty(words_shape("plain", *shape), dtype=torch.int8, device=device)
        scales = torch.empty(in_features // group_size, out_features, dtype=dtype, device=device)
        bias_data = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        attributes = {"block_size": [1, group_size], "shape": list(shape)}
        return cls(
            "plain", shape, codes, scales, torch.empty_like(scales), bias_data, AoOrigin("Int4Tensor", attributes)
        )

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, group_size: int = 128) -> AoInt4Linear:
        """Round `weight` [N, K] to sixteen equal steps from least to greatest of each group, as torchao does.

        Natively: the library's own way needs a further package. One on `meta` gives `empty`; the bias is not copied.
        """
        rows, columns = weight.shape
        layer = cls.empty(columns, rows, group_size, bias is not None, weight.dtype, weight.device)
        if weight.is_meta:
            return layer
        grouped = weight.detach().float().unflatten(1, (-1, group_size))
        low, high = grouped.aminmax(dim=2, keepdim=True)
        scale = (high - low).clamp_(min=1e-6) / 15
        codes = ((grouped - low) / scale).round_().clamp_(0, 15).sub_(8).to(torch.int8).flatten(1)
        layer.codes.copy_((codes[:, ::2] & 15) | (codes[:, 1::2] << 4))
        layer.scales.copy_(scale[..., 0].t())
        layer.offsets.copy_((low + 8 * scale)[..., 0].t())
        layer.bias = frozen(bias)
        return layer

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`."""
        if (rows := self._by_row(start, stop, scales)) is not None and by_row.can_rebuild(rows, dtype):
            return by_row.rebuild(rows, dtype)
        numbers = unpacked(self.codes, self.order, start, stop).view(stop - start, len(scales), -1)
        scale, offset = (tensor[:, start:stop].t().float()[..., None] for tensor in (scales, self.offsets))
        numbers = numbers * scale if scale.requires_grad else numbers.mul_(scale)
        return numbers.add_(offset).flatten(1)[:, : self.in_features].to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        if self.order != "plain":
            return None
        scale, offset = (tensor[:, start:stop].t() for tensor in (scales, self.offsets))
        shape, signed = (stop - start, self.in_features), constant(TWOS_COMPLEMENT, scales)
        codes, order = self.codes[start:stop], by_row.Order.LOW_FIRST
        return by_row.Rows(codes, order, shape, scale, offsets=offset, table=signed)


def _bits_of(dtype: torch.dtype | None) -> int:
    """Of codes that torchao keeps in an int8 each, of a dtype such as torch.int4."""
    return 8 if dtype is None else int(str(dtype).removeprefix("torch.int"))
