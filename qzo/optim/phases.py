"""Training in phases: one optimizer after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from qzo.errors import QzoError
from qzo.optim.spsa import Closure, LastStep, SpsaOptimizer


class Phase(NamedTuple):
    """An optimizer and the number of steps it is for."""

    optimizer: SpsaOptimizer
    steps: int


class Phases:
    """Optimizers that take turns: each its number of steps, in the order given.

    `step`, `last`, `direction`, `state_dict` and `load_state_dict` are those of an optimizer; learning-rate schedulers
    and journals belong to the single optimizers, `current` tells which one is at work. What phase a step belongs to
    follows from the optimizers' own step counters, so resuming them resumes the schedule. A tensor may be trained by
    one optimizer only: QZO would overwrite what another wrote.

    Raises QzoError for no phase, a phase without steps, a tensor in two phases, and a step after the last one.
    """

    def __init__(self, phases: Sequence[tuple[SpsaOptimizer, int]]) -> None:
        self.phases = [Phase(*phase) for phase in phases]
        if not self.phases or any(phase.steps < 1 for phase in self.phases):
            raise QzoError("every phase needs an optimizer and at least one step; leave empty ones out")
        groups = [group for phase in self.phases for group in phase.optimizer.param_groups]
        trained = [id(tensor) for group in groups for tensor in group["params"]]
        if len(set(trained)) < len(trained):
            raise QzoError("a tensor is trained in two phases; give it to one optimizer only")

    @property
    def current(self) -> SpsaOptimizer:
        """The optimizer that takes the next step. Raises QzoError when all are done."""
        for optimizer, steps in self.phases:
            if optimizer.steps < steps:
                return optimizer
        raise QzoError(
            f"all {self.steps} steps of the {len(self.phases)} phases are taken; make a longer schedule to go on"
        )

    @property
    def steps(self) -> int:
        """Steps taken in all phases."""
        return sum(phase.optimizer.steps for phase in self.phases)

    def step(self, closure: Closure | Iterable[Closure]) -> float:
        """A step of the current optimizer; see `SpsaOptimizer.step`."""
        return self.current.step(closure)

    @property
    def last(self) -> LastStep | None:
        """What the last step measured, None before the first."""
        return self._latest().last

    def direction(self, number: int = 0) -> dict[str, Tensor]:
        """Name -> z of the last step, of the tensors that it trained."""
        return self._latest().direction(number)

    def _latest(self) -> SpsaOptimizer:
        started = [optimizer for optimizer, _ in self.phases if optimizer.steps]
        return started[-1] if started else self.phases[0].optimizer

    def state_dict(self) -> dict[str, Any]:
        """State dicts of all optimizers."""
        return {"phases": [phase.optimizer.state_dict() for phase in self.phases]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises QzoError where it does not fit."""
        saved = state_dict.get("phases", [])
        if len(saved) != len(self.phases):
            raise QzoError(
                f"the state dict holds {len(saved)} phases, the schedule {len(self.phases)}; make the schedule that "
                "it was saved from"
            )
        for phase, state in zip(self.phases, saved, strict=True):
            phase.optimizer.load_state_dict(state)
