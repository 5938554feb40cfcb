"""The simulated world: the same step on tensors without data, and the events replayed as a GPU would have had them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource, build_empty, resolve
from bench.cases.pretrained import PreTrainedModel
from bench.ledger.ledger import Ledger
from bench.ledger.repeat import repeated_layers
from bench.ledger.repeat_training import NotAlike
from bench.methods import METHODS
from bench.methods.activations.compiled import least_note, least_of
from bench.methods.quantized.int8 import int8_rules
from bench.records.environment import environment
from bench.records.record import Record
from bench.simulator.allocator.replay import ROUND_BYTES, replay
from bench.simulator.cuda.attention import attention_of
from bench.simulator.cuda.autocast import MetaAutocast
from bench.simulator.cuda.kernels import CudaFunctions, rules
from bench.simulator.shared import collector_off, number_of_experts
from bench.worlds.batches import steps_of, without_data
from bench.worlds.watch import WATCHED_STEPS, describe, register_resident, run_steps


class SimWorld:
    """Models on the meta device.

    Args:
        functions: the mode in which functions choose the kernels of the simulated GPU; None as on any Ampere GPU.
    """

    def __init__(
        self, source: ModelSource, attention: str, functions: Callable[[], CudaFunctions] | None = None
    ) -> None:
        self.source = source
        self.implementation = "eager" if attention == "eager" else "sdpa"
        self.parameters = 0
        self.functions = functions or partial(CudaFunctions, attention)
        self.amp: torch.dtype | None = None
        self.ledger: Ledger | None = None  # of the steps, as soon as there is one

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        model = build_empty(self.source, dtype, self.implementation)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        return model

    def place(self, model: nn.Module) -> nn.Module:
        return model

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager:
        self.amp = dtype
        return MetaAutocast(dtype=dtype)

    def autocasts(self, dtype: torch.dtype) -> bool:
        return True

    def empty_cache(self) -> None:
        if self.ledger is not None:
            self.ledger.empty_cache()

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The modes of the forward, which are off while backward runs."""
        autocast = MetaAutocast(keep_copies=False, dtype=self.amp) if self.amp else nullcontext()
        with self.functions(), autocast:
            yield


@collector_off()
def run(case: BenchCase) -> Record:
    """Simulate one cell on `case.gpu`: the same function a measured world calls, on the meta device. Of what is
    compiled the record is the most, and a note tells the least.
    """
    record = _traced(case)
    if case.recipe is not None and case.recipe.arguments.get("torch_compile"):
        least = _traced(replace(case, recipe=least_of(case.recipe)))
        record["notes"].append(least_note(least["peak"]["allocated"]))
    return record


def _traced(case: BenchCase) -> Record:
    try:
        return _run(case, repeated_layers)
    except NotAlike:
        return _run(case, lambda ledger, model: nullcontext())


def _run(case: BenchCase, layers: Callable[[Ledger, nn.Module], AbstractContextManager]) -> Record:
    source = resolve(case.model)
    gpu = gpus.get(case.gpu or gpus.DEFAULT_GPU)
    attention = attention_of(case, source, gpu.compute_capability)
    ran: set[str] = set()
    functions = partial(CudaFunctions, attention, gpu.compute_capability, case.attention is not None, ran)
    world = SimWorld(source, attention, functions)
    prepared = METHODS[case.method](case, world)
    recipe = prepared.recipe
    table = rules(gpu, number_of_experts(source.config), padded=recipe is not None and recipe.padded)
    if recipe is not None and (recipe.quantization or {}).get("load_in_8bit"):
        table |= int8_rules()
    ledger = world.ledger = Ledger("meta", ROUND_BYTES, table)
    parts = register_resident(ledger, prepared)
    with ledger, functions(), layers(ledger, prepared.model):
        least = WATCHED_STEPS if case.first_order else 1  # a zeroth-order step leaves nothing behind for the next
        steps = steps_of(case, recipe, least)
        run_steps(ledger, prepared, (without_data([step], recipe, "meta")[0] for step in steps))
    replayed = replay(ledger)
    for kernel in sorted(ran - {attention}):
        prepared.notes.append(f"attention ran the {kernel} kernel where {attention} cannot")
    context_note = gpu.context_note(case.first_order)
    prepared.notes += [context_note] if context_note else []
    shown = dict(environment(), gpu=None, driver=None)
    return describe(
        replace(case, attention=attention), "simulated", shown, prepared, ledger, parts, world.parameters,
        allocated=replayed.peak_allocated, phases=replayed.phase_peaks, reserved=replayed.peak_reserved,
        process=replayed.peak_reserved + gpu.context_bytes(case.first_order),
    )  # fmt: skip
