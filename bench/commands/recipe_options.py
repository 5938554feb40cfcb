"""`--set`, `--peft-config` and `--recipe`: how the first-order methods of a run train."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from bench.cases.case import BenchCase
from bench.cases.recipes.files import ReadRecipe, read_recipe
from bench.cases.recipes.peft_config import read_peft_config
from bench.cases.recipes.recipe import FLASH, Recipe, differences
from bench.cases.recipes.settings import apply, parse_settings
from bench.cases.recipes.table import LORA_FA, RECIPES
from bench.worlds import plan
from qzo.errors import QzoError

ATTENTION_OF = {FLASH: "flash", "eager": "eager"}  # of a recipe -> of a case


@dataclass(frozen=True)
class Chosen:
    """What the options say: the methods, the recipes of those that are not as in the table, and what a file states."""

    methods: tuple[str, ...]
    recipes: dict[str, Recipe]
    file: ReadRecipe | None = None

    def model(self, stated: str | None) -> str:
        """The model, from the command line or the file."""
        found = stated or (self.file.model if self.file else None)
        if found is None:
            raise QzoError("no model; give a name of `bench list models`, a folder, a .gguf file or a hub id")
        return found

    def batch_size(self, stated: int | None) -> int:
        """Rows of a batch."""
        return stated if stated is not None else self.file.recipe.batch_size if self.file else 1

    def seq_len(self, stated: int | None, default: int) -> int:
        """Tokens of the longest row. Raises QzoError for a length beside rows that are stated."""
        many = [max(recipe.lengths) for recipe in self.recipes.values() if len(set(recipe.lengths)) > 1]
        if many and stated not in (None, max(many)):
            raise QzoError(f"--seq-len {stated} is not the longest of the lengths, {max(many)}; leave one of them out")
        usual = max(self.file.recipe.lengths) if self.file else default
        return max(many) if many else usual if stated is None else stated

    def attention(self, stated: str | None) -> str | None:
        """The attention that is asked for."""
        return stated or (ATTENTION_OF.get(self.file.recipe.attention) if self.file else None)

    def notes(self) -> list[str]:
        """What a reader must know of the file."""
        return self.file.notes() if self.file else []

    def settings(self) -> dict[str, str]:
        """Method -> what it has otherwise than in the table, as `--set` takes it."""
        return {name: differences(recipe, RECIPES[name]) for name, recipe in self.recipes.items()}

    def cell(self, case: BenchCase) -> BenchCase:
        """The case with its recipe, whose attention is that of the case where that is stated: `flash` is FlashAttention
        then, which tells rows of a batch apart without a mask, and else a kernel of PyTorch's.
        """
        recipe = self.recipes.get(case.method)
        if recipe is None:
            return case
        if case.attention is not None:
            names = {short: name for name, short in ATTENTION_OF.items()}
            recipe = replace(recipe, attention=names.get(case.attention, "sdpa"))
        return replace(case, recipe=recipe, gradient_checkpointing=case.gradient_checkpointing or recipe.checkpointing)


def chosen(options: argparse.Namespace) -> Chosen:
    """The methods and recipes of the options. Raises QzoError for what concerns none of the methods."""
    file = read_recipe(options.recipe) if options.recipe else None
    own = method_of(file.recipe) if file else None
    methods = (own,) if own and options.methods is None else plan.parse_methods(options.methods)
    if own and own not in methods:
        raise QzoError(f"{options.recipe} is a recipe of {own}; add it to --methods")
    recipes = {name: RECIPES[name] for name in methods if name in RECIPES}
    if file and own:
        recipes[own] = file.recipe
    if options.peft_config:
        kind, given = read_peft_config(options.peft_config)
        adapted = [name for name, recipe in recipes.items() if recipe.peft is not None and name != LORA_FA.name]
        if not adapted:
            raise QzoError("--peft-config concerns none of the methods; add lora, qlora or qlora-lean to --methods")
        recipes |= {name: replace(recipes[name], peft=given, peft_class=kind) for name in adapted}
    recipes = apply(parse_settings(options.settings), recipes)
    changed = {name: recipe for name, recipe in recipes.items() if recipe != RECIPES[name]}
    return Chosen(methods, changed, file)


def method_of(recipe: Recipe) -> str:
    """The row of the table that a recipe is a kind of."""
    if recipe.quantization is not None:
        return "qlora"
    if recipe.peft is not None:
        return "lora"
    return "ft-amp" if recipe.autocast and recipe.dtype == "float32" else "ft-bf16"
