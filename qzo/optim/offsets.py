"""Offsets that follow their scales, for formats with w = q s + m (GGUF Q4_1, tinygemm).

The paper trains Δ in W = Δ ⊙ W_int. Written that way, w = s (q + m / s): the integer q and the ratio m / s stay, and
scale and offset move together by the same relative amount. For a scale that started at s0 beside an offset m0:

    s -> s'      m' = m0 (s' / s0)      so      w' = q s' + m' = w s' / s      for every code q of the group

m' is computed from m0 and s0 (both kept in fp32, 8 bytes a scale) and the present s', never from the last m: nothing
drifts, m' is a function of s', and s' = s0 gives m0 to the bit. There is one z a scale; an offset has none of its own.
Where s0 = 0 there is no relative amount: the offset stays m0, and the scale moves alone. Should a scale fall to 0, so
does its offset, and both come back together.

Integer zero points need none of this: w = (q - zero) s, as in GPTQ checkpoints and QuantLinear, moves as a whole when s
does.

`qzo.scales` binds each live scale to its offset, on the tensor itself: however it reaches the optimizer (in a dict, a
list, some of them, a parameter group), the offset follows. A group that names its "offsets" has those and no others, {}
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.optim.guards.groups import check_tensor

OFFSET_STATE = ("scale_start", "offset_start")
BOUND = "qzo_offset"  # attribute of a live scale


def bind(scale: Tensor, offset: Tensor) -> None:
    """Let an offset follow this very tensor in every `qzo.QZO` that is given it and no offsets by name."""
    setattr(scale, BOUND, offset)


def take_offsets(named: dict[str, Tensor] | None, group: dict[str, Any]) -> dict[Tensor, Tensor]:
    """Scale -> its live offset: of the named scales of a parameter group or, with None, what its tensors are bound to.

    Raises QzoError where one does not fit.
    """
    names = group.get("param_names") or [str(number) for number in range(len(group["params"]))]
    scales = dict(zip(names, group["params"], strict=True))
    if named is None:
        named = {name: getattr(scale, BOUND) for name, scale in scales.items() if hasattr(scale, BOUND)}
    for name, offset in named.items():
        if name not in scales:
            raise QzoError(
                f'offsets["{name}"] belongs to no scale of that name in the same parameter group; name it as its scale'
            )
        check_tensor((f'offsets["{name}"]', offset))
        if offset.shape != scales[name].shape:
            found, wanted = tuple(offset.shape), tuple(scales[name].shape)
            raise QzoError(f'offsets["{name}"] has shape {found}, its scale {wanted}; they must be the same')
    return {scales[name]: offset for name, offset in named.items()}


def start(scale: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """s0 and m0 in fp32, for the optimizer's state."""
    return {
        key: torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device).copy_(tensor.detach())
        for key, tensor in zip(OFFSET_STATE, (scale, offset), strict=True)
    }


def following(state: dict[str, Tensor], scale: Tensor) -> Tensor:
    """m' of some elements whose state and s' these are, in fp32."""
    scale_start, offset_start = (state[key].view(-1) for key in OFFSET_STATE)
    return (scale / scale_start).masked_fill_(scale_start == 0, 1).mul_(offset_start)


def steepest(state: dict[str, Tensor]) -> float:
    """max |m0 / s0|: how much faster than its scale an offset may grow. Extra memory: chunks of 65,536."""
    scale_start, offset_start = (state[key].view(-1) for key in OFFSET_STATE)
    pairs = zip(scale_start.split(2**16), offset_start.split(2**16), strict=True)
    return max((float((m / s).masked_fill_(s == 0, 0).abs().amax()) for s, m in pairs if s.numel()), default=0.0)


def follow(offset: Tensor, state: dict[str, Tensor], part: slice, scale: Tensor) -> None:
    """Write m' = m0 (s' / s0) to the elements `part` of the live offset; `scale` = s' in fp32 is overwritten."""
    scale_start, offset_start = (state[key].view(-1)[part] for key in OFFSET_STATE)
    scale.div_(scale_start).masked_fill_(scale_start == 0, 1).mul_(offset_start)
    offset.detach().view(-1)[part].copy_(scale)
