"""Rows predicted otherwise than they state it: `--set`, `--peft-config` and `--recipe` of `bench validate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.cases.recipes.recipe import Recipe, differences, parse
from bench.cases.recipes.settings import Settings, apply, concerning
from bench.cases.recipes.table import RECIPES
from bench.validation import recorded
from bench.validation.published.readers import is_published, predictor_of, read
from qzo.errors import QzoError

Row = Mapping[str, Any]
TAKEN = ("method", "recipe", "source", "framework")  # a row with one of them says itself how it was run


@dataclass(frozen=True)
class Asked:
    """What the options say.

    Attributes:
        settings: of each row whose recipe they concern.
        peft: class and options of the adapters of each row that has some; None leaves them as they are.
        recipe: of rows that state a model, a GPU and what was measured, and nothing of the step.
    """

    settings: Settings = field(default_factory=dict)
    peft: tuple[str, dict[str, Any]] | None = None
    recipe: Recipe | None = None

    def completed(self, row: Row) -> dict[str, Any]:
        """The row, with the recipe where it states none; its own batch size and length win over the recipe's."""
        if self.recipe is None or recorded.is_record(row) or any(key in row for key in TAKEN):
            return dict(row)
        recipe = replace(self.recipe, batch_size=row.get("batch_size", self.recipe.batch_size))
        if "seq_len" in row:
            recipe = replace(recipe, lengths=(row["seq_len"],))
        return dict(row) | {"recipe": recipe.stated()}

    def changed(self, recipe: Recipe) -> Recipe:
        """The recipe of a row as it is to be predicted."""
        if self.peft is not None and recipe.peft is not None:
            recipe = replace(recipe, peft_class=self.peft[0], peft=self.peft[1])
        own = concerning(self.settings, recipe)
        return apply(own, {recipe.name: recipe})[recipe.name] if own else recipe

    def told(self, row: Row) -> str | None:
        """What is otherwise in a row, as `--set` takes it; None where nothing is."""
        stated = recipe_of(row) if self.settings or self.peft else None
        return (stated and differences(self.changed(stated), stated)) or None

    def check(self, rows: Iterable[Row]) -> None:
        """Raise QzoError, before the work, for what concerns no row, and for a value that its key cannot have."""
        if not self.settings and self.peft is None:
            return
        seen: dict[str, Recipe] = {}
        left, adapted = set(self.settings), False
        for row in rows:
            recipe = recipe_of(row)
            if recipe is None:
                continue
            seen[recipe.name] = recipe
            self.changed(recipe)
            adapted |= recipe.peft is not None
            left -= concerning(self.settings, recipe).keys()
        if not seen:
            raise QzoError("no row of the file is a recipe, which --set and --peft-config change; leave them out")
        if self.peft is not None and not adapted:
            raise QzoError("--peft-config concerns no row of the file: none has adapters; leave it out")
        apply({key: self.settings[key] for key in left}, seen)


AS_STATED = Asked()


def recipe_of(row: Row) -> Recipe | None:
    """The recipe of a row; None for a zeroth-order step, a row of the T4's archive, and what cannot be said."""
    try:
        if recorded.is_record(row):
            return recorded.simulated_case(dict(row)).recipe or RECIPES.get(row["case"]["method"])
        if "recipe" in row:
            return parse(row["recipe"])
        return read(row).recipe if is_published(row) and predictor_of(row) is None else None
    except QzoError:
        return None
