"""Predict a recipe: its loading and its steps simulated, and the events replayed as a GPU's allocator has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.cases import gpus
from bench.cases.gpus import Gpu
from bench.cases.models import ModelSource
from bench.cases.recipes.recipe import FLASH, Recipe, parse
from bench.ledger.ledger import Ledger
from bench.ledger.repeat import repeated_layers
from bench.ledger.repeat_training import NotAlike
from bench.methods.optimizers.made import optimizer_of
from bench.methods.quantized.int8 import int8_rules
from bench.methods.recipes import loaded, with_adapters
from bench.methods.steps import MicroBatch, step_of
from bench.simulator.allocator.replay import ROUND_BYTES, OutOfMemory, Replay, replay
from bench.simulator.cuda.attention import preference
from bench.simulator.cuda.kernels import CudaFunctions, rules
from bench.simulator.shared import collector_off, number_of_experts
from bench.validation.asked import AS_STATED, Asked
from bench.validation.measurement import source_of
from bench.validation.predict import see_loading
from bench.validation.published.readers import predictor_of, read
from bench.validation.published.row import Published
from bench.worlds.sim import SimWorld
from qzo.quiet import quiet_libraries

STEPS = 3
SEED = 42  # of the Trainer, by which rows are shuffled
Layers = Callable[[Ledger, nn.Module], AbstractContextManager]
MASKS = ("input_ids", "attention_mask", "labels")
PACKED = ("input_ids", "position_ids", "labels")
KERNEL_OF = {"eager": "eager", FLASH: "flash"}


def predict_row(row: Mapping[str, Any], asked: Asked = AS_STATED) -> dict[str, int]:
    """The figures of a measurement of a recipe. Raises QzoError for an unknown field, model or GPU."""
    source = source_of(row["model_id"], row.get("architecture") or {})
    return figures(predict(asked.changed(parse(row["recipe"])), source, gpus.find(row["gpu"])))


def predict_published(row: Mapping[str, Any], asked: Asked = AS_STATED) -> dict[str, int]:
    """The same of a row that others published. Raises QzoError for what cannot be said."""
    predictor = predictor_of(row)
    if predictor is not None:
        return predictor(row)
    said = read(row)
    return figures(predict_said(replace(said, recipe=asked.changed(said.recipe)), gpus.find(row["gpu"])))


def figures(predicted: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by the names of `bench.validation.measurement.METRICS`."""
    return {"allocated": max(predicted["steps"]), "reserved": predicted["reserved"], "process": predicted["process"]}


def described(row: Mapping[str, Any]) -> dict[str, Any]:
    """What tables tell of a recipe, by the names that they know from other measurements."""
    recipe = parse(row["recipe"])
    shown = {"method": recipe.name, "attention": recipe.attention, "batch_size": recipe.batch_size}
    return {"model_id": row["model_id"], "gpu": row["gpu"], **shown, "seq_len": max(recipe.lengths)}


def predict(recipe: Recipe, source: ModelSource, gpu: Gpu) -> dict[str, Any]:
    """Bytes: `loading` (peak), `steps` (peak of each), `reserved` and `process` (of all)."""
    return predict_said(Published(recipe, source), gpu)


@collector_off()
def predict_said(said: Published, gpu: Gpu) -> dict[str, Any]:
    """The same of a recipe with the changes that its framework makes to the model."""
    if said.alike and not said.recipe.activation_offloading:
        with suppress(NotAlike):
            return _predict(said, gpu, repeated_layers)
    return _predict(said, gpu, lambda ledger, model: nullcontext())


