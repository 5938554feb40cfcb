"""What a few forward passes tell of the loss around a model: how steep it is, and how curved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from qzo.errors import NotFinite
from qzo.live.trainable import scale_group
from qzo.optim.qzo import QZO
from qzo.optim.spsa import live_tensors

DIRECTIONS = 4
RADIUS, WIDEST, NARROWEST = 0.05, 0.2, 1e-3  # relative to each scale
LEAST, MOST = 0.004, 0.1  # of the loss: a rise between them stands out of rounding and is still a parabola's
TRIES = 3


@dataclass(frozen=True)
class Probe:
    """Along random directions z, with every scale moved by a share of itself.

    Attributes:
        loss: of the model as it is.
        slope: root mean square of d = g·z.
        curvature: mean of zᵀHz, which is tr H; 0 where the loss rises along no direction.
        radius: how far the model was moved.
        evaluations: forward passes of the loss that it took.
        noise: standard deviation of a loss around the parabola, from direction to direction: rounding, and what
            zᵀHz differs by.
    """

    loss: float
    slope: float
    curvature: float
    radius: float
    evaluations: int
    noise: float = 0.0


@torch.no_grad()
def probe(model: nn.Module, named: dict[str, Tensor], loss: Callable[[], Tensor], seed: int = 0) -> Probe:
    """Measure slope and curvature on one batch, both ways along 4 directions; the model is then as it was, to the bit.

    The radius is 5 % of each scale, wider where the loss hardly rises (below 0.4 %, bfloat16 rounds it away), narrower
    where it rises by more than a tenth; three are tried at most.

    Args:
        model: quantized.
        named: name -> live scales, from `qzo.scales`.
        loss: of one batch and the model as it stands.
        seed: of z.

    Extra memory: the scales, in fp32 and as they are. Raises NotFinite for a loss that is not.
    """
    start = _finite(float(loss()))
    radius, count = RADIUS, 1
    for left in reversed(range(TRIES)):
        slopes, rises = _along(model, named, loss, seed, radius, start)
        count += 2 * DIRECTIONS
        rise, kept = fmean(rises), radius
        if rise > MOST * max(start, LEAST) and radius > NARROWEST:
            radius = max(radius / 4, NARROWEST)
        elif rise < LEAST * start and radius < WIDEST:
            radius = min(radius * 2, WIDEST)
        else:
            break
        if not left:
            break
    slope = math.sqrt(fmean(d * d for d in slopes))
    noise = stdev(rises) * math.sqrt(2) if math.isfinite(rise) else math.inf  # a rise is a mean of two losses
    return Probe(start, slope, max(0.0, 2 * rise / kept**2), kept, count, noise)


def _along(
    model: nn.Module, named: dict[str, Tensor], loss: Callable[[], Tensor], seed: int, radius: float, start: float
) -> tuple[list[float], list[float]]:
    """d and the rise of the loss, the mean of both sides, for each direction."""
    optimizer = QZO([scale_group(model, named)], lr=0.0, eps=radius, relative=True, clip_threshold=None, seed=seed)
    optimizer.max_skipped = None
    before = {name: tensor.clone() for name, tensor in live_tensors(optimizer).items()}
    slopes, rises = [], []
    try:
        for _ in range(DIRECTIONS):
            optimizer.step(loss)
            last = optimizer.last
            assert last is not None
            wreck = last.skipped  # so far away that the loss is not finite: steeper than can be told
            slopes.append(0.0 if wreck else last.directional_derivative)
            rises.append(math.inf if wreck else (last.loss_plus + last.loss_minus) / 2 - start)
    finally:
        for name, tensor in live_tensors(optimizer).items():
            tensor.copy_(before[name])
    return slopes, rises


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NotFinite(
            f"the loss before the first step is {value}; run it in a wider dtype, --dtype bfloat16 or float32"
        )
    return value
