"""AWQ: 4-bit codes of AutoAWQ's layout "gemm", eight columns interleaved in a word.

    qweight int32 [K, N/8]    word w of row k holds the codes of columns n = 8w ... 8w + 7
    qzeros  int32 [K/g, N/8]  in the same way the zero points, as they are
    scales        [K/g, N]    fp16

Bits 4i ... 4i + 3 of a word belong to column 8w + (0, 2, 4, 6, 1, 3, 5, 7)[i]. Method: Lin et al., "AWQ:
Activation-aware Weight Quantization", arXiv 2306.00978.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzo.formats.layer import Device, RebuiltLinear, frozen, scale_dtype
from qzo.kernels import native
from qzo.kernels.constants import constant
from qzo.kernels.operators import columns
from qzo.kernels.packed import INTERLEAVED, Packed
from qzo.kernels.rounding.rtn import round_to_nearest
from qzo.kernels.rounding.sizes import check_layout

PER_WORD = 8
SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # of columns 8w ... 8w + 7


class AwqLinear(RebuiltLinear):
    """y = x Wᵀ + bias with W[n, k] = (q[k, n] - zero[k // g, n]) * scale[k // g, n].

    Buffers are the checkpoint's own tensors (above), so that what is written back are the very codes that were read.
    `bias` is a frozen parameter [N] or None. `scales` is what QZO trains: the next forward sees a change of it. W is
    never whole: forward and backward rebuild `CHUNK_ELEMENTS` of it at a time. Build with `empty` or `from_weight`.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: nn.Parameter | None
    n_bits = 4

    def __init__(self, in_features: int, out_features: int, group_size: int) -> None:
        """Check the sizes and set them; `empty` adds the tensors. Raises QzoError."""
        super().__init__()
        self.group_size = check_layout(in_features, out_features, self.n_bits, group_size)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AwqLinear:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of bias and inputs."""
        layer = cls(in_features, out_features, group_size)
        groups, words = in_features // layer.group_size, out_features // PER_WORD
        layer.register_buffer("qweight", torch.empty(in_features, words, dtype=torch.int32, device=device))
        layer.register_buffer("qzeros", torch.empty(groups, words, dtype=torch.int32, device=device))
        layer.register_buffer("scales", torch.empty(groups, out_features, dtype=scale_dtype(dtype), device=device))
        bias_data = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        layer.bias = None if bias_data is None else nn.Parameter(bias_data, requires_grad=False)
        return layer

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, group_size: int = 128) -> AwqLinear:
        """Round `weight` [N, K] to nearest, with zero points, as AWQ does when it has scaled the channels.

        A weight on `meta` gives `empty`. The bias is not copied. Extra memory: 5 bytes a weight. Raises QzoError.
        """
        rows, columns = weight.shape
        layer = cls.empty(columns, rows, group_size, bias is not None, weight.dtype, weight.device)
        if weight.is_meta:
            return layer
        codes, scales, zeros = round_to_nearest(weight, 4, group_size, False, layer.scales.dtype)
        layer.qweight, layer.qzeros = pack(codes.t()), pack(zeros.t())
        layer.scales.copy_(scales.t())
        layer.bias = frozen(bias)
        return layer

    def zero_points(self) -> Tensor:
        """Zero points as int32 [K/g, N]."""
        return unpack(self.qzeros)

    def _product(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.in_features and native.can_multiply(self.qweight, self.n_bits, self.scales, x):
            return native.multiply(self._codes(0, self.out_features // PER_WORD, self.scales), x)
        return super()._product(x)

    def _codes(self, first: int, last: int, scales: Tensor) -> native.Codes:
        """What the columns of Wᵀ in words first:last are made of."""
        zeros, scale = unpack(self.qzeros[:, first:last]), scales[:, first * PER_WORD : last * PER_WORD]
        return native.Codes(self.qweight[:, first:last], self.n_bits, scale, zeros, None, awq=True)

    def packed(self) -> Packed:
        """As the base class."""
        shape = self.out_features, self.in_features
        return Packed(INTERLEAVED, self.qweight, self.n_bits, shape, self.group_size, self.scales, self.qzeros)

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`.

        Whole words are read, and the columns before `start` and after `stop` left out at the end.
        """
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        words = self._codes(first, last, scales)
        if native.can_rebuild(self.qweight, self.n_bits, scales, dtype):
            whole = native.rebuild(words, dtype)
        else:
            whole = columns(unpack(words.words), words.zeros, words.scales)
        return whole[:, start - first * PER_WORD : stop - first * PER_WORD].to(dtype).t()

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def pack(codes: Tensor) -> Tensor:
    """Codes [R, 8 W] below 16 -> int32 words [R, W]. Extra memory: 4 bytes a code."""
    words = codes.new_zeros(len(codes), codes.shape[1] // PER_WORD, dtype=torch.int32)
    for column, shift in enumerate(SHIFTS):
        words.bitwise_or_(codes[:, column::PER_WORD].to(torch.int32) << shift)
    return words


def unpack(words: Tensor) -> Tensor:
    """int32 words [R, W] -> int32 codes [R, 8 W] in the order of the columns. No other memory than the result."""
    return torch.bitwise_right_shift(words[:, :, None], constant(SHIFTS, words)).bitwise_and_(15).view(len(words), -1)
