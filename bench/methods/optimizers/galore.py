"""GaLore: AdamW whose moments of a layer's weight are those of its gradient projected to a low rank.

    R = P^T G (tall: G P^T), AdamW's step N of R, W -= lr * scale * P N

P [rank x the smaller side] are singular vectors of a gradient, taken anew every `update_proj_gap` steps. Of an fp32
gradient P is a view, so all singular vectors of that side stay. cuSOLVER's workspace for them is not counted. On a CPU
three steps of the library's own class have the same bytes, in fp32 and in bf16.

Source: galore_torch 1.0, galore_torch/{adamw,galore_projector}.py; groups of parameters and defaults as in transformers
5.23, trainer_optimizer.py, `_setup_low_rank_optimizer`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

DEFAULTS = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
PROJECTION = "std"  # on the smaller side
NAMES = ("galore_adamw", "galore_adamw_layerwise")


class GaLore(torch.optim.Optimizer):
    """AdamW, of a low rank in groups that have a `rank`."""

    def __init__(
        self, groups: Any, lr: float = 5e-5, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad, state = parameter.grad, self.state[parameter]
                low = "rank" in group
                number = state.setdefault("step", 0)
                if low:
                    if number % group["update_proj_gap"] == 0:
                        state["basis"] = basis(grad, group["rank"])
                    grad = _projected(grad, state["basis"])
                if "exp_avg" not in state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
                first, second = group["betas"]
                state["step"] += 1
                state["exp_avg"].mul_(first).add_(grad, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
                denominator = state["exp_avg_sq"].sqrt().add_(group["eps"])
                size = group["lr"] * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
                update = state["exp_avg"] / denominator
                if low:
                    update = _back(update, state["basis"], group["scale"])
                parameter.add_(update, alpha=-size)


def basis(grad: Tensor, rank: int) -> Tensor:
    """Singular vectors of the smaller side: [rank, K] of a tall gradient [N, K], [N, rank] of a wide one."""
    matrix = grad if grad.dtype is torch.float32 else grad.float()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    lower, upper = left[:, :rank], right[:rank]
    if grad.shape[0] >= grad.shape[1]:
        lower = lower @ torch.diag(values[:rank])  # which the library works out too, and has no use for
        return upper.to(grad.dtype)
    upper = torch.diag(values[:rank]) @ upper
    return lower.to(grad.dtype)


def _projected(grad: Tensor, found: Tensor) -> Tensor:
    return grad @ found.t() if grad.shape[0] >= grad.shape[1] else found.t() @ grad


def _back(low: Tensor, found: Tensor, scale: float) -> Tensor:
    return (low @ found if low.shape[0] >= low.shape[1] else found @ low) * scale


def galore_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe whose `optim` is one of `NAMES`; the layerwise one steps within backward, and each
    gradient goes as soon as it is used. Raises QzoError without `optim_target_modules`, or if they match no layer.
    """
    arguments = recipe.arguments
    targets = arguments.get("optim_target_modules")
    if not targets:
        raise QzoError(f"optim={arguments['optim']} needs optim_target_modules; give it, for example all-linear")
    low = _targets(model, targets)
    if not low:
        raise QzoError(f"optim_target_modules={targets!r} matches no linear layer; give it, for example all-linear")
    options = _options(str(arguments.get("optim_args") or ""))
    trained = [(name, item) for name, item in model.named_parameters() if item.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [item for name, item in trained if name not in low]},
        {"params": [item for name, item in trained if name in low], **options},
    ]
    if not arguments["optim"].endswith("layerwise"):
        return GaLore(groups)
    if arguments.get("gradient_accumulation_steps", 1) != 1:
        raise QzoError("layerwise GaLore does not accumulate gradients; set gradient_accumulation_steps to 1")
    for group in groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_StepAtOnce(GaLore([group | {"params": [parameter]}])))
    return torch.optim.SGD([item for _, item in trained], lr=0.0)  # nothing is left to do for it


def _options(stated: str) -> dict[str, Any]:
    """`DEFAULTS` with what optim_args says of them; the library reads no other name but that of the projection."""
    pairs = dict(pair.partition("=")[::2] for pair in stated.replace(" ", "").split(",") if pair)
    projection = pairs.get("proj_type", PROJECTION)
    if projection != PROJECTION:
        raise QzoError(f"optim_args=proj_type={projection} is not simulated; take GaLore's default, {PROJECTION}")
    try:
        return {name: type(value)(pairs.get(name, value)) for name, value in DEFAULTS.items()}
    except ValueError as error:
        raise QzoError(f"optim_args={stated} has no number where one belongs; try rank=128,scale=0.25") from error


class _StepAtOnce:
    """A hook that steps the optimizer of one parameter and drops its gradient."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, _: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def _targets(model: nn.Module, targets: Any) -> set[str]:
    """Names of the weights of the linear layers that are meant."""
    with quiet_libraries():
        from transformers.trainer_utils import check_target_module_exists
    everything = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (everything or check_target_module_exists(targets, name))
    }
