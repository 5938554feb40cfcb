"""The steps of a recipe: by the Trainer of transformers, by a loop of one's own, and by the barest one.

The order of things in a step is that of transformers/trainer.py, `training_step`, and of accelerate, which puts the
forward of the model under autocast and turns its outputs into fp32 (`convert_outputs_to_fp32`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from bench.methods.activations.offloading import offloading_of
from bench.methods.prepared import Enter
from bench.methods.world import World

MicroBatch = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager]


def step_of(recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> RecipeStep:
    """The step that a recipe states, for its model and optimizer."""
    dtype = getattr(torch, recipe.autocast) if recipe.autocast else None
    autocast = partial(world.autocast, dtype) if dtype and world.autocasts(dtype) else None
    step = STEP_OF[recipe.loop](model, optimizer, autocast, recipe.arguments.get("max_grad_norm", 1.0))
    step.clear_every, step.clear = recipe.arguments.get("torch_empty_cache_steps", 0), world.empty_cache
    if recipe.activation_offloading:
        by_bitsandbytes = recipe.peft or recipe.quantization
        step.around = offloading_of(model, world.empty_cache if by_bitsandbytes else None)
    return step


class RecipeStep:
    """Optimizer steps of a prepared recipe, as the Trainer runs them.

    Args:
        model: with its adapters, in training mode.
        optimizer: over all that is trained.
        autocast: what the model's forward runs under.
        max_grad_norm: norm to which gradients are clipped; with 0 the Trainer takes the norm all the same.

    `around` is the context of each micro-batch's forward and backward. `clear` empties the allocator's cache between
    the two, in every step whose number `clear_every` divides (`torch_empty_cache_steps`).
    """

    around: AbstractContextManager = nullcontext()
    clear: Callable[[], None] = staticmethod(lambda: None)
    clear_every = 0
    number = 0

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: Autocast | None, max_grad_norm: float = 1.0
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.max_grad_norm = max_grad_norm or float("inf")
        self.counts = _takes_counts(model)

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        """One step: forward and backward of each batch, clipping, update, gradients dropped. The last batch's loss."""
        enter("forward")
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in micro_batches)
        for number, batch in enumerate(micro_batches):
            if number:
                enter("forward")
            with self.around:
                loss = self._loss(batch, items, len(micro_batches))
                self._clear()
                enter("backward")
                loss.backward()
            loss = loss.detach()
        enter("step")
        self._clip()
        self.optimizer.step()
        self.model.zero_grad()
        self.number += 1
        return loss

    def _clear(self) -> None:
        if self.clear_every and self.number % self.clear_every == 0:
            self.clear()

    def _loss(self, batch: MicroBatch, items: Any, accumulated: int) -> Tensor:
        """The outputs die with this call, as with `Trainer.compute_loss`."""
        counts = {"num_items_in_batch": items} if self.counts else {}
        with self.autocast() if self.autocast else nullcontext():
            output = self.model(**batch, **counts)
        if self.autocast:
            output = {name: item.float() for name, item in output.items() if isinstance(item, Tensor)}
        loss: Tensor = output["loss"]
        return loss if self.counts else loss / accumulated

    @torch.no_grad()
    def _clip(self) -> None:
        """torch.nn.utils.clip_grad_norm_; on tensors without data as it runs on a GPU."""
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not grads:  # each was used and dropped within backward
            return
        if not grads[0].is_meta:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            return
        norm = torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(grads, 2.0)]), 2.0)
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))


class PlainStep(RecipeStep):
    """The same by a loop of one's own, as PEFT's comparison of methods has it (method_comparison/MetaMathQA): its name
    `outputs` is bound anew only when the next forward returns, gradients are dropped before that forward, and the cache
    is emptied before them.
    """

    outputs: Any = None

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        enter("forward")
        self._clear()
        self.optimizer.zero_grad()
        for number, batch in enumerate(micro_batches):
            if number:
                enter("forward")
            with self.autocast() if self.autocast else nullcontext():
                self.outputs = self.model(**batch)
            enter("backward")
            self.outputs.loss.backward()
        enter("step")
        self._clip()
        self.optimizer.step()
        self.number += 1
        loss: Tensor = self.outputs.loss.detach()
        return loss


class BareStep(RecipeStep):
    """Forward, backward and update, and nothing else."""

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        for batch in micro_batches:
            enter("forward")
            with self.autocast() if self.autocast else nullcontext():
                loss = self.model(**batch).loss
            enter("backward")
            loss.backward()
        enter("step")
        self.optimizer.step()
        self.optimizer.zero_grad()
        detached: Tensor = loss.detach()
        return detached


STEP_OF = {"trainer": RecipeStep, "plain": PlainStep, "bare": BareStep}


def _takes_counts(model: nn.Module) -> bool:
    """Whether the model divides its loss by a number of labels it is told (`Trainer.model_accepts_loss_kwargs`)."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    return any(
        item.kind is inspect.Parameter.VAR_KEYWORD for item in inspect.signature(base.forward).parameters.values()
    )
