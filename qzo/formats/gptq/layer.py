"""A linear layer with packed low-bit codes and trainable scales, in the memory layout of GPTQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzo.formats.gptq.codes import pack, pack_zeros, unpack, unpack_zeros
from qzo.formats.layer import Device, RebuiltLinear, frozen, scale_dtype
from qzo.kernels import native
from qzo.kernels.operators import columns
from qzo.kernels.packed import WORDS, Packed
from qzo.kernels.rounding.rtn import round_to_nearest
from qzo.kernels.rounding.sizes import block_of, check_layout


class QuantLinear(RebuiltLinear):
    """y = x Wᵀ + bias with W[n, k] = (q[n, k] - zero[n, i]) * scale[n, i], i = g_idx[k] (paper: W = Δ ⊙ W_int).

    Buffers (see qzo/formats/gptq/codes.py): qweight int32 [K*b/32, N], qzeros int32 [K/g, N*b/32] with true zero
    points, scales [K/g, N] fp32 or fp16, g_idx int32 [K]; K/g is rounded up where the last group is shorter. `bias` is
    a frozen parameter [N] or None. `scales` is what QZO trains: the next forward sees a change of it.

    W is never whole: forward and backward rebuild `CHUNK_ELEMENTS` of it at a time (16 MiB of int32, then of fp32, and
    the chunk in the dtype of x; compiled code needs less, see qzo/kernels/native.py). `act_order` says whether g_idx is
    other than k // g, `zero` is the zero point where all are the same (symmetric layers), else None: plain values, so
    that forward neither reads data nor unpacks what it knows. Whoever writes g_idx or qzeros calls `read_layout`. Build
    with `empty` or `from_weight`.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self, in_features: int, out_features: int, n_bits: int, group_size: int, short_group: bool = False
    ) -> None:
        """Check the sizes and set them; `empty` and `from_weight` add the tensors.

        `short_group` allows a last group of fewer weights. Raises QzoError.
        """
        super().__init__()
        self.group_size = check_layout(in_features, out_features, n_bits, group_size, short_group=short_group)
        self.in_features, self.out_features, self.n_bits = in_features, out_features, n_bits
        self.has_short_group = in_features % self.group_size > 0
        self.act_order = False
        self.zero: int | None = None

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        n_bits: int = 4,
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
        short_group: bool = False,
    ) -> QuantLinear:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of bias and inputs."""
        layer = cls(in_features, out_features, n_bits, group_size, short_group)
        groups = -(-in_features // layer.group_size)
        qweight = torch.empty(in_features * n_bits // 32, out_features, dtype=torch.int32, device=device)
        qzeros = torch.empty(groups, out_features * n_bits // 32, dtype=torch.int32, device=device)
        scales = torch.empty(groups, out_features, dtype=scale_dtype(dtype), device=device)
        bias_data = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return layer._register(qweight, qzeros, scales, bias_data)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        n_bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
    ) -> QuantLinear:
        """Quantize `weight` [N, K] by round-to-nearest; a weight on `meta` gives `empty`. The bias is not copied.

        Extra memory: N*K bytes for the codes before they are packed. Raises QzoError.
        """
        rows, columns = weight.shape
        if weight.is_meta:
            layer = cls.empty(columns, rows, n_bits, group_size, bias is not None, weight.dtype, weight.device)
            layer.zero = 2 ** (n_bits - 1) if symmetric else None
            return layer
        check_layout(columns, rows, n_bits, group_size)
        quantized = round_to_nearest(weight, n_bits, group_size, symmetric, scale_dtype(weight.dtype))
        return cls.from_codes(*quantized, bias=bias, n_bits=n_bits)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
        n_bits: int = 4,
    ) -> QuantLinear:
        """Pack codes [N, K], scales [N, K/g] and zero_points [N, K/g] of a quantizer; neither scales nor bias is cast.

        `g_idx` [K] int32 names the group of each weight, None means k // g. Raises QzoError.
        """
        rows, columns = codes.shape
        layer = cls(columns, rows, n_bits, columns // scales.shape[1])
        qzeros = pack_zeros(zero_points.t(), n_bits)
        layer._register(pack(codes.t(), n_bits), qzeros, scales.t().contiguous(), bias)
        if g_idx is not None:
            layer.g_idx.copy_(g_idx)
        layer.read_layout()
        return layer

    def _register(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None) -> QuantLinear:
        for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.register_buffer("g_idx", self._group_of_each(qweight.device))
        self.bias = frozen(bias)
        return self

    def _group_of_each(self, device: torch.device) -> Tensor:
        groups = torch.arange(-(-self.in_features // self.group_size), dtype=torch.int32, device=device)
        found = groups.repeat_interleave(self.group_size)
        return found[: self.in_features].clone() if self.has_short_group else found

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.in_features and native.can_multiply(self.qweight, self.n_bits, self.scales, x):
            return native.multiply(self._codes(0, self.out_features, self.scales), x)
        return super()._product(x)

    def packed(self) -> Packed:
        """As the base class."""
        zeros = self.qzeros if self.zero is None else self.zero
        shape, order = (self.out_features, self.in_features), self.g_idx if self.act_order else None
        return Packed(WORDS, self.qweight, self.n_bits, shape, self.group_size, self.scales, zeros, order)

    def _codes(self, start: int, stop: int, scales: Tensor) -> native.Codes:
        """What rows start:stop of W are made of."""
        zeros = self.zero_points(start, stop) if self.zero is None else self.zero
        g_idx, words = self.g_idx if self.act_order or self.has_short_group else None, self.qweight
        if stop - start < self.out_features:
            words, scales = words[:, start:stop], scales[:, start:stop]
        return native.Codes(words, self.n_bits, scales, zeros, g_idx)

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`; Wᵀ is contiguous.

        Everything runs along the columns of the packed tensors, so nothing is transposed.
        """
        if native.can_rebuild(self.qweight, self.n_bits, scales, dtype):
            return native.rebuild(self._codes(start, stop, scales), dtype).t()
        codes = unpack(self.qweight[:, start:stop], self.n_bits)  # [K, n]
        zeros = self.zero_points(start, stop) if self.zero is None else self.zero
        scale = scales[:, start:stop]  # [K/g, n]
        if self.act_order or self.has_short_group:
            scale = scale.index_select(0, self.g_idx)  # [K, n]
            zeros = zeros.index_select(0, self.g_idx) if isinstance(zeros, Tensor) else zeros
        return columns(codes, zeros, scale).to(dtype).t()

    def zero_points(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Zero points of output columns start:stop as int32 [K/g, stop - start]."""
        stop = self.out_features if stop is None else stop
        count, size = block_of(self.n_bits)
        first, last = start // count, -(-stop // count)
        zeros = unpack_zeros(self.qzeros[:, first * size : last * size], self.n_bits)
        return zeros[:, start - first * count : stop - first * count]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_layout()

    def read_layout(self) -> None:
        """Set `act_order` from g_idx and `zero` from qzeros; called after a state dict is loaded."""
        if not self.g_idx.is_meta:
            self.act_order = not torch.equal(self.g_idx, self._group_of_each(self.g_idx.device))
        if not self.qzeros.is_meta:
            low, high = (int(zero) for zero in self.zero_points().aminmax())
            self.zero = low if low == high else None

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_bits={self.n_bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )
