"""What QZO and MeZO share: evaluations of the loss along random directions, and what a step makes of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.optim.estimator import Estimator, Losses, all_finite
from qzo.optim.guards.groups import Group, check_options, check_tensor, unique
from qzo.optim.guards.reach import Reach, has_data
from qzo.optim.guards.still import count_still
from qzo.optim.losses import held, read
from qzo.optim.noise import full_noise, mixed_chunks, noise_chunks
from qzo.optim.randomness import same_masks
from qzo.optim.ranks import Ranks, fingerprint
from qzo.optim.rules import update_options

Closure = Callable[[], Tensor | float]
Parameters = dict[str, Tensor] | Iterable[Any]
Held = list[Tensor | float | None]  # losses of the closures, not yet read
Applied = tuple[tuple[float, ...], ...]  # d' of each group, of each direction
COUNTERS = ("steps", "skipped_steps", "skipped_in_a_row")


@dataclass(frozen=True)
class LastStep:
    """What the last step measured: both losses, d = (L+ - L-) / (2 eps) before clipping, and what became of it.

    `step` counts from 0 and, with `seed`, tells z. Where groups differ in `eps`, d is that of the first group;
    `clipped` tells of any. `skipped`: a loss was not finite, the weights are what they were.

    With several directions, losses and `directional_derivative` are those of the first one, and `derivatives` holds d
    of each. One-sided, `loss_minus` is the loss at θ. `applied`: d' of each group and direction, after clipping and
    normalization; empty for a skipped step. `options`: lr and what else of each group made the update of it and z.
    """

    loss_plus: float
    loss_minus: float
    directional_derivative: float
    clipped: bool
    seed: int
    step: int
    skipped: bool
    derivatives: tuple[float, ...] = ()
    applied: Applied = ()
    options: tuple[Group, ...] = ()


class SpsaOptimizer(torch.optim.Optimizer, ABC):
    """Base of QZO and MeZO: SPSA (Eq. 5), clipping (Eq. 6), the step counter, and its saving.

    A child moves the tensors: `_perturb`, `_restore`, `_update`. How the loss is measured is `estimator`'s business.

    `skipped_steps` counts the steps left out because a loss was not finite, or the update would not have been;
    `max_skipped` of them in a row raise QzoError in place of the last, None never does.
    """

    still_steps = 0  # in a row, whose losses were all the same to the bit
    ranks: Ranks | None = None
    _compared = False  # with the other ranks
    lr_told = False  # whether it warned of an lr that is too large
    least_noise = 0  # elements of z that exist at a time, where a tensor has as many, see qzo.optim.noise

    def __init__(
        self,
        params: Parameters,
        seed: int,
        estimator: Estimator,
        max_skipped: int | None,
        ranks: Ranks | None = None,
        **defaults: Any,
    ) -> None:
        self.seed: int = seed
        self.ranks = ranks
        self.estimator = estimator
        self.max_skipped = max_skipped
        self.steps = self.skipped_steps = self.skipped_in_a_row = 0
        self.last: LastStep | None = None
        self._reach: list[Reach] = []
        if not isinstance(seed, int):
            raise QzoError(f"seed={seed!r} is not an integer; give a whole number")
        if max_skipped is not None and not max_skipped >= 1:
            raise QzoError(f"max_skipped={max_skipped} is not positive; choose e.g. 10, or None to go on for ever")
        if isinstance(params, Tensor | set):
            raise QzoError(f"a {type(params).__name__} cannot be trained; pass name -> tensor, e.g. qzo.scales(model)")
        items = list(params.items() if isinstance(params, dict) else params)
        if not items:
            raise QzoError("nothing to train; pass name -> tensor, tensors, (name, tensor) pairs or parameter groups")
        super().__init__(items, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add tensors with options of their own (`lr`, `eps`, `clip_threshold`). Raises QzoError."""
        if "params" not in param_group:
            raise QzoError(
                f'a parameter group needs "params"; this one has {sorted(param_group)}: put its tensors there'
            )
        group = {**param_group, "params": unique(param_group["params"])}
        check_options({**self.defaults, **group})
        for item in group["params"]:
            check_tensor(item)
        try:
            super().add_param_group(group)
        except (TypeError, ValueError) as error:
            raise QzoError(f"{error}; give each tensor once, by its name") from error

    @torch.no_grad()
    def step(self, closure: Closure | Iterable[Closure] | None = None) -> float:  # type: ignore[override]
        """Evaluate the loss at θ + eps z and θ - eps z, then update θ in place; returns the mean of both losses.

        Args:
            closure: returns the loss, a scalar, of the model as it stands; called once an evaluation, twice in all by
                default, without gradients. It should be deterministic: the same batch at each call. Dropout draws the
                same masks at each, see `qzo.optim.randomness`. Several closures, one for each micro-batch, accumulate:
                their losses are summed at each evaluation, as `backward()` sums gradients, so let each return its share
                of the loss (of m equal micro-batches, its mean divided by m).

        Losses are read when the last was evaluated, all at once: a GPU is waited for once a step. If one is not finite,
        if a number would not be after the update, or if the closure raises, θ is put back and the update is left out;
        an exception travels on and the step does not count. See the class for what "put back" means.
        Extra memory: chunks of z, see `qzo.optim.noise`. Raises QzoError without a closure, and where `max_skipped`
        losses in a row were not finite.
        """
        if closure is None:
            raise QzoError("step() needs a closure; call optimizer.step(lambda: model(**batch).loss)")
        closures = [closure] if callable(closure) else list(closure)
        if not closures:
            raise QzoError("step() got no closure at all; pass one for each micro-batch")
        self._check_places()
        if self.ranks is not None:
            self._compare(self.ranks)
        places = self.estimator.evaluations()
        try:
            with same_masks(self.seed, self.steps) as restart:
                found = [self._loss_at(closures, restart, number, *place) for number, place in enumerate(places)]
        except BaseException as error:
            self._restore()
            if self.ranks is not None and isinstance(error, Exception):
                self.ranks.give_up(len(places) * len(closures))
            raise
        try:
            losses = self.estimator.paired(read(found) if self.ranks is None else self.ranks.read(found))
        except BaseException:
            self._restore()
            raise
        self._finish(losses)
        return self.estimator.value(losses)

    def _loss_at(
        self, closures: list[Closure], restart: Callable[[], None], number: int, direction: int, sign: int
    ) -> Held:
        """Losses at the evaluation of this number; None where another rank evaluates them."""
        mine = [self.ranks is None or self.ranks.has(number, place) for place in range(len(closures))]
        if not any(mine):
            return [None] * len(closures)
        if sign:
            self._perturb(direction, sign)
        else:
            self._restore()
        restart()
        return [held(closure()) if is_mine else None for closure, is_mine in zip(closures, mine, strict=True)]

    def _compare(self, ranks: Ranks) -> None:
        """Raise QzoError where another rank does not stand where this one does."""
        if self._compared and self.steps % ranks.check_every:
            return
        facts: dict[str, Any] = {
            "seed": self.seed,
            "step": self.steps,
            "tensors' bits": fingerprint(self.truth().values()),
        }
        if not self._compared:
            groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
            facts |= {"options": repr(groups), "estimator": self.estimator.options(), "share": ranks.share}
            facts |= {"number of ranks": ranks.size, "version of torch": str(torch.__version__)}
            if self.estimator.noise != "philox":
                facts["kind of device"] = next(self._tensors())[3].device.type
        ranks.compare(facts)
        self._compared = True

    def _finish(self, losses: list[Losses]) -> None:
        raw = [self.estimator.derivatives(losses, group["eps"]) for group in self.param_groups]
        bounds = [group["clip_threshold"] or math.inf for group in self.param_groups]
        applied = tuple(self.estimator.applied(d, losses, bound) for d, bound in zip(raw, bounds, strict=True))
        measured = all_finite(losses) and all(math.isfinite(d) for group in applied for d in group)
        skipped = not (measured and self._stays_finite(applied))
        if skipped:
            self._restore()
            self._check_skips(losses, "an update" if measured else "the loss")
        self.still_steps = count_still(self.still_steps, losses, self.steps)
        clipped = any(abs(d) > bound for group, bound in zip(raw, bounds, strict=True) for d in group)
        first, step = (*losses[0], raw[0][0], clipped and not skipped), self.steps
        self._take(() if skipped else applied)
        options = tuple(update_options(group) for group in self.param_groups)
        self.last = LastStep(*first, self.seed, step, skipped, raw[0], () if skipped else applied, options)

    def _stays_finite(self, applied: Applied) -> bool:
        """Whether the update by these d' leaves every number finite, see `qzo.optim.guards.reach`."""
        if not all(has_data(tensor) for _, _, _, tensor in self._tensors()):
            return True
        while len(self._reach) < len(self.param_groups):
            self._reach.append(Reach())
        for number, (group, reach) in enumerate(zip(self.param_groups, self._reach, strict=True)):
            if reach.largest is not None and self._reaches(number, group, reach, applied):
                continue
            reach.largest, reach.momentum = self._measured(number)
            if self._reaches(number, group, reach, applied):
                continue
            reach.forget()
            if not self._try(number, applied):
                return False
        return True

    def _reaches(self, number: int, group: Group, reach: Reach, applied: Applied) -> bool:
        updates = self.steps - self.skipped_steps + 1
        return reach.allows(group, applied[number], self._limit(number), updates)

    def _check_skips(self, losses: list[Losses], what: str) -> None:
        if self.max_skipped is not None and self.skipped_in_a_row + 1 >= self.max_skipped:
            remedy = "the weights are those of the last good step; lower lr or eps, or look at the data"
            if what == "the loss" and self.steps == self.skipped_steps:
                remedy = (
                    "no loss was finite yet and the weights are untouched; a float16 model may overflow (load it with "
                    "dtype=torch.bfloat16, --dtype bfloat16), or eps is too large, or the data hold no labels"
                )
            elif any(tensor.dtype == torch.float16 for _, _, _, tensor in self._tensors()):
                remedy += "; a float16 model may overflow (load it with dtype=torch.bfloat16, --dtype bfloat16)"
            raise QzoError(
                f"{what} was not finite for {self.max_skipped} steps in a row, up to step {self.steps} "
                f"({losses[0][0]} and {losses[0][1]}); {remedy}"
            )

    def _take(self, applied: Applied) -> None:
        """Update θ by d' of each group and direction, or skip where there is none; count the step."""
        if applied:
            self._update(applied)
            self.skipped_in_a_row = 0
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        self.steps += 1

    @torch.no_grad()
    def replay(self, applied: Applied) -> None:
        """Take a step whose d' are known, without any loss; bit for bit what `step` did.

        Args:
            applied: `last.applied` of that step, empty for a skipped one. Options and seed must be those of it.

        Raises QzoError where `applied` does not fit the groups and directions.
        """
        wanted = [self.estimator.directions] * len(self.param_groups)
        if applied and [len(group) for group in applied] != wanted:
            raise QzoError(
                f"d' of {[len(group) for group in applied]} directions a group; this optimizer has {wanted}: replay "
                "steps of one like it"
            )
        self._take(applied)
        for reach in self._reach:
            reach.forget()
        self.last = None

    def direction(self, number: int = 0) -> dict[str, Tensor]:
        """Name -> z of the last step, fp32, drawn again; names are "0", "1", ... where the tensors were given without.

        `number` tells which z where a step has several. Needs four bytes for each trained number. Raises QzoError
        before the first step, and for a direction that a step does not have.
        """
        if self.steps == 0:
            raise QzoError("no step was taken yet; call step(closure) first")
        if not 0 <= number < self.estimator.directions:
            raise QzoError(
                f"direction {number} of {self.estimator.directions}; they count from 0: choose a smaller one"
            )
        key, of = (self.seed, self.steps - 1), self.estimator
        return {
            name: full_noise(tensor.shape, *key, index, tensor.device, number, of.distribution, of.noise)
            for index, name, _, tensor in self._tensors()
        }

    def _check_places(self) -> None:
        """Raise QzoError where the tensors were moved away from what belongs to them."""

    @abstractmethod
    def _perturb(self, direction: int, sign: int) -> None:
        """Move to θ + sign * eps * z."""

    @abstractmethod
    def _restore(self) -> None:
        """Move back to θ, to the bit where the child promises it."""

    @abstractmethod
    def _update(self, applied: Applied) -> None:
        """Move to θ - lr * g with g = 1/n Σ_j d'_j z_j, or what the update rule makes of g."""

    @abstractmethod
    def _measured(self, number: int) -> tuple[float, float]:
        """The largest |θ| of a group, and the largest |b| of its momentum."""

    @abstractmethod
    def _limit(self, number: int) -> float:
        """What |θ| of a group must stay below."""

    @abstractmethod
    def _try(self, number: int, applied: Applied) -> bool:
        """Whether the update of a group, made on copies of one chunk after the other, is finite."""

    @abstractmethod
    def truth(self) -> dict[str, Tensor]:
        """Everything that a step changes and the next one starts from, live: what a snapshot must hold."""

    @abstractmethod
    def set_truth(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `truth` gave, bit for bit. Raises QzoError where it does not fit."""

    def _tensors(self) -> Iterator[tuple[int, str, int, Tensor]]:
        """(index of the tensor, its name, index of its group, tensor) in the order that z is drawn in."""
        index = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for position, tensor in enumerate(group["params"]):
                yield index, names[position] if names else str(index), number, tensor
                index += 1

    def _noise(self, index: int, tensor: Tensor, direction: int) -> Iterator[tuple[Tensor, slice]]:
        """z of the current step and the elements of the flat tensor that it belongs to."""
        key, of = (self.seed, self.steps, index), (self.estimator.distribution, self.least_noise, self.estimator.noise)
        for start, z in noise_chunks(tensor.numel(), *key, tensor.device, direction, *of):
            yield z, slice(start, start + len(z))

    def _mixed(self, index: int, tensor: Tensor, factors: list[float]) -> Iterator[tuple[Tensor, slice]]:
        """Σ_j factors[j] z_j of the current step and the elements that it belongs to."""
        key, of = (self.seed, self.steps, index), (self.estimator.distribution, self.least_noise, self.estimator.noise)
        for start, mixed in mixed_chunks(tensor.numel(), *key, tensor.device, factors, *of):
            yield mixed, slice(start, start + len(mixed))

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's state dict with what makes z and the counters added: a resumed run goes on bit for bit."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {**super().state_dict(), "seed": self.seed, **counters, "estimator": self.estimator.options()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over options, seed, counters and state. Raises QzoError for another optimizer's or model's dict."""
        if "seed" not in state_dict or "steps" not in state_dict:
            raise QzoError("the state dict has no seed and steps; load one that this optimizer's state_dict() made")
        estimator = Estimator(**state_dict.get("estimator", {}))
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise QzoError(f"{error}; load the state of an optimizer of the same groups") from error
        for group in self.param_groups:  # a dict of an older version lacks the newer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self.seed, self.estimator, self.last, self._reach = state_dict["seed"], estimator, None, []
        for name in COUNTERS:
            setattr(self, name, state_dict.get(name, 0))

    def __getstate__(self) -> dict[str, Any]:
        own = ("seed", "last", "still_steps", "estimator", "max_skipped", *COUNTERS)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "_reach": []}


def flat(tensor: Tensor) -> Tensor:
    """The tensor as one live 1-D view, without its gradient history."""
    return tensor.detach().view(-1)


def live_tensors(optimizer: SpsaOptimizer) -> dict[str, Tensor]:
    """Name -> live tensor, of all that an optimizer trains, and of the offsets that follow scales."""
    found = {}
    following: dict[Tensor, Tensor] = getattr(optimizer, "_offsets", {})
    for _, name, _, tensor in optimizer._tensors():
        found[name] = tensor.detach()
        if tensor in following:
            found[f"{name.removesuffix('scales')}offsets"] = following[tensor]
    return found
