"""`torch_compile`: a range, since what a compiler keeps for backward and what it fuses away is its own choice.

The most is the eager step. The least keeps each layer's input alone, as checkpointing does, and no logits; a compiler
keeps results of products besides, which it does not compute twice.
"""

from __future__ import annotations

from dataclasses import replace

from bench.cases.recipes.recipe import Recipe

MOST = "torch_compile fuses operations and keeps less for backward; these are the bytes of the eager step, the most"


def least_of(recipe: Recipe) -> Recipe:
    """The eager recipe that takes less than the compiled one."""
    arguments = recipe.arguments | {"gradient_checkpointing": True, "torch_compile": False}
    return replace(recipe, arguments=arguments, loss="fused" if recipe.loss == "full" else recipe.loss)


def least_note(nbytes: int) -> str:
    """What a reader of the eager step's bytes is told of the least."""
    return f"torch_compile: at the least {nbytes / 2**30:.2f} GiB, with each layer's input alone kept and no logits"
