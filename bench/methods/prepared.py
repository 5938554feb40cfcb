"""What a method hands to a world: everything that is needed to run and watch its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from bench.cases.text import Batch

Enter = Callable[[str], None]  # tells the ledger which phase begins
Step = Callable[[Batch, Enter], float]


@dataclass
class Prepared:
    """A model that is ready to train.

    Attributes:
        step: runs one optimizer step on a batch, calling `enter(phase)` as it goes, and returns the loss.
        dtype: of the forward's arithmetic. optimizer_name: as shown in tables.
        quantization: {format, bits, group_size}, or None. notes: what a reader of the record must know.
        recipe: what the step was made of, its batch and lengths included; None for a method that is no recipe.
        replaces_weights: the step puts new tensors in the place of weights or scales.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    dtype: str
    optimizer_name: str
    quantization: dict | None = None
    notes: list[str] = field(default_factory=list)
    replaces_weights: bool = False
    recipe: Recipe | None = None

    def gradients(self) -> Iterator[Tensor]:
        """Gradients that exist now, of all that is trained: parameters, or scales, which are buffers."""
        trained = (tensor for group in self.optimizer.param_groups for tensor in group["params"])
        return (tensor.grad for tensor in trained if tensor.grad is not None)

    def optimizer_tensors(self) -> Iterator[Tensor]:
        """Tensors that the optimizer keeps from step to step (moments, counters, master copies)."""
        for state in self.optimizer.state.values():
            yield from (item for item in state.values() if isinstance(item, Tensor))


def first_order_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Step:
    """Forward with the model's own loss, backward, optimizer step; gradients are dropped after it."""

    def step(batch: Batch, enter: Enter) -> float:
        enter("forward")
        with autocast():
            loss = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss
        enter("backward")
        loss.backward()
        enter("step")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
