"""QZO: zeroth-order training of quantization scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.kernels.philox import Stream
from qzo.optim import offsets, rules
from qzo.optim.estimator import Estimator, usual_of
from qzo.optim.guards.eps import check_eps, typical
from qzo.optim.guards.groups import Group, check_sign, has_negative
from qzo.optim.guards.idle import Idle
from qzo.optim.guards.reach import largest_of
from qzo.optim.guards.stride import Stride
from qzo.optim.masters import table
from qzo.optim.masters.chunks import Scales
from qzo.optim.masters.saved import copied, saved_states
from qzo.optim.ranks import Ranks
from qzo.optim.spsa import Applied, Closure, Parameters, SpsaOptimizer


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
        scales: `qzo.scales(model)`, `qzo.trainable(model, ...)`, or tensors, (name, tensor) pairs, parameter groups. A
            tensor named twice is trained once. Tensors change in place. Offsets of formats that have them (GGUF Q4_1,
            Q5_1, torchao int4) follow their scales, see `qzo.optim.offsets`; a group with "offsets", name -> tensor,
            has those and no others: {} leaves all of them where they are.
        lr: η. Groups may have their own `lr`, `eps`, `clip_threshold`, and all options below down to `adam_eps`; any
            torch.optim.lr_scheduler works.
        eps: ε, step of the finite difference; larger than the scales themselves it is refused at the first step.
        clip_threshold: C, None turns clipping off.
        seed: with the step counter it makes z, see `qzo.optim.noise`.
        relative: perturb by eps Δ z and update by lr d' z Δ: both are relative amounts, and d is the change of the
            loss for a relative change of the scales, see `qzo.optim.rules`. Scales of 0 stay there.
        nonnegative: the max(., 0) of Algorithm 1. None leaves it out for groups that hold a negative number, as scales
            of GGUF Q4_0, norms and biases do. False for whatever else may become negative: adapters, which begin at 0.
        momentum, betas, adam_eps: momentum, or Adam, on the masters, see `qzo.optim.rules`; None, no Adam. 4 or 8 bytes
            a scale.
        directions, distribution, estimator, normalize: how d is measured, see `qzo.optim.estimator.Estimator`.
        noise: where z comes from. "generator": PyTorch's, "gaussian" by default or "rademacher", other numbers on a CPU
            than on CUDA. "philox": "binomial" by default or "rademacher", the same to the bit on every device, for a
            sixth of the time on a CPU; a journal then replays anywhere, see `qzo.kernels.philox`.
        max_skipped: losses in a row that are not finite before training stops with an error; None, never.
        ranks: `qzo.Ranks()`, where several processes take each step together, see `qzo.optim.ranks`.

    `last` tells what the last step saw, `direction()` its z. Extra memory in a step: one chunk of z, a second one with
    several directions.

    Raises:
        QzoError: an option out of range, nothing to train, a tensor that is not floating point or has no flat view.
    """

    _strides: Sequence[Stride] = ()  # of each group, from the first step on; not of a run that is taken up
    _idle: Idle | None = None
    foresees = True  # whether it tells of an lr that is too small; a loop that knows its steps tells better
    least_noise = 2**14  # 64 KiB: the scales of a small layer at once, where starting an operator takes longest

    def __init__(
        self,
        scales: Parameters,
        lr: float = 1e-7,
        eps: float = 1e-3,
        clip_threshold: float | None = 100.0,
        seed: int = 0,
        *,
        relative: bool = False,
        nonnegative: bool | None = None,
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        adam_eps: float = 1e-8,
        directions: int = 1,
        distribution: str | None = None,
        estimator: str = "two-sided",
        normalize: bool = False,
        noise: str = "generator",
        max_skipped: int | None = 10,
        ranks: Ranks | None = None,
    ) -> None:
        self._offsets: dict[Tensor, Tensor] = {}  # scale -> the live offset that follows it
        self._limits: dict[int, float] = {}  # of each group, see qzo.optim.guards.reach
        self._held = table.Tables()
        rule: dict[str, Any] = {"momentum": momentum} if betas is None else {"betas": betas, "momentum": momentum}
        super().__init__(
            scales,
            seed,
            Estimator(directions, distribution or usual_of(noise), estimator, normalize, noise),
            max_skipped,
            ranks,
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            relative=relative,
            nonnegative=nonnegative,
            adam_eps=adam_eps,
            **rule,
        )

    @torch.no_grad()
    def add_param_group(self, param_group: Group) -> None:
        """As the base class; makes the masters too. Raises QzoError."""
        group = {name: value for name, value in param_group.items() if name != "offsets"}
        rules.check_rule({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._take_over(self.param_groups[-1], param_group.get("offsets"))
        except BaseException:
            self.param_groups.pop()
            raise

    def _take_over(self, group: Group, following: dict[str, Tensor] | None) -> None:
        pairs = offsets.take_offsets(following, group)
        if group["nonnegative"] is None:
            group["nonnegative"] = not any(has_negative(tensor) for tensor in group["params"])
        for position, tensor in enumerate(group["params"]):
            if group["nonnegative"]:
                check_sign(group["param_names"][position] if "param_names" in group else "a tensor", tensor)
        for tensor in group["params"]:
            master = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
            self.state[tensor]["master"] = master.copy_(tensor.detach())
            if tensor in pairs:
                self.state[tensor].update(offsets.start(tensor, pairs[tensor]))
        self._offsets.update(pairs)
        self._limits.clear()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class; masters are taken over as fp32, bit for bit, and written to the live scales.

        PyTorch alone would cast them to the dtype of the scales.
        """
        owned = [self.state[tensor] for _, _, _, tensor in self._tensors()]
        saved = saved_states(state_dict, owned)
        super().load_state_dict({**state_dict, "state": {}})
        for (_, _, _, tensor), state, values in zip(self._tensors(), owned, saved, strict=True):
            self.state[tensor] = copied(state, values)
        self._restore()

    def truth(self) -> dict[str, Tensor]:
        """The optimizer's state of every tensor, as "index.key": masters, what offsets start from, rule buffers."""
        return {
            f"{index}.{key}": value
            for index, _, _, tensor in self._tensors()
            for key, value in self.state[tensor].items()
        }

    @torch.no_grad()
    def set_truth(self, tensors: dict[str, Tensor]) -> None:
        """As the base class; the live tensors are written too."""
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        owned = [self.state[tensor] for _, _, _, tensor in self._tensors()]
        saved = {"state": states, "param_groups": [{"params": list(range(len(owned)))}]}
        for (_, _, _, tensor), state, values in zip(self._tensors(), owned, saved_states(saved, owned), strict=True):
            self.state[tensor] = copied(state, values)
        self._restore()
        self._reach = []

    def _measured(self, number: int) -> tuple[float, float]:
        states = [self.state[tensor] for tensor in self.param_groups[number]["params"]]
        momenta = [largest_of(state["momentum"]) for state in states if "momentum" in state]
        return max(largest_of(state["master"]) for state in states), max(momenta, default=0.0)

    def _limit(self, number: int) -> float:
        tensors = self.param_groups[number]["params"]
        if number not in self._limits:
            limit = min(torch.finfo(tensor.dtype).max for tensor in tensors)
            pairs = [(self._offsets[tensor], self.state[tensor]) for tensor in tensors if tensor in self._offsets]
            limits = [torch.finfo(offset.dtype).max / max(offsets.steepest(state), 1e-30) for offset, state in pairs]
            self._limits[number] = min([limit, *limits])
        return self._limits[number]

    def _try(self, number: int, applied: Applied) -> bool:
        group = self.param_groups[number]
        factors = rules.factors(group, applied[number])
        return all(
            self._scales(tensor).stays_finite(self._mixed(index, tensor, factors), group)
            for index, _, of, tensor in self._tensors()
            if of == number
        )

    def step(self, closure: Closure | Iterable[Closure] | None = None) -> float:  # type: ignore[override]
        """As the base class. Raises QzoError before the first step for an eps that is larger than the scales too.

        Warns once of an lr that moves the scales too far while the loss rises, or with which no run learns anything,
        see `qzo.optim.guards`.
        """
        if self.steps == 0:
            self._strides = [self._begin(group) for group in self.param_groups]
            self._idle = Idle() if self.foresees else None
        loss = super().step(closure)
        last = self.last
        if self._strides and last is not None and not last.skipped:
            for group, stride, applied in zip(self.param_groups, self._strides, last.applied, strict=False):
                self.lr_told = stride.after(group, applied, loss, last.step) or self.lr_told
            if self._idle is not None:
                self.lr_told |= self._idle.after(self.param_groups, last.derivatives, last.applied, loss)
        return loss

    def _begin(self, group: Group) -> Stride:
        """Check the eps of a group of scales, and watch its lr."""
        names = group.get("param_names") or [f"tensor {number}" for number in range(len(group["params"]))]
        if not (group["nonnegative"] or all(name.endswith("scales") for name in names)):
            return Stride(0.0)
        named = list(zip(names, group["params"], strict=True))
        check_eps(named, group["eps"], group["relative"])
        return Stride(1.0 if group["relative"] else typical(named))

    def _check_places(self) -> None:
        for _, _, _, tensor in self._tensors():
            place = self.state[tensor]["master"].device
            if tensor.device != place:
                raise QzoError(
                    f"the tensors are on {tensor.device} now, their masters on {place}; make the optimizer anew after "
                    "model.to(device)"
                )

    def _tables(self) -> list[tuple[int, table.Table]]:
        """Number of a group and what moves its tensors at once; nothing where they move one after the other."""
        return self._held.of(self.param_groups, self.state, self._offsets, self.estimator.noise)

    def _stream(self, direction: int = 0) -> Stream:
        return Stream(self.seed, self.steps, 0, direction)

    def _perturb(self, direction: int, sign: int) -> None:
        for number, rows in (tables := self._tables()):
            group = self.param_groups[number]
            rows.place(sign * group["eps"], group["relative"], self._stream(direction), self.estimator.distribution)
        if not tables:
            self._perturb_in_chunks(direction, sign)

    def _perturb_in_chunks(self, direction: int, sign: int) -> None:
        for index, _, number, tensor in self._tensors():
            group = self.param_groups[number]
            drawn = self._noise(index, tensor, direction)
            self._scales(tensor).perturb(drawn, sign * group["eps"], group["relative"])

    def _restore(self) -> None:
        for _, rows in (tables := self._tables()):
            rows.place(0.0, False, self._stream(), None)
        if not tables:
            self._restore_in_chunks()

    def _restore_in_chunks(self) -> None:
        for _, _, _, tensor in self._tensors():
            self._scales(tensor).restore()

    def _update(self, applied: Applied) -> None:
        if not self._tables():
            return self._update_in_chunks(applied)
        for _, _, number, tensor in self._tensors():
            rules.prepare(self.param_groups[number], self.state[tensor], self.state[tensor]["master"])
        for number, rows in self._tables():
            group = self.param_groups[number]
            rows.update(rules.factors(group, applied[number]), group, self._stream(), self.estimator.distribution)

    def _update_in_chunks(self, applied: Applied) -> None:
        for index, _, number, tensor in self._tensors():
            group = self.param_groups[number]
            rules.prepare(group, self.state[tensor], self.state[tensor]["master"])
            self._scales(tensor).update(self._mixed(index, tensor, rules.factors(group, applied[number])), group)

    def _scales(self, tensor: Tensor) -> Scales:
        return Scales(tensor, self.state[tensor], self._offsets.get(tensor))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_offsets": self._offsets, "_limits": {}, "_held": table.Tables()}
