"""What quantized layers share: what each tells of itself, and a forward that rebuilds the weight part by part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from qzo.kernels import by_row, fused
from qzo.kernels.packed import Packed
from qzo.kernels.rebuilt import chunk_bounds, chunked_linear

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Quantized(nn.Module):
    """A module whose weight is codes with scales; nothing outside its format asks which of them it is.

    A child has `n_bits`, and `scales`: the live tensor that QZO trains, or None. What else may be asked:
        offsets     live tensor beside the scales, in formats with w = q s + m; others have none, or None
        signed      whether a scale may be negative, so that QZO needs `nonnegative=False`; here, whether one is
        is_table    whether it is a vocabulary, whose scales are trained only where they are asked for
        type_name   what the format calls it
        origin      what its library needs to have it back, see `qzo.release`; None where it did not come from there:
                    `came_from` sets it
    """

    scales: Tensor | None
    is_table = False
    _origin: tuple[Any] = (None,)  # in a tuple, so that a module of the library is no child of this one

    @property
    def signed(self) -> bool:
        """Whether a scale is negative: of AutoRound's symmetric codes, after double quantization, or trained so."""
        scales = self.scales
        if scales is None or scales.is_meta or isinstance(scales, FakeTensor) or not scales.numel():
            return False
        return float(scales.detach().min()) < 0

    @property
    def origin(self) -> Any:
        """Where the layer came from."""
        return self._origin[0]

    def came_from(self, origin: Any) -> None:
        """Set `origin`; a module is kept as it is, and becomes no child of this one."""
        self._origin = (origin,)

    @property
    def type_name(self) -> str:
        """What the format calls it."""
        return type(self).__name__

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As nn.Module's, of `.to`, `.half`, `.float`, `.cuda`; but buffers stay the tensors they are, in their dtype.

        An optimizer holds the scales: others in their place would never be trained, and bfloat16 would round them.
        """
        before = {name: buffer for name, buffer in self._buffers.items() if type(buffer) is Tensor}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is old or type(new) is not Tensor or not torch._has_compatible_shallow_copy_type(old, new):
                continue  # to or from a device without data
            old.data = new if new.dtype == old.dtype else old.to(new.device)
            self._buffers[name] = old
        return self

    def views(self) -> dict[str, Tensor]:
        """Scales and offsets that lie within another buffer, by these names; none, where they are buffers."""
        return {}


class CodesAsQweight:
    """`codes` under the name that peft knows, which asks it for its device."""

    codes: Tensor

    @property
    def qweight(self) -> Tensor:
        """The codes."""
        return self.codes


def frozen(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as a parameter that is not trained; its data is not copied."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class RebuiltLinear(Quantized, ABC):
    """y = x Wᵀ + bias for a W [N, K] that a child rebuilds from codes and `scales`, a few rows at a time.

    `bias` is a frozen parameter [N] or None. `scales` is what QZO trains: the next forward sees a change of it.
    """

    in_features: int
    out_features: int
    scales: Tensor
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype; differentiable in x and, where it requires a gradient, in `scales`."""
        y = self._product(x)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        """x Wᵀ as a tensor of its own, which may be changed in place."""
        rows = self._by_row(0, self.out_features, self.scales)
        if rows is not None and by_row.can_multiply(rows, x):
            return by_row.multiply(rows, x)
        y = fused.product(x, self.packed, self.scales)
        if y is None:
            y = chunked_linear(x, self._rows, (self.out_features, self.in_features), self.scales)
        return y

    def packed(self) -> Packed | None:
        """The layer as kernels for a GPU see it; None where there are none for its format."""
        return None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K], for export and tests; forward never calls it."""
        bounds = chunk_bounds(self.out_features, self.in_features)
        return torch.cat([self._rows(start, stop, dtype, self.scales) for start, stop in bounds])

    def _by_row(self, start: int, stop: int, scales: Tensor) -> by_row.Rows | None:
        """What rows start:stop of W are made of, where their codes lie along them; None where compiled code cannot."""
        return None

    @abstractmethod
    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], differentiable in `scales`."""


Device = torch.device | str | None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 scales beside fp32 weights, else fp16, the dtype of GPTQ checkpoints."""
    return torch.float32 if dtype == torch.float32 else torch.float16
