"""MeZO: zeroth-order training of full-precision weights in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.optim.estimator import Estimator, usual_of
from qzo.optim.guards.reach import LARGEST_Z, largest_of
from qzo.optim.noise import chunk_elements
from qzo.optim.ranks import Ranks
from qzo.optim.spsa import Applied, Parameters, SpsaOptimizer, flat

BITS_OF = {2: torch.int16, 4: torch.int32}  # integer dtype of the same size, in bytes


class Moved(NamedTuple):
    """How far a chunk stands from θ along z, and indices and values of what moving back alone would not restore."""

    distance: float
    lost: tuple[Tensor, Tensor] | None


class MeZO(SpsaOptimizer):
    """SPSA on weights, in place and without masters (Malladi et al., arXiv 2305.17333).

        d = (L(θ + eps z) - L(θ - eps z)) / (2 eps),   θ = θ - lr d z

    Weights move chunk by chunk, in fp32, rounded once to their dtype. Where w + eps z leaves w's power of two, low
    bits are lost and (w + eps z) - eps z is not w. `exact=True` remembers those entries (4 bytes of index and the
    value) until they are put back, so that every step starts from the very weights the last one left. Extra memory,
    measured for weights N(0, 0.02) and eps=1e-3: 4.7 % of the entries and 14 % of the weights' bytes in bf16, 7.5 %
    and 15 % in fp32; besides one chunk each of z and of the weights and two of fp32, see `qzo.optim.noise`.

    For a LoRA adapter, pass the adapter's parameters alone, `qzo.adapters(model)`. Momentum, Adam and relative steps
    need masters; QZO with `nonnegative=False` has them, for any tensors.

    Args:
        named_parameters: `model.named_parameters()`, or tensors, name -> tensor, parameter groups. All are trained,
            whatever their `requires_grad`; a tensor named twice is trained once.
        lr, eps, clip_threshold, seed: as in QZO; clipping is off by default.
        directions, distribution, estimator, normalize, noise, max_skipped, ranks: as in QZO.
        exact: False leaves the undo list out: the classic arithmetic, whose rounding errors stay in the weights (3.7e-5
            rms after ten steps in bf16, as above). It reads no data, so it is the one that runs on `meta`.

    Raises:
        QzoError: as QZO.
    """

    def __init__(
        self,
        named_parameters: Parameters,
        lr: float = 1e-6,
        eps: float = 1e-3,
        seed: int = 0,
        clip_threshold: float | None = None,
        exact: bool = True,
        *,
        directions: int = 1,
        distribution: str | None = None,
        estimator: str = "two-sided",
        normalize: bool = False,
        noise: str = "generator",
        max_skipped: int | None = 10,
        ranks: Ranks | None = None,
    ) -> None:
        if ranks is not None and not exact:
            raise QzoError(
                "exact=False leaves other bits behind on each rank, which evaluate other things; give exact=True"
            )
        self.exact = exact
        self._moved: dict[tuple[int, int], Moved] = {}  # by tensor index and first element; empty between steps
        self._along = 0  # the direction that the moved chunks stand on
        measured = Estimator(directions, distribution or usual_of(noise), estimator, normalize, noise)
        super().__init__(
            named_parameters, seed, measured, max_skipped, ranks, lr=lr, eps=eps, clip_threshold=clip_threshold
        )

    def truth(self) -> dict[str, Tensor]:
        """The trained tensors themselves, as "index.value"."""
        return {f"{index}.value": tensor.detach() for index, _, _, tensor in self._tensors()}

    @torch.no_grad()
    def set_truth(self, tensors: dict[str, Tensor]) -> None:
        """As the base class."""
        own = self.truth()
        if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in own.items()}:
            raise QzoError(
                f"{len(tensors)} saved tensors do not fit the {len(own)} that this optimizer trains; load the state "
                "of one that trains the same"
            )
        for name, value in tensors.items():
            own[name].copy_(value)

    def _measured(self, number: int) -> tuple[float, float]:
        group = self.param_groups[number]
        moved = group["eps"] * LARGEST_Z if self._moved else 0.0  # they stand beside θ while a step is taken
        return max(largest_of(tensor) for tensor in group["params"]) + moved, 0.0

    def _limit(self, number: int) -> float:
        return min(torch.finfo(tensor.dtype).max for tensor in self.param_groups[number]["params"])

    def _check_places(self) -> None:
        for number, group in enumerate(self.param_groups if not self.exact else ()):
            if group["eps"] * LARGEST_Z >= (limit := self._limit(number)):
                raise QzoError(
                    f"eps={group['eps']:g} moves weights beyond {limit:g}, the largest number of their dtype, from "
                    "where exact=False cannot bring them back; choose e.g. 1e-3"
                )

    def _try(self, number: int, applied: Applied) -> bool:
        self._restore()
        self._along = 0
        for index, _, of, tensor in self._tensors():
            if of != number:
                continue
            weights, rate = flat(tensor), self.param_groups[number]["lr"]
            distances = [-rate * d / len(applied[number]) for d in applied[number]]
            for mixed, part in self._mixed(index, tensor, distances):
                if not bool(mixed.add_(weights[part].float()).to(tensor.dtype).isfinite().all()):
                    return False
            del mixed
        return True

    def _perturb(self, direction: int, sign: int) -> None:
        if direction != self._along:
            self._restore()
        self._along = direction
        self._sweep(sign, None)

    def _restore(self) -> None:
        if self._moved:
            self._sweep(0, None)

    def _update(self, applied: Applied) -> None:
        if self.estimator.directions > 1:
            self._restore()
            self._along = 0
        self._sweep(0, applied)

    def _sweep(self, sign: int, applied: Applied | None) -> None:
        """Move all weights to θ, by -lr g where d' are given, then by sign * eps * z, with one draw of z.

        With d' of several directions the weights must stand at θ already, and the draw is that of their sum.
        """
        for index, _, number, tensor in self._tensors():
            group = self.param_groups[number]
            weights = flat(tensor)
            size = min(tensor.numel(), chunk_elements(tensor.numel(), self.estimator.noise))
            work = torch.empty(size, dtype=torch.float32, device=tensor.device)
            distances = [-group["lr"] * d / len(applied[number]) for d in applied[number]] if applied else []
            several = len(distances) > 1
            drawn = self._mixed(index, tensor, distances) if several else self._noise(index, tensor, self._along)
            for z, part in drawn:
                chunk, fp32 = weights[part], work[: len(z)]
                moved = self._moved.pop((index, part.start), None)
                if moved is not None:
                    _move(chunk, z, -moved.distance, fp32)
                    if moved.lost is not None:
                        chunk.index_copy_(0, moved.lost[0].long(), moved.lost[1])
                if distances:
                    _move(chunk, z, 1.0 if several else distances[0], fp32)
                if sign:
                    self._moved[index, part.start] = self._move_away(chunk, z, sign * group["eps"], fp32)
            del z, work, chunk, fp32  # before the next tensor's are born

    def _move_away(self, chunk: Tensor, z: Tensor, distance: float, work: Tensor) -> Moved:
        if not self.exact:
            _move(chunk, z, distance, work)
            return Moved(distance, None)
        before = chunk.clone()
        try:
            _move(chunk, z, distance, work)
            return Moved(distance, _lost(before, chunk, z, distance, work))
        except BaseException:  # out of memory, most likely: this chunk is not yet among the moved ones
            chunk.copy_(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "exact": self.exact, "_moved": {}, "_along": 0}


def _move(chunk: Tensor, z: Tensor, distance: float, work: Tensor) -> None:
    """chunk = round(chunk + distance * z), computed in `work`."""
    torch.mul(z, distance, out=work)
    chunk.copy_(work.add_(chunk.float()))  # cast by hand: on a CPU the mixed sum would make the copy unseen


def _lost(before: Tensor, moved: Tensor, z: Tensor, distance: float, work: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (int32) and values of the entries that moving back by `distance` does not bring back bit for bit."""
    torch.mul(z, -distance, out=work)
    back = work.add_(moved.float()).to(before.dtype)
    bits = BITS_OF[before.element_size()]
    where = (back.view(bits) != before.view(bits)).nonzero().squeeze(1)
    return where.to(torch.int32), before.index_select(0, where)
