"""Learning rate, eps and the bound of d, from what a probe measured."""

from __future__ import annotations

import math

from qzo.training.auto.probe import Probe
from qzo.training.settings import AUTO, TrainSettings

NOISE = 0.2  # share of the loss that the random part of all steps may add
FARTHEST = 0.05  # that one step moves a scale, as a share of it, in the root mean square
STABLE = 0.25  # of the lr at which a step along noise alone would no longer end below where it began
CLIP = 3.0  # times the usual |d|
EPS, LEAST_EPS, MOST_EPS = 1.0, 3e-2, 5e-2


def chosen(settings: TrainSettings, found: Probe) -> dict[str, float]:
    """Name -> value of each of lr, eps and clip_threshold that is to be chosen.

    A step -lr 1/n Σ d_j z_j moves every scale by about ρ = lr |d| / √n of itself, nearly all of it at random, which
    raises the loss by ½ ρ² tr H. In a quadratic model the best lr is the one at which that takes half of what a step
    gains; how much there is to gain is not known, so the whole run is given a fifth of the loss to spend on it:

        Σ_t ½ ρ_t² tr H = 0.2 loss,   ρ_t = ρ falling as the schedule has it

    For the settings found by hand for SmolLM2 (reports/studies/accuracy) it is 0.18. No step moves scales by more than
    5 %, and lr stays below a quarter of n / tr H, from where on a step overshoots along its own directions.

    eps: the directions of a step are compared with one another, so of ½ eps zᵀHz only what differs between them is
    left in d, a tenth to a fourth of |d| at eps = |d| / tr H; within 3e-2, below which rounding in bfloat16 is seen,
    and 5e-2.
    clip_threshold: three times |d|, which grows where steps have made a model steeper.
    """
    n, flat = settings.directions, 1e-12
    budget = NOISE * max(found.loss, flat)
    spent = 0.5 * max(found.curvature, flat) * sum(settings.schedule(step) ** 2 for step in range(settings.steps))
    rho = min(math.sqrt(budget / spent), FARTHEST)
    slope = max(found.slope, flat)
    values = {
        "lr": min(rho * math.sqrt(n) / slope, STABLE * n / max(found.curvature, flat)),
        "eps": min(max(EPS * slope / max(found.curvature, flat), LEAST_EPS), MOST_EPS),
        "clip_threshold": CLIP * slope,
    }
    return {name: _rounded(value) for name, value in values.items() if getattr(settings, name) == AUTO}


def told(found: Probe, settings: TrainSettings, exact: bool) -> str:
    """A line for the user: what is trained how, and what was measured; `exact`, in float32 arithmetic."""
    layers = f"layers {settings.layers}" if settings.layers else "all layers"
    clip = settings.optimizer_options()["clip_threshold"]
    bound = "no bound of d" if clip is None else f"d bounded at {clip:g}"
    hidden = not exact and found.slope * float(settings.eps) < found.noise
    more = "; so small a slope is hidden by the rounding of the loss, with --dtype float32 it is not" if hidden else ""
    return (
        f"training {layers}, lr {settings.lr:g} {settings.scheduler}, eps {settings.eps:g}, {bound}, "
        f"{settings.batch_size} rows a step; measured by {found.evaluations} forward passes: |d| {found.slope:.2g}, "
        f"curvature {found.curvature:.2g}{more}"
    )


def _rounded(value: float) -> float:
    """Two digits: what was measured has no more of them."""
    return float(f"{value:.1e}")
