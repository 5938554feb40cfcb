"""How a step measures the loss: along which directions, on one side or both, and what d becomes before it is used."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from qzo.errors import QzoError

# Where z comes from, and what it may be, by default the first: PyTorch's generator, which every kind of device has of
# its own, or Philox, the same on all of them, see qzo.optim.noise.
NOISE = {"generator": ("gaussian", "rademacher"), "philox": ("binomial", "rademacher")}
SIDES = ("two-sided", "one-sided", "population")
Losses = tuple[float, float]  # of one direction: at θ + eps z, and at θ - eps z, at θ, or the mean of the others'


@dataclass(frozen=True)
class Estimator:
    """Finite differences of the loss along `directions` random z_j, averaged: g = 1/n Σ_j d'_j z_j.

        two-sided  d_j = (L(θ + eps z_j) - L(θ - eps z_j)) / (2 eps)      2n evaluations, Eq. 5 for n = 1
        one-sided  d_j = (L(θ + eps z_j) - L(θ)) / eps                    n + 1 evaluations
        population d_j = (L(θ + eps z_j) - mean_i≠j L(θ + eps z_i)) / eps n evaluations
        d'_j = clamp(d_j, -C, C)                                          Eq. 6
        d'_j = d'_j / std(L(θ + eps z_1), ..., L(θ + eps z_n))            with `normalize`

    One-sided, Rademacher and normalized is FZOO (Dang et al., arXiv 2506.09034); its std is the unbiased one. A step
    then moves each number by about lr / (eps sqrt(n)), whatever the loss, so lr is to be chosen anew. The perturbed
    models are evaluated one after the other, not in one batch: each has scales of its own. Where all losses are the
    same to the bit, d' = 0.

    Population, normalized, is an evolution strategy with scores standardized over its population (Salimans et al.,
    arXiv 1703.03864; the mean of the others is RLOO's baseline). What a loss owes to chance, as one of sampled texts
    does, counts once for each direction; against one common evaluation it counts twice.

    Raises QzoError for values out of range and options that do not fit together.
    """

    directions: int = 1
    distribution: str = "gaussian"
    sides: str = "two-sided"
    normalize: bool = False
    noise: str = "generator"

    def __post_init__(self) -> None:
        if not isinstance(self.directions, int) or self.directions < 1:
            raise QzoError(f"directions={self.directions!r} is not a positive whole number; choose 1 or more")
        usual, other = usual_of(self.noise), NOISE[self.noise][1]
        if self.distribution not in (usual, other):
            raise QzoError(
                f'distribution="{self.distribution}" is not one of noise="{self.noise}"; choose "{usual}" or "{other}"'
            )
        if self.sides not in SIDES:
            raise QzoError(f'estimator="{self.sides}" is not known; choose "two-sided" or "one-sided"')
        if self.sides == "population" and self.directions < 2:
            raise QzoError(
                'estimator="population" compares directions with one another and needs directions >= 2; choose 8, as '
                "--preset auto does"
            )
        if self.normalize and (self.sides == "two-sided" or self.directions < 2):
            raise QzoError(
                'normalize=True needs estimator="one-sided" or "population" and directions >= 2, for a spread of '
                "losses: choose them, or leave it out"
            )

    def options(self) -> dict[str, Any]:
        """All of it, for JSON; noise="generator" goes without saying, as before there was another."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("noise", "generator")}

    def evaluations(self) -> list[tuple[int, int]]:
        """(direction, sign) of each evaluation in turn: the loss at θ + sign * eps * z, at θ itself for 0."""
        ahead = [(direction, 1) for direction in range(self.directions)]
        if self.sides == "one-sided":
            return [(0, 0), *ahead]
        if self.sides == "population":
            return ahead
        return [(direction, sign) for direction in range(self.directions) for sign in (1, -1)]

    def paired(self, found: list[float]) -> list[Losses]:
        """Losses of each direction, of those that the evaluations found."""
        if self.sides == "one-sided":
            return [(loss, found[0]) for loss in found[1:]]
        if self.sides == "population":
            return [(loss, _mean_of_others(found, number)) for number, loss in enumerate(found)]
        return list(zip(found[::2], found[1::2], strict=True))

    def derivatives(self, losses: list[Losses], eps: float) -> tuple[float, ...]:
        """d of each direction, neither clipped nor normalized."""
        distance = 2 * eps if self.sides == "two-sided" else eps
        return tuple((plus - minus) / distance for plus, minus in losses)

    def applied(self, raw: tuple[float, ...], losses: list[Losses], bound: float) -> tuple[float, ...]:
        """d' of each direction, clipped to ±bound, then normalized where that is asked for."""
        clipped = tuple(min(max(d, -bound), bound) for d in raw)
        if not self.normalize:
            return clipped
        spread = statistics.stdev(plus for plus, _ in losses) if all_finite(losses) else math.nan
        return tuple(d / spread if spread else 0.0 for d in clipped)

    def value(self, losses: list[Losses]) -> float:
        """The loss of the step: at θ where it was evaluated, else the mean of all evaluations."""
        if self.sides == "one-sided":
            return losses[0][1]
        if self.sides == "population":
            return sum(plus for plus, _ in losses) / len(losses)
        return sum(plus + minus for plus, minus in losses) / (2 * len(losses))


def usual_of(noise: str) -> str:
    """The distribution that z of this noise has by default. Raises QzoError for a noise that is not known."""
    if noise not in NOISE:
        raise QzoError(f'noise="{noise}" is not known; choose "generator" or "philox"')
    return NOISE[noise][0]


def _mean_of_others(losses: list[float], number: int) -> float:
    """Of all losses but one; where all are the same to the bit, so is it."""
    others = losses[:number] + losses[number + 1 :]
    return others[0] if len(set(others)) == 1 else sum(others) / len(others)


def all_finite(losses: list[Losses]) -> bool:
    """Whether every loss is a finite number."""
    return all(math.isfinite(loss) for pair in losses for loss in pair)
