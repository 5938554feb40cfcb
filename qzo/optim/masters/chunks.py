"""A trained tensor moved along z, chunk after chunk: by compiled code on a CPU, else by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from qzo.kernels import moves
from qzo.optim import offsets, rules
from qzo.optim.guards.groups import Group
from qzo.optim.noise import chunk_elements
from qzo.optim.spsa import flat

KEPT = ("momentum", "exp_avg", "exp_avg_sq")
Drawn = Iterable[tuple[Tensor, slice]]  # chunks of z, or of a sum of several, which may be overwritten, and whose


class Scales:
    """The live numbers of a trained tensor, its master and what else the optimizer keeps of it, as they lie.

    Args:
        live: what the model computes with. state: "master", fp32, and what the rule and the offsets need.
        offset: follows the live numbers, see `qzo.optim.offsets`; None, none does.
    """

    def __init__(self, live: Tensor, state: dict[str, Any], offset: Tensor | None) -> None:
        self.live, self.master, self.state, self.offset = flat(live), flat(state["master"]), state, offset
        following = None
        if offset is not None:
            scale_start, offset_start = (flat(state[key]) for key in offsets.OFFSET_STATE)
            following = flat(offset), scale_start, offset_start
        can_move = moves.can_move(self.live, self.master, following)
        self._moved = moves.Moved(self.live, self.master, following) if can_move else None

    def perturb(self, drawn: Drawn, distance: float, relative: bool) -> None:
        """live = master + distance z, or master + distance z master."""
        for z, part in drawn:
            if self._moved is not None:
                self._moved.move(part.start, len(z), z, distance, relative=relative)
                continue
            chunk = self.master[part]
            z.mul_(distance)
            if relative:
                z.mul_(chunk)
            self.live[part].copy_(z.add_(chunk))
            self._follow(part, z)

    def restore(self) -> None:
        """live = master."""
        count = self.master.numel()
        if self._moved is not None:
            self._moved.move(0, count)
            return
        self.live.copy_(self.master)
        size = chunk_elements(count)
        for start in range(0, count if self.offset is not None else 0, size):
            part = slice(start, min(start + size, count))
            self._follow(part, self.master[part].clone())

    def update(self, mixed: Drawn, group: Group) -> None:
        """master = master + u by the rule of a parameter group, and live = master; `mixed` is Σ_j factor_j z_j."""
        for z, part in mixed:
            chunk = self.master[part]
            change = rules.change(group, self.state, part, z, chunk)
            if self._moved is not None:
                self._moved.move(part.start, len(change), change, nonnegative=group["nonnegative"], keeps=True)
                continue
            chunk.add_(change)
            if group["nonnegative"]:
                chunk.clamp_(min=0)
            self.live[part].copy_(chunk)
            self._follow(part, z.copy_(chunk))

    def stays_finite(self, mixed: Drawn, group: Group) -> bool:
        """Whether that update leaves all numbers finite, made on copies of one chunk after the other."""
        for z, part in mixed:
            chunk, trial = self.master[part].clone(), self._piece(part)
            rules.prepare(group, trial, chunk)
            chunk.add_(rules.change(group, trial, slice(0, len(chunk)), z, chunk))
            if group["nonnegative"]:
                chunk.clamp_(min=0)
            made = [chunk.to(self.live.dtype), *(trial[key] for key in KEPT if key in trial)]
            if self.offset is not None:
                made.append(offsets.following(trial, chunk).to(self.offset.dtype))
            if not all(bool(numbers.isfinite().all()) for numbers in made):
                return False
        return True

    def _piece(self, part: slice) -> dict[str, Any]:
        """A copy of the state of some elements."""
        size = self.master.numel()
        state = self.state.items()
        return {key: value.view(-1)[part].clone() if value.numel() == size else value for key, value in state}

    def _follow(self, part: slice, scale: Tensor) -> None:
        """Write the offset of some elements, whose live numbers are `scale`, which is overwritten."""
        if self.offset is not None:
            offsets.follow(self.offset, self.state, part, scale)
