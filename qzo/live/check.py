"""Whether the scales that would be trained are those that the model computes with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.live.scales import scales

FACTOR = 1.05
TRIES = 3  # layers of one class


@torch.no_grad()
def check_live(
    model: nn.Module, loss: Callable[[], Any], seed: int = 0, layers: tuple[int, int] | None = None
) -> list[str]:
    """Prove that the scales of a quantized model are live: scaling those of one layer by 1.05 must move the loss.

    Some kernels keep a rebuilt weight or a copy of the scales; then training would change nothing, silently. Each class
    of quantized layers is tried on one layer, drawn by `seed` from those that the batch reaches; where that leaves the
    loss as it is (an expert with a weight of zero), on up to three. Everything is restored to the bit. A loss that is
    not finite tells nothing and is left to the steps that follow.

    Args:
        model: with layers that `qzo.scales` knows.
        loss: () -> scalar of one batch, of the model as it stands, without dropout; called three times or more.
        seed: of the draw.
        layers: first and last decoder layer that may be drawn, as in `qzo.scales`.

    Returns the paths of the layers that moved the loss. Extra memory: the scales of one layer, twice.

    Raises QzoError, with the layer and the class of its module, where the loss stays what it was, and for a model
    without quantized layers.
    """
    by_path = {name.removesuffix("scales").removesuffix("."): scale for name, scale in scales(model, layers).items()}
    before, reached = _reached(model, by_path, loss)
    noise = abs(float(loss()) - before)  # of the device, where sums come in another order
    if not math.isfinite(before) or not math.isfinite(noise):
        return []
    draw = random.Random(seed)
    kinds: dict[str, list[str]] = {}
    for path in draw.sample(reached, len(reached)):
        kinds.setdefault(type(model.get_submodule(path)).__name__, []).append(path)
    return [_first_live(kind, paths, by_path, loss, before, noise) for kind, paths in sorted(kinds.items())]


def _first_live(
    kind: str, paths: list[str], scale_of: dict[str, Tensor], loss: Callable[[], Any], before: float, noise: float
) -> str:
    """The first of up to three layers whose scales move the loss. Raises QzoError where none does."""
    for path in paths[:TRIES]:
        scale = scale_of[path]
        kept = scale.clone()
        try:
            scale.mul_(FACTOR)
            after = float(loss())
        finally:
            scale.copy_(kept)
        if not abs(after - before) <= noise:
            return path
    raise QzoError(
        f"{paths[0]}: {FACTOR} times its scales leave the loss at {before:g}, so this {kind} does not compute with "
        "them and training would change nothing; load the model with qzo.load, or choose a kernel that reads the "
        "scales in every forward"
    )


def _reached(model: nn.Module, paths: dict[str, Tensor], loss: Callable[[], Any]) -> tuple[float, list[str]]:
    """The loss, and the layers that it calls with data; all of them where no call is seen."""
    seen: list[str] = []

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.numel():
                seen.append(path)

        return note

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        value = float(loss())
    finally:
        for handle in handles:
            handle.remove()
    return value, sorted(set(seen)) or list(paths)
