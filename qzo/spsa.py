"""What QZO and MeZO share: two evaluations of the loss along a random direction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.noise import full_noise, noise_chunks

Closure = Callable[[], Tensor | float]
Parameters = dict[str, Tensor] | Iterable[Any]
Group = dict[str, Any]
TRAINABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LastStep:
    """What the last step measured: both losses, d = (L+ - L-) / (2 eps) before clipping, and what became of it.

    `step` counts from 0 and, with `seed`, tells z. Where groups differ in `eps`, d is that of the first group;
    `clipped` tells of any. `skipped`: a loss was not finite, the weights are what they were.
    """

    loss_plus: float
    loss_minus: float
    directional_derivative: float
    clipped: bool
    seed: int
    step: int
    skipped: bool


class SpsaOptimizer(torch.optim.Optimizer, ABC):
    """Base of QZO and MeZO: SPSA (Eq. 5), clipping (Eq. 6), the step counter, and its saving.

    A child moves the tensors: `_perturb`, `_restore`, `_update`.
    """

    def __init__(self, params: Parameters, seed: int, **defaults: Any) -> None:
        self.seed: int = seed
        self.steps: int = 0
        self.last: LastStep | None = None
        if not isinstance(seed, int):
            raise QzoError(f"seed={seed!r} is not an integer")
        if isinstance(params, Tensor | set):
            raise QzoError(f"a {type(params).__name__} cannot be trained; pass name -> tensor, e.g. qzo.scales(model)")
        items = list(params.items() if isinstance(params, dict) else params)
        if not items:
            raise QzoError("nothing to train; pass name -> tensor, tensors, (name, tensor) pairs or parameter groups")
        super().__init__(items, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add tensors with options of their own (`lr`, `eps`, `clip_threshold`). Raises QzoError."""
        if "params" not in param_group:
            raise QzoError(f'a parameter group needs "params"; this one has {sorted(param_group)}')
        group = {**param_group, "params": _unique(param_group["params"])}
        _check_options({**self.defaults, **group})
        for item in group["params"]:
            _check_tensor(item)
        try:
            super().add_param_group(group)
        except (TypeError, ValueError) as error:
            raise QzoError(str(error)) from error

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Evaluate the loss at θ + eps z and θ - eps z, then update θ in place; returns the mean of both losses.

        Args:
            closure: returns the loss, a scalar, of the model as it stands; called twice, without gradients. It should
                be deterministic: the same batch, no dropout.

        Each loss is read once (`float`). If it is not finite, or the closure raises, θ is put back and the update is
        left out; an exception travels on and the step does not count. See the class for what "put back" means.
        Extra memory: chunks of z, see `qzo.noise`. Raises QzoError without a closure.
        """
        if closure is None:
            raise QzoError("step() needs a closure; call optimizer.step(lambda: model(**batch).loss)")
        losses: list[float] = []
        try:
            for sign in (1, -1):
                self._perturb(sign)
                losses.append(_read(closure()))
        except BaseException:
            self._restore()
            raise
        self._finish(*losses)
        return (losses[0] + losses[1]) / 2

    def _finish(self, loss_plus: float, loss_minus: float) -> None:
        raw = [(loss_plus - loss_minus) / (2 * group["eps"]) for group in self.param_groups]
        bounds = [group["clip_threshold"] or math.inf for group in self.param_groups]
        clipped = [min(max(d, -bound), bound) for d, bound in zip(raw, bounds, strict=True)]
        skipped = not (math.isfinite(loss_plus) and math.isfinite(loss_minus))
        if skipped:
            self._restore()
        else:
            self._update(clipped)
        changed = not skipped and clipped != raw
        self.last = LastStep(loss_plus, loss_minus, raw[0], changed, self.seed, self.steps, skipped)
        self.steps += 1

    def direction(self) -> dict[str, Tensor]:
        """Name -> z of the last step, fp32, drawn again; names are "0", "1", ... where the tensors were given without.

        Needs four bytes for each trained number. Raises QzoError before the first step.
        """
        if self.steps == 0:
            raise QzoError("no step was taken yet; call step(closure) first")
        return {
            name: full_noise(tensor.shape, self.seed, self.steps - 1, index, tensor.device)
            for index, name, _, tensor in self._tensors()
        }

    @abstractmethod
    def _perturb(self, sign: int) -> None:
        """Move to θ + sign * eps * z."""

    @abstractmethod
    def _restore(self) -> None:
        """Move back to θ, to the bit where the child promises it."""

    @abstractmethod
    def _update(self, derivatives: list[float]) -> None:
        """Move to θ - lr * d' * z, with one d' for each group."""

    def _tensors(self) -> Iterator[tuple[int, str, int, Tensor]]:
        """(index of the tensor, its name, index of its group, tensor) in the order that z is drawn in."""
        index = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, tensor in enumerate(group["params"]):
                yield index, names[position] if names else str(index), number, tensor
                index += 1

    def _noise(self, index: int, tensor: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """z of the current step and the elements of the flat tensor that it belongs to."""
        for start, z in noise_chunks(tensor.numel(), self.seed, self.steps, index, tensor.device):
            yield z, slice(start, start + len(z))

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's state dict with `seed` and `steps` added, which make z: a resumed run goes on bit for bit."""
        return {**super().state_dict(), "seed": self.seed, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over options, seed, step counter and state. Raises QzoError for another optimizer's or model's dict."""
        if "seed" not in state_dict or "steps" not in state_dict:
            raise QzoError("the state dict has no seed and steps; load one that this optimizer's state_dict() made")
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise QzoError(str(error)) from error
        self.seed, self.steps, self.last = state_dict["seed"], state_dict["steps"], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seed": self.seed, "steps": self.steps, "last": self.last}


def flat(tensor: Tensor) -> Tensor:
    """The tensor as one live 1-D view, without its gradient history."""
    return tensor.detach().view(-1)


def _read(loss: Tensor | float) -> float:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise QzoError(f"the closure returned a tensor of shape {tuple(loss.shape)}; return a scalar loss")
    return float(loss)


def _unique(params: Any) -> list[Any]:
    """Tensors or (name, tensor) pairs, each tensor once: tied parameters must not move twice."""
    if isinstance(params, Tensor):
        params = [params]
    first: dict[int, Any] = {}
    for item in params.items() if isinstance(params, dict) else params:
        first.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(first.values())


def _check_options(group: Group) -> None:
    lr, eps, clip = group["lr"], group["eps"], group["clip_threshold"]
    if not lr >= 0:
        raise QzoError(f"lr={lr} is negative; choose lr >= 0")
    if not eps > 0:
        raise QzoError(f"eps={eps} is not positive; choose eps > 0, e.g. 1e-3")
    if clip is not None and not clip > 0:
        raise QzoError(f"clip_threshold={clip} is not positive; choose a positive one, or None for no clipping")


def _check_tensor(item: Any) -> None:
    name, tensor = item if isinstance(item, tuple) else ("a tensor", item)
    if not isinstance(tensor, Tensor):
        raise QzoError(f"{name} is a {type(tensor).__name__}, not a tensor; pass e.g. qzo.scales(model)")
    if tensor.dtype not in TRAINABLE:
        raise QzoError(f"{name} has dtype {tensor.dtype}; only float32, float16 and bfloat16 tensors can be trained")
    if tensor.is_inference():
        raise QzoError(f"{name} was made under torch.inference_mode and cannot change; use torch.no_grad instead")
    try:
        tensor.detach().view(-1)
    except RuntimeError as error:
        strides = tuple(tensor.stride())
        raise QzoError(f"{name} has strides {strides} and no flat view; make it contiguous() first") from error
