"""The simulated CPU: the step that the measured CPU world runs, on tensors that claim to be on a CPU and hold no data.

PyTorch's fake tensors carry the CPU's dispatch keys. So autocast, the choice of attention kernel, dropout and the
blocked bf16 products are the real ones, and only what a kernel allocates inside itself needs a rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.cases.case import BenchCase
from bench.cases.models import ModelSource, resolve
from bench.cases.pretrained import import_utils
from bench.ledger.ledger import Ledger
from bench.methods import METHODS
from bench.records.environment import environment
from bench.records.record import Record
from bench.simulator.cpu.gemm import NOTE, fast_bf16, needs_blocks
from bench.simulator.cpu.kernels import rules
from bench.simulator.cuda.attention import attention_of
from bench.simulator.shared import number_of_experts
from bench.worlds.batches import steps_of, without_data
from bench.worlds.sim import SimWorld
from bench.worlds.watch import WATCHED_STEPS, assign_batches, describe, register_resident, run_steps

DEVICE = "cpu"


class SimCpuWorld(SimWorld):
    """Models are built and changed on the meta device, then moved to fake CPU tensors.

    Args:
        context: gets the mode in which, from then on, every new tensor is fake.
    """

    def __init__(self, source: ModelSource, attention: str, context: ExitStack) -> None:
        super().__init__(source, attention)
        self.context = context

    def place(self, model: nn.Module) -> nn.Module:
        self.context.enter_context(FakeTensorMode())
        self.context.enter_context(taken_for_real())
        return to_cpu(model)

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager:
        return torch.autocast(DEVICE, dtype)

    def autocasts(self, dtype: torch.dtype) -> bool:
        return dtype is not torch.float16

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Nothing: the CPU's backward runs in the thread of the forward, modes and all."""
        yield


def run(case: BenchCase) -> Record:
    """Simulate what `bench.worlds.cpu` would measure on this machine: its thread count and its lack of bf16
    instructions, if it lacks them, count. A CPU has no caching allocator and what libraries take besides tensors is not
    known, so reserved and process bytes are None.
    """
    source = resolve(case.model)
    attention = attention_of(case, source)
    with ExitStack() as context:
        world = SimCpuWorld(source, attention, context)
        prepared = METHODS[case.method](case, world)
        recipe = prepared.recipe
        padded = recipe is not None and recipe.padded
        ledger = Ledger(DEVICE, rules=rules(number_of_experts(source.config), padded))
        parts = register_resident(ledger, prepared)
        ledger.enter("forward" if case.first_order else "perturb")
        batches = without_data(steps_of(case, recipe, WATCHED_STEPS), recipe, DEVICE)
        assign_batches(ledger, batches)
        with ledger, fast_bf16(), random_states(ledger):
            # a zeroth-order step leaves nothing behind for the next
            run_steps(ledger, prepared, batches if case.first_order else batches[:1])
        register_resident(ledger, prepared)  # bitsandbytes casts its biases when it first runs
        prepared.notes += [NOTE] if needs_blocks() else []
        return describe(
            replace(case, attention=attention), "simulated", dict(environment(), gpu=None, driver=None), prepared,
            ledger, parts, world.parameters, allocated=ledger.peak_bytes(),
        )  # fmt: skip


def to_cpu(model: nn.Module) -> nn.Module:
    """Replace all parameters and buffers in place by fake CPU tensors; shared ones stay shared, NF4 keeps its state."""
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    if tensor not in moved:
                        moved[tensor] = _moved(tensor)
                    tensors[name] = moved[tensor]  # type: ignore[assignment]
        numbers = getattr(module, "prompt_tokens", {})  # of PEFT's prompts: neither parameters nor buffers
        numbers |= {name: _fake(tensor) for name, tensor in numbers.items()}
    return model


def _moved(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return _fake(tensor)
    parameter = nn.Parameter(_fake(tensor), requires_grad=tensor.requires_grad)
    if getattr(tensor, "SCB", None) is not None:  # bitsandbytes' int8: the codes are the weight's own data
        parameter.CB, parameter.SCB = parameter.data, _fake(tensor.SCB)  # type: ignore[attr-defined]
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # all that bitsandbytes reads of a weight is this attribute and its data
        for part in (state, state.state2) if state.nested else (state,):
            part.absmax, part.code = _fake(part.absmax), _fake(part.code)
        state.offset = _fake(state.offset) if state.nested else None
        parameter.quant_state = state  # type: ignore[attr-defined]
    return parameter


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)


@contextmanager
def random_states(ledger: Ledger) -> Iterator[None]:
    """Within, the ledger sees the states of the random generator, 5,056 bytes that checkpointing keeps for each layer
    (torch/utils/checkpoint.py): they are no fake tensors, and no operator makes them.
    """
    state = torch.get_rng_state

    def seen() -> Tensor:
        found = state()
        ledger.see(found)
        return found

    with mock.patch.object(torch, "get_rng_state", seen):
        yield


@contextmanager
def taken_for_real() -> Iterator[None]:
    """transformers takes fake tensors for a graph that is traced, and then builds masks that no real step has."""
    with mock.patch.object(import_utils, "is_fake_tensor", lambda tensor: False):
        yield
