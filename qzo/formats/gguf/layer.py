"""Linear layer and embedding on the packed blocks of a GGUF file.

The scales of a type may be negative (Q4_0, Q5_0): a step of QZO on them needs `nonnegative=False`, see `qzo.trainable`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.gguf.codes import BlockType, half_at
from qzo.formats.layer import Device, Quantized, frozen
from qzo.kernels import by_row, fused
from qzo.kernels.packed import BLOCKS, Packed
from qzo.kernels.rebuilt import chunk_bounds, chunked_linear

PACKED = {"Q4_0": (4, 8), "Q4_1": (4, 0), "Q8_0": (8, 0)}  # bits of a code, and what is taken off it, of kernels' types


class GgufTensor(Quantized):
    """A weight [N, K] as the blocks of a GGUF file; the base of `GgufLinear` and `GgufEmbedding`.

    The only tensor is the buffer `blocks`, uint8 [N, K / n_weights, n_bytes], as in the file. `scales` and `offsets`
    are live views into it: what is written into one in place is in the blocks, and the next forward sees it. Weights
    are rebuilt a chunk of rows at a time, in fp32, and rounded once to the dtype asked for.

    Args:
        blocks: taken as they are.
        kind: their type.
    """

    blocks: Tensor

    def __init__(self, blocks: Tensor, kind: BlockType) -> None:
        super().__init__()
        self.kind = kind
        self.shape = blocks.shape[0], blocks.shape[1] * kind.n_weights
        self.register_buffer("blocks", blocks)

    @property
    def signed(self) -> bool:
        """Whether scales of this type may be negative."""
        return self.kind.signed

    @property
    def type_name(self) -> str:
        """E.g. Q4_0."""
        return self.kind.name

    @property
    def scales(self) -> Tensor | None:  # type: ignore[override]
        """The fp16 scales [N, K / 32], with a flat view; None for types whose scales are not plain numbers."""
        return half_at(self.blocks, 0) if self.kind.has_scale else None

    @property
    def offsets(self) -> Tensor | None:
        """The fp16 minima [N, K / 32] of Q4_1 and Q5_1, with a flat view; None for the others."""
        return half_at(self.blocks, 1) if self.kind.has_offset else None

    def rows(self, start: int, stop: int, dtype: torch.dtype, *trained: Tensor) -> Tensor:
        """Rows start:stop of the weight, [stop - start, K]; `trained` are scales and offsets, as far as there are."""
        blocks, own = self.blocks[start:stop], [tensor[start:stop] for tensor in trained]
        rows = self.kind.by_row(blocks, *own)
        if rows is not None and by_row.can_rebuild(rows, dtype):
            return by_row.rebuild(rows, dtype)
        return self.kind.weights(blocks, *own).to(dtype)

    def project(self, x: Tensor) -> Tensor:
        """x Wᵀ, [..., K] -> [..., N]; differentiable in x, and in scales and offsets that require a gradient."""
        trained = self.trained()
        rows = self.kind.by_row(self.blocks, *trained)
        if rows is not None and by_row.can_multiply(rows, x):
            return by_row.multiply(rows, x)
        y = fused.product(x, self.packed, *trained)
        return chunked_linear(x, self.rows, self.shape, *trained) if y is None else y

    def packed(self) -> Packed | None:
        """The layer as kernels for a GPU see it; None where there are none for its type."""
        scales = self.scales
        if self.kind.name not in PACKED or scales is None:
            return None
        n_bits, zero = PACKED[self.kind.name]
        return Packed(BLOCKS, self.blocks, n_bits, self.shape, self.kind.n_weights, scales, zero, offsets=self.offsets)

    def trained(self) -> list[Tensor]:
        """Scales and offsets, as far as there are any."""
        return list(self.views().values())

    def views(self) -> dict[str, Tensor]:
        """Scales and offsets, as far as there are any: parts of the blocks."""
        both = {"scales": self.scales, "offsets": self.offsets}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K], for tests; forward never calls it."""
        return torch.cat([self.rows(*bounds, dtype, *self.trained()) for bounds in chunk_bounds(*self.shape)])

    def extra_repr(self) -> str:
        """Type and shape, for print(model)."""
        return f"{self.kind.name}, shape={self.shape}"


class GgufLinear(GgufTensor):
    """y = x Wᵀ + bias, W [N, K] in blocks of a GGUF file; `bias` is a frozen parameter [N] or None."""

    def __init__(self, blocks: Tensor, kind: BlockType, bias: Tensor | None = None) -> None:
        """Take the tensors as they are."""
        super().__init__(blocks, kind)
        self.out_features, self.in_features = self.shape
        self.bias = frozen(bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        kind: BlockType,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> GgufLinear:
        """A layer with uninitialized blocks on any device, `meta` included; `dtype` is that of bias and inputs.

        Raises QzoError where K is no whole number of blocks.
        """
        if in_features % kind.n_weights:
            raise QzoError(f"in_features={in_features} is not a multiple of {kind.n_weights}, the block of {kind.name}")
        shape = out_features, in_features // kind.n_weights, kind.n_bytes
        blocks = torch.empty(shape, dtype=torch.uint8, device=device)
        return cls(blocks, kind, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, kind: BlockType) -> GgufLinear:
        """Quantize `weight` [N, K] by the package gguf; a weight on `meta` gives `empty`. The bias is not copied.

        For the types that have scales of plain numbers. Extra memory: several fp32 copies of the weight.
        """
        rows, columns = weight.shape
        layer = cls.empty(columns, rows, kind, bias is not None, weight.dtype, weight.device)
        if weight.is_meta:
            return layer
        import gguf

        blocks = gguf.quantize(weight.detach().float().cpu().numpy(), gguf.GGMLQuantizationType[kind.name])
        layer.blocks.copy_(torch.from_numpy(blocks).view_as(layer.blocks))
        layer.bias = frozen(bias)
        return layer

    @property
    def qweight(self) -> Tensor:
        """`blocks` under the name that peft knows, which asks it for its device."""
        return self.blocks

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype; differentiable as `project` is."""
        y = self.project(x)
        return y if self.bias is None else y.add_(self.bias)


class GgufEmbedding(GgufTensor):
    """A table [V, K] in blocks of a GGUF file: the rows asked for are gathered, then rebuilt in `dtype`.

    A tied head is a `qzo.formats.vocabulary.TiedQuantHead` on it, which does not multiply by `multiplier`.
    """

    is_table = True

    def __init__(self, blocks: Tensor, kind: BlockType, dtype: torch.dtype, multiplier: float | None = None) -> None:
        """Take the blocks as they are; rows are multiplied by `multiplier` (Gemma), which is rounded to their dtype."""
        super().__init__(blocks, kind)
        self.num_embeddings, self.embedding_dim = self.shape
        self.dtype, self.multiplier = dtype, multiplier

    def whole(self) -> Tensor:
        """The dequantized table [V, K] as a head has it, in the dtype of its rows."""
        return self.dequantize(self.dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] int -> [..., K]; differentiable in scales and offsets that require a gradient."""
        index = input_ids.flatten()
        trained = [nn.functional.embedding(index, tensor) for tensor in self.trained()]
        weights = self.kind.weights(self.blocks.index_select(0, index), *trained)
        rows = weights.to(self.dtype).view(*input_ids.shape, self.embedding_dim)
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier, dtype=rows.dtype)
