"""HQQ: codes of 1 to 8 bits with a scale and a real zero point for each group; the layout of the library `hqq`.

A weight [N, K] is read, in the order of its memory, as a matrix [R, C] of groups: with axis 1 a group is a row,
[N K / g, g], with axis 0 a column, [g, N K / g]. Words hold several rows of that matrix, P apart:

    packing   words             code of row r, in word row r mod P      P
    8bit_u8   uint8 [P, C]      bits 0-7                                R
    4bit_u8   uint8 [P, C]      bits 4-7, then 0-3                      R / 2
    3bit_32   int32 [P, C]      bits 27-29, 24-26, ... 0-2              R / 10, rounded up
    2bit_u8   uint8 [P, C]      bits 6-7, 4-5, 2-3, 0-1                 R / 4
    1bit_u8   uint8 [P, C]      bits 7, 6, ... 0                        R / 8

Method: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.hqq.codes import HqqLayout, unpacked
from qzo.formats.layer import SCALE_DTYPES, CodesAsQweight, Device, RebuiltLinear, frozen
from qzo.kernels import by_row


@dataclass(frozen=True)
class HqqOrigin:
    """What the library's own module needs besides the tensors, for `qzo.release`.

    Args:
        meta: its dictionary of that name, without the tensors of this layer.
        quant_config: its settings.
        word_view: dtype that it shows the words as (`view_as_float`); None for their own.
        nested: "scale" and "zero", where quantized themselves -> (words, meta), see `qzo.formats.hqq.nesting`.
        module: taken over, to be given back; None for a layer from a file.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    quant_config: dict[str, Any] | None = None
    word_view: torch.dtype | None = None
    nested: dict[str, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    module: nn.Module | None = None


class HqqLinear(CodesAsQweight, RebuiltLinear):
    """y = x Wᵀ + bias with W = (codes - zero_points) * scales, group by group.

    Buffers: codes, the words of the table above; scales and zero_points, both [N K / g, 1] (axis 1) or [1, N K / g]
    (axis 0), in fp32, fp16 or bf16. Zero points are real numbers; they stay, and (codes - zero_points) * scales moves
    as a whole with its scale: the paper's Δ ⊙ W_int. `bias` is a frozen parameter [N] or None.

    Rows are rebuilt with whole rows of the matrix of groups: up to 2 C weights too many, with axis 0 a share 2 / g of
    the layer, with axis 1 two groups. `compute_dtype` is that of the inputs of the library's module. Build with
    `empty`, or `quantize` of library.py.
    """

    codes: Tensor
    zero_points: Tensor
    n_bits: float

    def __init__(
        self,
        layout: HqqLayout,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        bias: Tensor | None = None,
        origin: HqqOrigin | None = None,
    ) -> None:
        """Take the tensors as they are. Raises QzoError for a shape or dtype that the layout does not have."""
        super().__init__()
        self.layout, self.n_bits, self.group_size = layout, layout.n_bits, layout.group_size
        self.in_features, self.out_features = layout.in_features, layout.out_features
        self.came_from(origin or HqqOrigin())
        self.compute_dtype: torch.dtype = self.origin.meta.get("compute_dtype", scales.dtype)
        if codes.dtype != layout.word_dtype or tuple(codes.shape) != layout.words_shape:
            raise QzoError(
                f"codes are {codes.dtype} {tuple(codes.shape)}, but {layout.n_bits} bits in groups of "
                f"{layout.group_size} imply {layout.word_dtype} {layout.words_shape}"
            )
        for name, tensor in (("scales", scales), ("zero points", zero_points)):
            if tensor.dtype not in SCALE_DTYPES or tuple(tensor.shape) != layout.scales_shape:
                raise QzoError(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)}, but groups of {layout.group_size} imply "
                    f"floating {layout.scales_shape}"
                )
        if bias is not None and tuple(bias.shape) != (layout.out_features,):
            raise QzoError(f"the bias has shape {tuple(bias.shape)}, need {(layout.out_features,)}")
        self.register_buffer("codes", codes.detach())
        self.register_buffer("scales", scales.detach())
        self.register_buffer("zero_points", zero_points.detach())
        self.bias = frozen(bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        n_bits: float = 4,
        group_size: int = 64,
        axis: int = 1,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> HqqLinear:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of all but the codes."""
        layout = HqqLayout(in_features, out_features, n_bits, group_size, axis)
        codes = torch.empty(layout.words_shape, dtype=layout.word_dtype, device=device)
        scales, zeros = (torch.empty(layout.scales_shape, dtype=dtype, device=device) for _ in range(2))
        return cls(
            layout, codes, scales, zeros, torch.empty(out_features, dtype=dtype, device=device) if bias else None
        )

    @property
    def type_name(self) -> str:
        """Packing and axis, e.g. "4bit_u8 axis 1"."""
        return f"{self.layout.packing} axis {self.layout.axis}"

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`."""
        if (rows := self._by_row(start, stop, scales)) is not None and by_row.can_rebuild(rows, dtype):
            return by_row.rebuild(rows, dtype)
        wide, along = self.layout.columns, self.layout.axis == 1
        first, last = start * self.in_features // wide, -(-stop * self.in_features // wide)
        numbers = unpacked(self.codes, self.layout.code_bits, first, last)
        zeros, scale = (t[first:last].float() if along else t.float() for t in (self.zero_points, scales))
        numbers.sub_(zeros)
        numbers = numbers * scale if scale.requires_grad else numbers.mul_(scale)
        begin = start * self.in_features - first * wide
        weights = numbers.view(-1)[begin : begin + (stop - start) * self.in_features]
        return weights.view(stop - start, self.in_features).to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        layout, shape = self.layout, (stop - start, self.in_features)
        if layout.axis == 0 or self.in_features % layout.group_size:
            return None
        order = by_row.Order.PLANES if layout.word_dtype == torch.uint8 else by_row.Order.WORD_PLANES
        scale, zeros = (t.view(self.out_features, -1)[start:stop] for t in (scales, self.zero_points))
        rows = by_row.Rows(self.codes, order, shape, scale, zeros, plane_bits=layout.code_bits)
        return rows._replace(planes=layout.per_word, first=start * scale.shape[1])

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_bits={self.n_bits}, "
            f"group_size={self.group_size}, axis={self.layout.axis}, bias={self.bias is not None}"
        )
