"""The roles of optimizer and model as Trainer and TRL know them, played by those that take no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qzo.optim.spsa import SpsaOptimizer


@contextmanager
def said_to_train(model: Any) -> Iterator[None]:
    """Within, a model says that it is in training, by which TRL names its metrics, but not to itself in a forward."""
    model.training = True
    handles = [
        model.register_forward_pre_hook(lambda module, _: setattr(module, "training", False), prepend=True),
        model.register_forward_hook(lambda module, *_: setattr(module, "training", True)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.training = False


class TakenStep(torch.optim.Optimizer):
    """A zeroth-order optimizer as Trainer's loop needs it: its `step()` without a closure does nothing.

    By then `QZOTrainer.training_step` has taken the step. Groups and state are those of `optimizer`.
    """

    def __init__(self, optimizer: SpsaOptimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        """Nothing without a closure, a step with one."""
        return None if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Masters, counters and options."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; the live tensors are written too."""
        self.optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
