"""Linear layers of compressed-tensors: whole-number codes, packed or an int8 each; scales for groups, rows or all.

    pack-quantized   codes int32 [N, K*b/32]          code + 2^(b-1), those of a row in turn, lowest bits first
                     zero_points int32 [N*b/32, K/g]  zero + 2^(b-1), in the same way along N; int8 [1] beside one scale
    int-quantized,   codes int8 [N, K]
    naive-quantized  zero_points int8                 of the shape of the scales

Rows of codes, and columns of zero points, fill whole words; what is over is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.compressed.scheme import Scheme
from qzo.formats.layer import SCALE_DTYPES, CodesAsQweight, Device, RebuiltLinear, frozen
from qzo.kernels import by_row, native
from qzo.kernels.constants import constant

BUFFER_OF = {
    "weight_packed": "codes",
    "weight": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_g_idx": "g_idx",
}
PACKED_ORDERS = {4: by_row.Order.LOW_FIRST, 8: by_row.Order.UNSIGNED}


class CompressedLinear(CodesAsQweight, RebuiltLinear):
    """y = x Wᵀ + bias with W[n, k] = (codes[n, k] - zero_points[n, i]) * scales[n, i], i = g_idx[k].

    Buffers: codes and zero_points as above, zero_points None where codes are symmetric about 0; scales [N, K/g], [N, 1]
    or [1] in fp32, fp16 or bf16; g_idx int32 [K], or None for k // g. Zero points are whole numbers and stay: W moves
    as a whole with its scale, the paper's Δ ⊙ W_int. `origin` is the module that was taken over, to be given back; None
    for a layer from a file. Build with `empty`, or give it the tensors of a checkpoint.
    """

    codes: Tensor
    zero_points: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        tensors: dict[str, Tensor],
        bias: Tensor | None = None,
        origin: nn.Module | None = None,
    ) -> None:
        """Take tensors, which have their names in a checkpoint, as they are.

        Raises QzoError for a name, shape or dtype that the scheme has not for a weight of this shape.
        """
        super().__init__()
        self.scheme, self.n_bits = scheme, scheme.n_bits
        self.out_features, self.in_features = shape
        self.group_size = scheme.group_size or self.in_features
        self._origin = (origin,)
        _check(scheme, shape, tensors)
        if bias is not None and tuple(bias.shape) != shape[:1]:
            raise QzoError(f"the bias has shape {tuple(bias.shape)}, need {shape[:1]}")
        for name in ("codes", "scales", "zero_points", "g_idx"):
            found = next((tensor.detach() for key, tensor in tensors.items() if BUFFER_OF[key] == name), None)
            self.register_buffer(name, found)
        self.compute_dtype: torch.dtype = self.scales.dtype
        self.bias = frozen(bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: Device = None,
    ) -> CompressedLinear:
        """A layer with uninitialized tensors on any device, `meta` included; `dtype` is that of scales and bias."""
        shape = out_features, in_features
        expected = scheme.tensors(*shape).items()
        tensors = {name: torch.empty(sizes, dtype=own or dtype, device=device) for name, (own, sizes) in expected}
        return cls(scheme, shape, tensors, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def type_name(self) -> str:
        """The format, e.g. "pack-quantized"."""
        return self.scheme.format

    def stored(self) -> dict[str, Tensor]:
        """Its tensors by their names in a checkpoint."""
        names = self.scheme.tensors(self.out_features, self.in_features)
        return {name: getattr(self, BUFFER_OF[name]) for name in names}

    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], computed in fp32 and rounded once to `dtype`."""
        if (rows := self._by_row(start, stop, scales)) is not None and by_row.can_rebuild(rows, dtype):
            return by_row.rebuild(rows, dtype)
        scale, zeros = self._part(scales, start, stop), self._zeros(start, stop)
        fills_words = self.in_features * self.n_bits % 32 == 0
        if fills_words and native.can_rebuild(self.codes, self.n_bits, scales, dtype):
            words, zero = self.codes[start:stop].t(), zeros if isinstance(zeros, int) else zeros.t()
            return native.rebuild(native.Codes(words, self.n_bits, scale.t(), zero, self.g_idx), dtype).t()
        numbers = self._numbers(start, stop)
        numbers.sub_(zeros if isinstance(zeros, int) else self._to_weights(zeros))
        scale = self._to_weights(scale.float())
        numbers = numbers * scale if scale.requires_grad else numbers.mul_(scale)
        return numbers.view(stop - start, self.in_features).to(dtype)

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        fills_words = self.in_features * self.n_bits % 32 == 0
        order = PACKED_ORDERS.get(self.n_bits) if self.scheme.is_packed else by_row.Order.BYTES
        if order is None or self.g_idx is not None or not fills_words:
            return None
        scale, zeros = self._part(scales, start, stop), self._zeros(start, stop)
        rows = by_row.Rows(self.codes[start:stop], order, (stop - start, self.in_features), scale)
        return rows._replace(zero=zeros) if isinstance(zeros, int) else rows._replace(zeros=zeros)

    def _numbers(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the codes, of packed ones code + 2^(b-1); fp32 [n, K], or [n, K/g, g] without g_idx."""
        rows = self.codes[start:stop]
        numbers = (unpacked(rows, self.n_bits)[:, : self.in_features] if self.scheme.is_packed else rows).float()
        return numbers.unflatten(1, (-1, self.group_size)) if self.g_idx is None else numbers

    def _to_weights(self, tensor: Tensor) -> Tensor:
        """Scales or zero points [n, K/g], as they are combined with `_numbers`."""
        return tensor[..., None] if self.g_idx is None else tensor.index_select(1, self.g_idx)

    def _zeros(self, start: int, stop: int) -> Tensor | int:
        """Zero points of rows start:stop, int32 [n, K/g], or that of all; of packed codes zero + 2^(b-1)."""
        middle = 2 ** (self.n_bits - 1) if self.scheme.is_packed else 0
        if self.zero_points is None:
            return middle
        if self.zero_points.dtype != torch.int32:
            return self._part(self.zero_points, start, stop).int() + middle
        per_word = 32 // self.n_bits
        first = start // per_word
        zeros = unpacked(self.zero_points[first : -(-stop // per_word)].t(), self.n_bits).t()
        return zeros[start - first * per_word : stop - first * per_word]

    def _part(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Rows start:stop of scales or zero points, [n, K/g]."""
        return tensor.expand(stop - start, 1) if tensor.dim() == 1 else tensor[start:stop]

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_bits={self.n_bits}, "
            f"scales={tuple(self.scales.shape)}, format={self.type_name}, bias={self.bias is not None}"
        )


def unpacked(words: Tensor, n_bits: int) -> Tensor:
    """int32 words [R, P] -> codes int32 [R, P * 32 / n_bits], lowest bits first."""
    shifts = constant(tuple(range(0, 32, n_bits)), words)
    return torch.bitwise_right_shift(words[..., None], shifts).bitwise_and_(2**n_bits - 1).flatten(1)


def _check(scheme: Scheme, shape: tuple[int, int], tensors: dict[str, Tensor]) -> None:
    expected = scheme.tensors(*shape)
    if missing := expected.keys() - tensors.keys():
        raise QzoError(f"{min(missing)} is missing")
    if more := tensors.keys() - expected.keys():
        raise QzoError(
            f"{min(more)} has no place beside {scheme.n_bits}-bit codes in {scheme.format}, as config.json has it"
        )
    for name, (dtype, sizes) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != sizes or tensor.dtype not in (SCALE_DTYPES if dtype is None else (dtype,)):
            raise QzoError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, but a weight {shape} of {scheme.n_bits} bits, "
                f"strategy {scheme.strategy}, implies {'floating' if dtype is None else dtype} {sizes}"
            )
