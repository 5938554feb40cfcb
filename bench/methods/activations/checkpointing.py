"""Activation checkpointing as transformers switches it on, reentrant or not, in a world whose modes it must restore."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from bench.methods.world import World
from qzo.errors import QzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpoint_options(world: World) -> dict[str, Any]:
    """Options of torch.utils.checkpoint: non-reentrant, each recomputation in the world's context."""
    return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), world.recomputing())}


def check_checkpointing(model: PreTrainedModel) -> None:
    """Raise QzoError unless transformers can recompute this architecture's layers."""
    if not model.supports_gradient_checkpointing:
        raise QzoError(
            f"{type(model).__name__} has no gradient checkpointing in transformers; leave it out, or choose a method "
            "that does without"
        )


def enable_checkpointing(model: PreTrainedModel, world: World, options: Mapping[str, Any]) -> None:
    """`gradient_checkpointing_enable(options)`.

    Raises QzoError for an option other than `use_reentrant`, and for a model that has no checkpointing.
    """
    check_checkpointing(model)
    unknown = sorted(set(options) - {"use_reentrant"})
    if unknown:
        raise QzoError(f"{unknown[0]} of gradient_checkpointing_kwargs is not simulated; leave it out")
    model.gradient_checkpointing_enable(checkpoint_options(world))
    if options.get("use_reentrant"):
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=partial(_reentrant, world))


def _reentrant(world: World, layer: Any, *inputs: Any) -> Any:
    """torch's reentrant checkpoint, which has no `context_fn`: the second call of `layer` is the recomputation."""
    calls = 0

    def run(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        with world.recomputing() if calls > 1 else nullcontext():
            return layer(*args)

    return checkpoint(run, *inputs, use_reentrant=True)
