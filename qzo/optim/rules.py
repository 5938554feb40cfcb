"""From d' and z to the change of a chunk of θ: plain SGD, momentum or Adam, absolute or relative.

With g = 1/n Σ_j d'_j z_j, the estimate of the gradient:

    plain       u = -lr g
    momentum    b = momentum b + g,   u = -lr b                                       as torch.optim.SGD
    betas       m = β1 m + (1 - β1) g,   v = β2 v + (1 - β2) g²,
                u = -lr m / (1 - β1^t) / (sqrt(v / (1 - β2^t)) + adam_eps)            as torch.optim.Adam

absolute: θ = θ + u. relative: θ = θ + u θ; there θ is perturbed by eps θ z, so d is the change of the loss for a change
of each number *relative to itself* (the derivative along z in coordinates r with θ = θ_t (1 + r), at r = 0), g, b, m
and v are in these coordinates too, and lr is a relative amount. A number that is 0 stays 0.

Buffers are fp32 of θ's shape, made when first needed: 4 bytes a number for momentum, 8 for Adam. `t` counts the updates
of a tensor; skipped steps do not count. Everything here is a function of d', z, lr and the options, so a journal of d'
rebuilds it to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError

Options = dict[str, Any]
UPDATE_OPTIONS = ("lr", "relative", "nonnegative", "momentum", "betas", "adam_eps")


def check_rule(group: Options) -> None:
    """Raise QzoError for momentum, betas or adam_eps out of range, two rules at once, and what is no yes or no."""
    for name in ("relative", "nonnegative"):
        if not isinstance(group.get(name), bool | None):
            raise QzoError(f"{name}={group[name]!r} is neither True nor False; choose one of them")
    momentum, betas = group.get("momentum") or 0.0, group.get("betas")
    if not 0 <= momentum < 1:
        raise QzoError(f"momentum={momentum} is not in [0, 1); choose e.g. 0.9, or 0 for none")
    if betas is None:
        return
    if momentum:
        raise QzoError(f"momentum={momentum} and betas={betas} are two rules; choose one")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise QzoError(f"betas={betas} are not two numbers in [0, 1); choose e.g. (0.9, 0.999), or None for no Adam")
    if not group.get("adam_eps", 1e-8) > 0:
        raise QzoError(f"adam_eps={group['adam_eps']} is not positive; choose e.g. 1e-8")


def update_options(group: Options) -> Options:
    """The options of a group that, with d' and z, make its update."""
    return {name: group[name] for name in UPDATE_OPTIONS if name in group}


def factors(group: Options, derivatives: tuple[float, ...]) -> list[float]:
    """Factor of each z_j in what `change` takes: -lr d'_j / n where nothing is remembered, d'_j / n where it is."""
    scale = 1.0 if _remembers(group) else -group["lr"]
    return [scale * d / len(derivatives) for d in derivatives]


def prepare(group: Options, state: Options, master: Tensor) -> None:
    """Make the buffers that the rule needs and `state` lacks, and count the update."""
    if not _remembers(group):
        return
    for key in ("exp_avg", "exp_avg_sq") if group.get("betas") else ("momentum",):
        if key not in state:
            state[key] = torch.zeros_like(master)
    if group.get("betas"):
        state["updates"] = state.get("updates", torch.zeros((), dtype=torch.float32)) + 1


def change(group: Options, state: Options, part: slice, mixed: Tensor, master: Tensor) -> Tensor:
    """What is added to the chunk `master` = θ[part]; `mixed` is Σ_j factor_j z_j and is overwritten with it."""
    if group.get("betas"):
        _adam(group, state, part, mixed)
    elif group.get("momentum"):
        buffer = state["momentum"].view(-1)[part].mul_(group["momentum"]).add_(mixed)
        torch.mul(buffer, -group["lr"], out=mixed)
    return mixed.mul_(master) if group.get("relative") else mixed


def _adam(group: Options, state: Options, part: slice, g: Tensor) -> None:
    beta1, beta2 = group["betas"]
    updates = float(state["updates"])
    m, v = state["exp_avg"].view(-1)[part], state["exp_avg_sq"].view(-1)[part]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    torch.sqrt(v, out=g).div_(math.sqrt(1 - beta2**updates)).add_(group["adam_eps"])
    torch.div(m, g, out=g).mul_(-group["lr"] / (1 - beta1**updates))


def _remembers(group: Options) -> bool:
    return bool(group.get("betas") or group.get("momentum"))
