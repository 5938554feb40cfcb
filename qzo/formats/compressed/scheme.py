"""How the weights of a layer are stored, by a config group of compressed-tensors; what else it may ask is refused.

Only integers are trained, and only where nothing but weights is quantized. Packed codes have 2, 4 or 8 bits: those of
other sizes lie across words or not, depending on the version of the library that wrote them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qzo.errors import QzoError

PACKED = "pack-quantized"
BITS = {PACKED: (2, 4, 8), "int-quantized": range(1, 9), "naive-quantized": range(1, 9)}
STRATEGIES = ("group", "channel", "tensor")
BY_GROUP = ("group", "dynamic")  # actorder with a tensor g_idx; "weight" and "static" have none
Expected = tuple[torch.dtype | None, tuple[int, ...]]  # None is any floating dtype


@dataclass(frozen=True)
class Scheme:
    """How a weight [N, K] is stored.

    Args:
        format: "pack-quantized" (codes in int32 words), "int-quantized" or "naive-quantized" (an int8 each).
        n_bits: of a code.
        symmetric: no zero points.
        strategy: "group" (a scale for `group_size` weights of a row), "channel" (for a row), "tensor" (for all).
        group_size: None where the strategy is another.
        ordered: whether a tensor says which group each column is in.
        group: the config group itself.
    """

    format: str
    n_bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    ordered: bool
    group: dict[str, Any]

    @property
    def is_packed(self) -> bool:
        """Whether codes lie in words."""
        return self.format == PACKED

    def tensors(self, rows: int, columns: int) -> dict[str, Expected]:
        """Name -> dtype and shape of what the checkpoint has for a weight [N, K]. Raises QzoError for odd groups."""
        if self.group_size is not None and columns % self.group_size:
            raise QzoError(f"rows of {columns} weights are not divisible into groups of {self.group_size}")
        groups = 1 if self.group_size is None else columns // self.group_size
        scales = (1,) if self.strategy == "tensor" else (rows, groups)
        found: dict[str, Expected] = {"weight": (torch.int8, (rows, columns))}
        if self.is_packed:
            found = {"weight_packed": (torch.int32, (rows, self.words(columns)))}
        found["weight_scale"] = (None, scales)
        if not self.symmetric:
            in_words = self.is_packed and self.strategy != "tensor"
            zeros = (torch.int32, (self.words(rows), groups)) if in_words else (torch.int8, scales)
            found["weight_zero_point"] = zeros
        if self.ordered:
            found["weight_g_idx"] = (torch.int32, (columns,))
        return found

    def words(self, codes: int) -> int:
        """int32 words that so many codes fill, the last one in part."""
        return -(-codes * self.n_bits // 32)


def scheme_of(group: dict[str, Any], usual: Any) -> Scheme | None:
    """The scheme of a config group in a checkpoint whose usual format is `usual`; None where it quantizes nothing.

    Raises QzoError for what cannot be trained here, and for settings that are none.
    """
    for part in ("input_activations", "output_activations"):
        if group.get(part) is not None:
            raise QzoError(_of_activations(part, group[part]))
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise QzoError("weights is not a JSON object")
    name = group.get("format") or usual
    if name not in list(BITS):
        raise QzoError(f'format="{name}" is not supported; need {", ".join(BITS)}')
    kind, n_bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if str(kind).lower() != "int" or type(n_bits) is not int or n_bits not in BITS[name]:
        known = ", ".join(map(str, BITS[name]))
        raise QzoError(f"weights of type {kind} with {n_bits} bits are not supported in {name}; need int with {known}")
    if weights.get("dynamic"):
        raise QzoError("weights are quantized anew in each forward (dynamic); there are no scales to train")
    strategy, group_size = _strategy(weights)
    order, symmetric = weights.get("actorder"), weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise QzoError(f"symmetric={symmetric} is neither true nor false")
    ordered = strategy == "group" and (order is True or str(order).lower() in BY_GROUP)
    return Scheme(name, n_bits, symmetric, strategy, group_size, ordered, group)


def _strategy(weights: dict[str, Any]) -> tuple[str, int | None]:
    """Strategy, which follows from the group size where none is named, and group size of strategy "group"."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if not isinstance(strategy, str) or strategy.lower() not in STRATEGIES:
        raise QzoError(f'strategy="{strategy}" is not supported; need {", ".join(STRATEGIES)}')
    if strategy.lower() != "group":
        return strategy.lower(), None
    if type(size) is not int or size < 1:
        raise QzoError(f"group_size={size} is not a positive number")
    return "group", size


def _of_activations(part: str, about: Any) -> str:
    dynamic, only = (
        about.get("dynamic") if isinstance(about, dict) else None,
        "only weight-only quantization is trained",
    )
    if not dynamic:
        return f"{part} are quantized too, with fixed scales; {only}"
    return f"{part} are rounded too, anew in each forward (dynamic), which training would not see; {only}"
