"""What else people train with little memory, as PEFT and bitsandbytes run it: each a recipe of the Trainer."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases.case import BenchCase
from bench.cases.recipes.recipe import Recipe
from bench.cases.recipes.table import DORA, LORA_FA, PREFIX, QLORA_LEAN
from bench.methods.prepared import Prepared
from bench.methods.recipes import recipe_method
from bench.methods.world import World

LR = 1e-4


def qlora_lean(case: BenchCase, world: World) -> Prepared:
    """QLoRA as frugal as its libraries have it: layers recomputed, double quantization, paged 8-bit AdamW."""
    return recipe_method(case.recipe or QLORA_LEAN)(case, world)


def dora(case: BenchCase, world: World) -> Prepared:
    """The adapters of `lora` with a trained magnitude for each output (arXiv 2402.09353)."""
    return recipe_method(case.recipe or DORA)(case, world)


def lora_fa(case: BenchCase, world: World) -> Prepared:
    """The adapters of `lora` with A frozen: of inputs only their projections are kept (arXiv 2308.03303)."""
    return recipe_method(case.recipe or LORA_FA, lora_fa_optimizer)(case, world)


def prefix(case: BenchCase, world: World) -> Prepared:
    """20 trained keys and values before the text of every layer of a frozen model (arXiv 2101.00190)."""
    return recipe_method(case.recipe or PREFIX)(case, world)


def lora_fa_optimizer(recipe: Recipe, model: Any) -> torch.optim.Optimizer:
    """PEFT's own, which freezes A; of the model's parameters it is left with those of adapters, in pairs A, B."""
    from peft.optimizers import create_lorafa_optimizer

    assert recipe.peft is not None
    optimizer = create_lorafa_optimizer(model, recipe.peft["r"], recipe.peft["lora_alpha"], LR)
    group = optimizer.param_groups[0]
    adapters = [number for number, name in enumerate(group["names"]) if "lora_" in name]
    for key in ("params", "names", "scaling_factors"):
        group[key] = [group[key][number] for number in adapters]
    return optimizer
