"""QZO: zeroth-order training of quantization scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.spsa import Group, Parameters, SpsaOptimizer, flat


class QZO(SpsaOptimizer):
    """Q-SPSA with directional-derivative clipping on the scales Δ of a quantized model (arXiv 2505.13430, Algorithm 1).

        d  = (L(Δ + eps z) - L(Δ - eps z)) / (2 eps),  z ~ N(0, I)       Eq. 5
        d' = clamp(d, -C, C)                                            Eq. 6
        Δ  = max(Δ - lr d' z, 0)

    Each scale has an fp32 master in the optimizer's state (key "master"), four bytes a scale, made at once. Masters
    are the truth: a perturbation is master ± eps z cast to the dtype of the live tensor, putting back copies the cast
    master, so nothing drifts and small updates are not lost in fp16. A scale that is written from outside after the
    optimizer is made is therefore overwritten by the next step.

    Args:
        scales: `qzo.scales(model)`, or tensors, (name, tensor) pairs, parameter groups. A tensor named twice is
            trained once. Tensors change in place.
        lr: η. Groups may have their own `lr`, `eps`, `clip_threshold`; any torch.optim.lr_scheduler works.
        eps: ε, step of the finite difference.
        clip_threshold: C, None turns clipping off.
        seed: with the step counter it makes z, see `qzo.noise`.

    `last` tells what the last step saw, `direction()` its z. Extra memory in a step: one chunk of z.

    Raises:
        QzoError: an option out of range, nothing to train, a tensor that is not floating point or has no flat view.
    """

    def __init__(
        self,
        scales: Parameters,
        lr: float = 1e-7,
        eps: float = 1e-3,
        clip_threshold: float | None = 100.0,
        seed: int = 0,
    ) -> None:
        super().__init__(scales, seed, lr=lr, eps=eps, clip_threshold=clip_threshold)

    def add_param_group(self, param_group: Group) -> None:
        """As the base class; makes the masters too."""
        super().add_param_group(param_group)
        for tensor in self.param_groups[-1]["params"]:
            master = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
            self.state[tensor]["master"] = master.copy_(tensor.detach())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class; masters are taken over as fp32, bit for bit, and written to the live scales.

        PyTorch alone would cast them to the dtype of the scales.
        """
        masters = {tensor: self.state[tensor]["master"] for _, _, _, tensor in self._tensors()}
        saved = _saved_masters(state_dict, list(masters.values()))
        super().load_state_dict({**state_dict, "state": {}})
        for (tensor, master), value in zip(masters.items(), saved, strict=True):
            self.state[tensor]["master"] = master.copy_(value)
        self._restore()

    def _perturb(self, sign: int) -> None:
        for index, _, group, tensor in self._tensors():
            live, master = flat(tensor), flat(self.state[tensor]["master"])
            distance = sign * self.param_groups[group]["eps"]
            for z, part in self._noise(index, tensor):
                live[part].copy_(z.mul_(distance).add_(master[part]))
            del z  # before the next tensor's is born

    def _restore(self) -> None:
        for _, _, _, tensor in self._tensors():
            tensor.detach().copy_(self.state[tensor]["master"])

    def _update(self, derivatives: list[float]) -> None:
        for index, _, group, tensor in self._tensors():
            live, master = flat(tensor), flat(self.state[tensor]["master"])
            distance = -self.param_groups[group]["lr"] * derivatives[group]
            for z, part in self._noise(index, tensor):
                live[part].copy_(master[part].add_(z.mul_(distance)).clamp_(min=0))
            del z


def _saved_masters(state_dict: dict[str, Any], masters: list[Tensor]) -> list[Tensor]:
    """Masters in a state dict, in the order of the tensors; QzoError where they do not fit this optimizer's."""
    try:
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        saved = [state_dict["state"][number]["master"] for number in numbers]
    except KeyError as error:
        raise QzoError("the state dict has no master scales; load one that QZO.state_dict() made") from error
    if len(saved) != len(masters):
        raise QzoError(f"the state dict holds {len(saved)} scale tensors, the optimizer {len(masters)}")
    for number, (value, master) in enumerate(zip(saved, masters, strict=True)):
        if value.shape != master.shape:
            found, wanted = tuple(value.shape), tuple(master.shape)
            raise QzoError(f"scale {number} has shape {found} in the state dict, {wanted} in the model")
    return saved