def _predict(said: Published, gpu: Gpu, layers: Layers) -> dict[str, Any]:
    recipe, source = said.recipe, said.source
    attention = KERNEL_OF.get(recipe.attention) or preference(gpu.compute_capability)[0]
    functions = partial(CudaFunctions, attention, gpu.compute_capability)
    world = SimWorld(source, attention, functions)
    if said.build is not None:
        world.model = said.build  # type: ignore[assignment, method-assign]
    table = rules(gpu, number_of_experts(source.config), padded=recipe.padded)
    if (recipe.quantization or {}).get("load_in_8bit"):
        table |= int8_rules()
    ledger = world.ledger = Ledger("meta", ROUND_BYTES, table)
    model: Any = loaded(recipe, world)
    for change in said.loaded:
        change(model)
    see_loading(ledger, model, read_ahead=0)
    with ledger:
        adapted = with_adapters(recipe, model, world)
        for change in said.changes:
            change(adapted)
    step = step_of(recipe, adapted, optimizer_of(recipe, adapted), world)
    with ledger, functions(), layers(ledger, adapted):
        for number, batches in enumerate(steps_of(recipe), 1):
            ledger.enter(f"step {number}")
            step(batches)
    replayed = replay_on(ledger, gpu)
    peaks = [replayed.phase_peaks[f"step {number}"] for number in range(1, STEPS + 1)]
    seen = replayed.phase_reserved[f"step {STEPS}"] if said.sampled else replayed.peak_reserved
    process = seen + gpu.context_bytes(True)
    return {
        "loading": replayed.phase_peaks["load"], "steps": peaks, "reserved": replayed.peak_reserved, "process": process,
    }  # fmt: skip


def replay_on(ledger: Ledger, gpu: Gpu) -> Replay:
    """The events on a card of that size: when it is full, the allocator gives back what is free. What needs more than
    the card has is replayed as if it had enough.
    """
    try:
        return replay(ledger, memory_bytes=gpu.memory_bytes - gpu.context_bytes())
    except OutOfMemory:
        return replay(ledger)


def steps_of(recipe: Recipe) -> Iterator[list[MicroBatch]]:
    """The batches of each step on the device, with the one after them, which the loader has moved there already."""
    shapes = list(shapes_of(recipe))
    each = recipe.arguments.get("gradient_accumulation_steps", 1)
    waiting: list[MicroBatch] = []
    for start in range(0, len(shapes), each):
        while len(waiting) < each + 1 and len(waiting) + start < len(shapes):
            waiting.append(_batch(shapes[start + len(waiting)], PACKED if recipe.packing else MASKS))
        taken, waiting = waiting[:each], waiting[each:]
        yield taken


def shapes_of(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """[rows, longest] of each batch in the order of `row_order`; packed rows are full and make one row together."""
    count = STEPS * recipe.batch_size * recipe.arguments.get("gradient_accumulation_steps", 1)
    if recipe.packing:
        longest = max(recipe.lengths)
        yield from [(1, recipe.batch_size * longest)] * (count // recipe.batch_size)
        return
    lengths = [recipe.lengths[index % len(recipe.lengths)] for index in range(max(count, len(recipe.lengths)))]
    order = row_order(recipe, lengths)[:count]
    for start in range(0, count, recipe.batch_size):
        rows = order[start : start + recipe.batch_size]
        yield len(rows), max(lengths[row] for row in rows)


def row_order(recipe: Recipe, lengths: Sequence[int]) -> list[int]:
    """Rows as they are drawn: by the Trainer at random, or in groups of like length, the longest batch first; by a loop
    of one's own in their order. Of more rows than are simulated the longest come first, since a run meets them all.
    """
    rows = list(range(len(lengths)))
    generator = torch.Generator().manual_seed(SEED)
    each = recipe.batch_size * recipe.arguments.get("gradient_accumulation_steps", 1)
    sampling = recipe.arguments.get("train_sampling_strategy", "random")
    if recipe.loop == "trainer" and sampling == "group_by_length":
        with quiet_libraries():
            from transformers.trainer_pt_utils import get_length_grouped_indices
        rows = [int(row) for row in get_length_grouped_indices(list(lengths), each, generator=generator)]
    elif recipe.loop == "trainer" and sampling == "random":
        rows = torch.randperm(len(lengths), generator=generator).tolist()
    if len(lengths) > STEPS * each:
        rows.sort(key=lambda row: -lengths[row])
    return rows


def _batch(shape: tuple[int, int], names: Sequence[str]) -> MicroBatch:
    return {name: torch.empty(shape, dtype=torch.long, device="meta") for name in names}
