"""bitsandbytes: 4-bit codes of a 16-entry table (NF4, FP4) and 8-bit codes, on the checkpoint's own tensors.

Weights [N, K] are numbered row by row, i = n K + k. A block is `block_size` consecutive ones, so where it does not
divide K a block goes on in the next row.

    nf4, fp4   w[i] = table[q[i]] scale[i // block_size]    the scale is the block's largest |w|
               two codes a byte, the first in the high half
    int8       w[n, k] = q[n, k] scale[n] / 127             the scale is the row's largest |w|

Methods: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314; "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale", arXiv 2208.07339.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import Device, RebuiltLinear, frozen
from qzo.kernels import by_row
from qzo.kernels.packed import PAIRS, Packed

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that the library knows
TABLE = 16
INT8_TOP = 127.0


class Nested(NamedTuple):
    """Scales as double quantization stores them, the arguments of `unnest` in nesting.py."""

    codes: Tensor
    absmax: Tensor
    quant_map: Tensor
    offset: float


@dataclass(frozen=True)
class BnbOrigin:
    """What the library's own module has besides the tensors, for `qzo.release`; by default as the library makes it.

    Args:
        compute_dtype, compute_type_is_set, quant_storage: of a Linear4bit; the last is the dtype that shows its codes.
        nested: its scales, where they were quantized themselves.
        threshold, index: of a Linear8bitLt.
        source_cls: the class that transformers replaced; None where it noted none.
    """

    compute_dtype: torch.dtype | None = None
    compute_type_is_set: bool = False
    quant_storage: torch.dtype = torch.uint8
    nested: Nested | None = None
    threshold: float = 6.0
    index: Any = None
    source_cls: type[nn.Module] | None = None


class BnbLinear4bit(RebuiltLinear):
    """y = x Wᵀ + bias with W.flat[i] = quant_map[q[i]] * scales[i // block_size].

    Buffers: qweight uint8 [ceil(N K / 2), 1], quant_map fp32 [16], scales fp32 [ceil(N K / block_size)], double
    quantization undone. `bias` is a frozen parameter [N] or None. `scales` is what QZO trains: the next forward sees a
    change of it. W is rebuilt in fp32, some rows at a time, and rounded once to the dtype of x, which is the arithmetic
    of the library too where its compute dtype is that of x. Build with `empty`, or `quantize` of library.py.

    `quant_type` is "nf4" or "fp4". Double quantization may turn a scale negative. To give it back: `nested`, whether
    the scales are quantized where they are stored, `weight_dtype`, of the weight that was quantized, and `origin`, a
    BnbOrigin or None.
    """

    qweight: Tensor
    scales: Tensor
    quant_map: Tensor
    n_bits = 4

    def __init__(self, in_features: int, out_features: int, quant_type: str, block_size: int) -> None:
        """Check the options and set them; `empty` and `assign` add the tensors. Raises QzoError."""
        super().__init__()
        if quant_type not in QUANT_TYPES:
            raise QzoError(f'quant_type="{quant_type}" is not known; choose "nf4" or "fp4"')
        if block_size not in BLOCK_SIZES:
            raise QzoError(f"block_size={block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.block_size = quant_type, block_size
        self.nested = False
        self.weight_dtype = torch.float32
        self.bias = None

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        quant_type: str = "nf4",
        block_size: int = 64,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> BnbLinear4bit:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of bias and inputs."""
        layer = cls(in_features, out_features, quant_type, block_size)
        numel = in_features * out_features
        return layer.assign(
            torch.empty(-(-numel // 2), 1, dtype=torch.uint8, device=device),
            torch.empty(-(-numel // block_size), dtype=torch.float32, device=device),
            torch.empty(TABLE, dtype=torch.float32, device=device),
            torch.empty(out_features, dtype=dtype, device=device) if bias else None,
        )

    def assign(self, qweight: Tensor, scales: Tensor, quant_map: Tensor, bias: Tensor | None) -> BnbLinear4bit:
        """Take tensors of these shapes as they are; returns the layer."""
        for name, tensor in (("qweight", qweight), ("scales", scales), ("quant_map", quant_map)):
            self.register_buffer(name, tensor)
        self.bias = frozen(bias)
        return self

    def packed(self) -> Packed:
        """As the base class."""
        shape, table = (self.out_features, self.in_features), self.quant_map.float()
        return Packed(PAIRS, self.qweight, self.n_bits, shape, self.block_size, self.scales, table=table)

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], by whole blocks; what lies before and after is left out at the end.

        By operators, a byte is looked up as a pair of weights, so that no code is ever unpacked.
        """
        if (rows := self._by_row(start, stop, scales)) is not None and by_row.can_rebuild(rows, dtype):
            return by_row.rebuild(rows, dtype)
        first, last = start * self.in_features, stop * self.in_features
        from_block, to_block = first // self.block_size, -(-last // self.block_size)
        half = self.block_size // 2  # bytes a block
        packed = self.qweight.view(-1)[from_block * half : to_block * half]
        values = self._pairs().index_select(0, packed.int()).view(torch.float32)
        if len(values) % self.block_size:  # the last block of all
            values = nn.functional.pad(values, (0, -len(values) % self.block_size))
        values = values.view(-1, self.block_size)
        scale = scales[from_block:to_block].float()[:, None]
        values = values * scale if scale.requires_grad else values.mul_(scale)
        before = from_block * self.block_size
        return values.view(-1)[first - before : last - before].view(stop - start, -1).to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        if self.in_features % self.block_size:  # a block goes on in the next row
            return None
        shape = stop - start, self.in_features
        codes = self.qweight.view(self.out_features, -1)[start:stop]
        scale = scales.view(self.out_features, -1)[start:stop]
        return by_row.Rows(codes, by_row.Order.HIGH_FIRST, shape, scale, table=self.quant_map)

    def _pairs(self) -> Tensor:
        """int64 [256]: the two fp32 table entries of every byte as one number, which is quicker to look up."""
        table = self.quant_map.float()
        return torch.stack((table.repeat_interleave(TABLE), table.repeat(TABLE)), -1).view(torch.int64).view(-1)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.quant_type}, "
            f"block_size={self.block_size}, bias={self.bias is not None}"
        )


class BnbLinear8bit(RebuiltLinear):
    """y = x Wᵀ + bias with W[n, k] = qweight[n, k] * scales[n] / 127.

    Buffers: qweight int8 [N, K] and scales fp32 [N], the library's SCB. `bias` is a frozen parameter [N] or None.
    `scales` is what QZO trains: the next forward sees a change of it.

    The product is a plain one of dequantized weights: activations are not quantized, and outliers not computed apart.
    This is what the library computes in train mode on a CPU; in eval mode, and on a GPU, it rounds activations to 8
    bits as well, which moves the outputs of a layer by 0.4 to 0.9 % of their spread (rms; random normal data, K up to
    4096), and by up to 2 % on a CPU without VNNI instructions, where PyTorch's int8 sums saturate. Build with `empty`,
    or `quantize` of library.py.
    """

    qweight: Tensor
    scales: Tensor
    n_bits = 8

    def __init__(self, qweight: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """Take the tensors as they are."""
        super().__init__()
        self.out_features, self.in_features = qweight.shape
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.bias = frozen(bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> BnbLinear8bit:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of bias and inputs."""
        qweight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        scales = torch.empty(out_features, dtype=torch.float32, device=device)
        return cls(qweight, scales, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`."""
        if by_row.can_rebuild(rows := self._by_row(start, stop, scales), dtype):
            return by_row.rebuild(rows, dtype)
        scale = (scales[start:stop].float() * (1 / INT8_TOP))[:, None]
        values = self.qweight[start:stop].float()
        return (values * scale if scale.requires_grad else values.mul_(scale)).to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows:
        scale = (scales[start:stop].float() * (1 / INT8_TOP))[:, None]
        shape = stop - start, self.in_features
        return by_row.Rows(self.qweight[start:stop], by_row.Order.BYTES, shape, scale)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
