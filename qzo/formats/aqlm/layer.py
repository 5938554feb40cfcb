"""AQLM: groups of weights share codes into codebooks of their layer, two bits a weight where a code stands for many.

    codes     int8 or int16 [N/og, K/ig, C]  code c of each group, the bit pattern of an unsigned number of b bits
    codebooks [C, 2^b, og, ig]               what each code stands for: og x ig weights
    scales    [N/og, 1, 1, 1]                one for each row of groups

Layout of the `aqlm` library; C x b is "1x16" or "2x8". Egiazarian et al., "Extreme Compression of Large Language Models
via Additive Quantization", arXiv 2401.06118.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import CodesAsQweight, Device, RebuiltLinear, frozen
from qzo.kernels import by_row
from qzo.models.walk import LinearShape

GROUP_SIZE = 8  # weights to a code
LARGEST = {"num_codebooks": 64, "nbits_per_codebook": 16, "in_group_size": 1024, "out_group_size": 1024}


@dataclass(frozen=True)
class AqlmLayout:
    """Sizes of a layout, under the names that config.json has for them.

    Args:
        num_codebooks: C, codes that are added up for a group.
        nbits_per_codebook: b, bits of a code; up to 8 are stored in int8, up to 16 in int16.
        in_group_size, out_group_size: ig weights along K by og along N are a group.

    Raises QzoError for what is no number, or out of range.
    """

    num_codebooks: int = 1
    nbits_per_codebook: int = 16
    in_group_size: int = GROUP_SIZE
    out_group_size: int = 1

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise QzoError(f"AQLM with {name}={value} is not supported; need a whole number from 1 to {largest}")

    @property
    def bits(self) -> float:
        """Bits of codes a weight."""
        return self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)

    @property
    def name(self) -> str:
        """Codebooks and bits of a code, e.g. "2x8"."""
        return f"{self.num_codebooks}x{self.nbits_per_codebook}"

    def check(self, shape: LinearShape, name: str = "") -> None:
        """Raise QzoError for a linear map that is no whole number of groups."""
        groups = {"in_features": self.in_group_size, "out_features": self.out_group_size}
        for side, size in groups.items():
            if getattr(shape, side) % size:
                layer = f"{name}: " if name else ""
                raise QzoError(
                    f"{layer}{side}={getattr(shape, side)} is not divisible by {size}, the weights to an AQLM code; "
                    "use qzo.quantize"
                )


class AqlmLinear(CodesAsQweight, RebuiltLinear):
    """y = x Wᵀ + bias with W[og i : og i + og, ig j : ig j + ig] = scale[i] Σ_c codebook[c, code[i, j, c]].

    Buffers are the checkpoint's own tensors (above), so that what is written back are the very codes that were read;
    codebooks and scales in any floating dtype. `bias` is a frozen parameter [N] or None. W is rebuilt chunk by chunk
    and never whole. Build with `empty`; `qzo.quantizers.aqlm` finds or draws codes.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """Take the tensors as they are."""
        super().__init__()
        _, _, out_group_size, in_group_size = codebooks.shape
        self.out_features, self.in_features = codes.shape[0] * out_group_size, codes.shape[1] * in_group_size
        for name, tensor in (("codes", codes), ("codebooks", codebooks), ("scales", scales)):
            self.register_buffer(name, tensor)
        self.bias = frozen(bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        layout: AqlmLayout | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> AqlmLinear:
        """A layer with uninitialized tensors on any device, `meta` included; without `layout`, 1x16 by eights.

        Raises QzoError for sizes that are no whole number of groups.
        """
        layout = layout or AqlmLayout()
        layout.check(LinearShape(in_features, out_features))
        n, og, ig = layout.num_codebooks, layout.out_group_size, layout.in_group_size
        of_code = torch.int8 if layout.nbits_per_codebook <= 8 else torch.int16
        codes = torch.empty(out_features // og, in_features // ig, n, dtype=of_code, device=device)
        codebooks = torch.empty(n, 2**layout.nbits_per_codebook, og, ig, dtype=dtype, device=device)
        scales = torch.empty(out_features // og, 1, 1, 1, dtype=dtype, device=device)
        return cls(codes, codebooks, scales, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def layout(self) -> AqlmLayout:
        """Sizes, told from the tensors."""
        count, size, out_group_size, in_group_size = self.codebooks.shape
        return AqlmLayout(count, size.bit_length() - 1, in_group_size, out_group_size)

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W, [stop - start, K]: whole groups are summed and scaled in `dtype`, then cut."""
        by_code = None if dtype != torch.bfloat16 else self._by_row(start, stop, scales)
        if by_code is not None and by_row.can_rebuild(by_code, dtype):
            return by_row.rebuild(by_code, dtype)
        _, size, out_group_size, in_group_size = self.codebooks.shape
        first, last = start // out_group_size, -(-stop // out_group_size)
        rows: Any = None
        for number, table in enumerate(self.codebooks.flatten(2)):  # [2^b, og ig]
            index = self.codes[first:last, :, number].to(torch.int32).bitwise_and_(size - 1)
            vectors = nn.functional.embedding(index, table)  # [groups, K/ig, og ig]
            rows = vectors.to(dtype) if rows is None else rows.add_(vectors)
        scale = scales[first:last].view(-1, 1, 1)
        rows = rows * scale if scale.requires_grad else rows.mul_(scale)
        if out_group_size > 1:
            rows = rows.unflatten(2, (out_group_size, in_group_size)).transpose(1, 2)
        begin = first * out_group_size
        whole: Tensor = rows.reshape(-1, self.in_features)
        return whole[start - begin : stop - begin].to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        """Of weights that are wanted in bfloat16."""
        if tuple(self.codebooks.shape[2:]) != (1, GROUP_SIZE):
            return None
        shape, scale = (stop - start, self.in_features), scales[start:stop].view(stop - start, 1)
        rows = by_row.Rows(self.codes[start:stop], by_row.Order.VECTORS_OF_8, shape, scale)
        return rows._replace(codebooks=self.codebooks.to(torch.bfloat16).flatten(2))

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, layout={self.layout.name}, "
            f"bias={self.bias is not None}"
        )
