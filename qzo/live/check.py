"""Whether the scales that would be trained are those that the model computes with."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.live.evidence import Evidence, evidence, moved
from qzo.live.scales import scales

CHANGE = 0.25  # each scale is multiplied by a number of its own, from 1 - CHANGE ... 1 + CHANGE
TRIES = 3  # layers of one class


@torch.no_grad()
def check_live(
    model: nn.Module, loss: Callable[[], Any], seed: int = 0, layers: tuple[int, int] | None = None
) -> list[str]:
    """Prove that the scales of a quantized model are live: changing those of one layer must move loss or logits.

    Some kernels keep a rebuilt weight or a copy of the scales; then training would change nothing, silently. Each class
    of quantized layers is tried on one layer, drawn by `seed` from those that the batch reaches; where that moves
    nothing (an expert with a weight of zero), on up to three, of different roles where there are some. Each scale gets
    a random factor of its own between 0.75 and 1.25: one factor for all of them would cancel in a norm that follows.
    What the model gives out is watched beside the loss, which may be saturated. Everything is restored to the bit.

    Args:
        model: with layers that `qzo.scales` knows.
        loss: () -> scalar of one batch, of the model as it stands; called three times or more, with the same masks
            where there is dropout.
        seed: of the draw.
        layers: first and last decoder layer that may be drawn, as in `qzo.scales`.

    Returns the paths of the layers that moved something; none where the loss alone is not finite (a batch without
    labels), which is left to the steps that follow. Extra memory: the scales of one layer, twice, and 24 MiB.

    Raises QzoError, with the layer and the class of its module, where nothing moves; for a model whose logits and loss
    are not finite before any step, with the dtype to blame; and for a model without quantized layers.
    """
    by_path = {name.removesuffix("scales").removesuffix("."): scale for name, scale in scales(model, layers).items()}
    before = evidence(model, loss, by_path)
    if not math.isfinite(before.loss):
        _blame_dtype(model, before)
        return []
    again = evidence(model, loss, by_path)  # tells the noise of the device, where sums come in another order
    if not math.isfinite(again.loss):
        return []
    reached = before.called or sorted(by_path)  # all of them where no call is seen
    kinds: dict[str, list[str]] = {}
    for path in random.Random(seed).sample(reached, len(reached)):
        kinds.setdefault(type(model.get_submodule(path)).__name__, []).append(path)
    return [
        _first_live(model, kind, _by_role(paths)[:TRIES], by_path, loss, (before, again), seed)
        for kind, paths in sorted(kinds.items())
    ]


def _first_live(
    model: nn.Module,
    kind: str,
    paths: list[str],
    scale_of: dict[str, Tensor],
    loss: Callable[[], Any],
    unchanged: tuple[Evidence, Evidence],
    seed: int,
) -> str:
    """The first layer whose scales move something. Raises QzoError where none does."""
    for path in paths:
        scale = scale_of[path]
        kept = scale.clone()
        try:
            scale.mul_(_factors(scale, seed))
            after = evidence(model, loss, {})
        finally:
            scale.copy_(kept)
        if moved(*unchanged, after):
            return path
    raise QzoError(
        f"{paths[0]}: other scales, each by up to {CHANGE:.0%}, leave the loss at {unchanged[0].loss:g} and the logits "
        f"as they were, so this {kind} does not compute with them and training would change nothing; load the model "
        "with qzo.load, or choose a kernel that reads the scales in every forward"
    )


def _factors(scale: Tensor, seed: int) -> Tensor:
    """A number between 1 - CHANGE and 1 + CHANGE for each scale."""
    drawn = torch.rand(scale.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.mul_(2 * CHANGE).add_(1 - CHANGE).to(scale.device, scale.dtype)


def _by_role(paths: list[str]) -> list[str]:
    """In their order, but layers that do the same (q_proj of two decoder layers) after the first of each role.

    Queries and keys move nothing where every token sees itself alone.
    """
    seen: dict[str, int] = {}
    turns = []
    for path in paths:
        role = re.sub(r"\d+", "", path)
        turns.append(seen.get(role, 0))
        seen[role] = turns[-1] + 1
    return [path for _, path in sorted(zip(turns, paths, strict=True), key=lambda pair: pair[0])]


def _blame_dtype(model: nn.Module, before: Evidence) -> None:
    """Raise QzoError where the model gives out numbers that are not finite: no step would mend that."""
    if not before.broken:
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name = str(dtype).removeprefix("torch.")
    remedy = "a scale, norm or head of the checkpoint may be NaN (qzo inspect), or the data hold wrong tokens"
    if dtype == torch.float16:
        remedy = "float16 overflows in this model; load it with dtype=torch.bfloat16 (--dtype bfloat16)"
    raise QzoError(f"loss {before.loss:g} and logits that are not finite, in {name}, before any step; {remedy}")
