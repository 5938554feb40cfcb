"""The batches of a cell's steps: how long their rows are, and the tensors of them with text or without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.cases import text
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource
from bench.cases.recipes.recipe import Recipe
from bench.cases.text import Batch

Rows = tuple[int, ...]  # tokens of each row of a batch
MOST_STEPS = 16  # that rows of many lengths are spread over


def steps_of(case: BenchCase, recipe: Recipe | None, least: int) -> list[list[Rows]]:
    """The batches of each step: one, or as many as a recipe accumulates gradients over.

    Rows of many lengths begin with the longest batch, as `group_by_length` has it, go on as the recipe states them, and
    end with the longest again, which then meets the optimizer's state; that may take more than `least` steps.
    """
    each = int(recipe.arguments.get("gradient_accumulation_steps", 1)) if recipe else 1
    size = case.batch_size
    if recipe is None or recipe.packing or len(set(recipe.lengths)) == 1:
        rows = (case.seq_len if recipe is None or len(set(recipe.lengths)) == 1 else max(recipe.lengths),) * size
        return [[rows] * each] * least
    stated = [recipe.lengths[index % len(recipe.lengths)] for index in range(max(len(recipe.lengths), size))]
    longest = tuple(sorted(stated, reverse=True)[:size])
    batches = [tuple(stated[start : start + size]) for start in range(0, len(stated) - size + 1, size)]
    count = max(least, min(-(-len(batches) // each) + 2, MOST_STEPS))
    drawn = [[batches[(step * each + part) % len(batches)] for part in range(each)] for step in range(count)]
    drawn[0] = drawn[-1] = [longest] * each
    return drawn


def without_data(steps: Sequence[Sequence[Rows]], recipe: Recipe | None, device: str) -> list[Batch]:
    """Batches of empty tensors, one a step; those of a recipe have a mask, as every collator makes one."""

    def empty(rows: Rows) -> Batch:
        packed = recipe is not None and recipe.packing
        tokens = torch.empty((1, sum(rows)) if packed else (len(rows), max(rows)), dtype=torch.long, device=device)
        mask = torch.empty_like(tokens) if recipe and recipe.collated and not packed else None
        return Batch(tokens, tokens.clone(), "none", mask, position_ids=torch.empty_like(tokens) if packed else None)

    return [_joined([empty(rows) for rows in step]) for step in steps]


def with_text(
    steps: Sequence[Sequence[Rows]], recipe: Recipe | None, case: BenchCase, source: ModelSource
) -> list[Batch]:
    """Batches of real text where there is some, in host memory, padded on the right."""

    def filled(rows: Rows, number: int) -> Batch:
        batch = text.batch(source, len(rows), max(rows), case.seed, number)
        if recipe is not None and recipe.packing:
            return text.packed(batch)
        return text.padded(batch, rows, masked=recipe.masked) if recipe and recipe.collated else batch

    numbers = iter(range(sum(len(step) for step in steps)))
    return [_joined([filled(rows, next(numbers)) for rows in step]) for step in steps]


def _joined(batches: list[Batch]) -> Batch:
    return replace(batches[0], further=tuple(batches[1:]))
