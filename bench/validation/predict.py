"""Predict one measurement by simulating the procedure it was made with.

The procedure: load, add adapters, one warm-up step, then a step whose peaks count. In a step the model's output stays
alive until the optimizer is done, the embedding's output requires a gradient, and all tokens carry a label.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.nn import Parameter

from bench.cases.pretrained import PreTrainedModel
from bench.cases.text import Batch
from bench.ledger.ledger import Block, Ledger
from bench.methods.adapters import add_adapters, frozen_base, prepared_nf4
from bench.methods.prepared import Enter, Prepared
from bench.methods.quantized.nf4 import to_nf4
from bench.simulator.allocator.replay import ROUND_BYTES, replay
from bench.simulator.cuda.attention import KERNELS, Call, head_size, refuse_unable
from bench.simulator.cuda.kernels import CudaFunctions, rules
from bench.simulator.shared import collector_off, number_of_experts
from bench.validation.measurement import Measurement
from bench.worlds.sim import SimWorld
from bench.worlds.watch import register_resident, run_steps

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP = "warm-up"
# Until March 2026 (huggingface/transformers#44576) loader threads read ahead of the thread that quantizes. How far is a
# race that no source gives a number for, and two loads of one model differ (up to 8 MiB allocated on the T4). Over all
# QLoRA rows of the T4, which do not tell their version, 232 to 264 MiB come out alike (reserved 1.3 to 1.8 % off on
# average). Since then one tensor at a time is read and quantized: 0, exact on an H100 (bench/validation/recipes.py).
READ_AHEAD_BYTES = 256 << 20


@collector_off()
def predict(measurement: Measurement) -> dict[str, int]:
    """Bytes for each of `bench.validation.measurement.METRICS`."""
    refuse_attention(measurement)
    world = SimWorld(measurement.source, measurement.attention)
    ledger = Ledger("meta", ROUND_BYTES, rules(measurement.gpu, number_of_experts(measurement.source.config)))
    prepared = prepare(measurement, world, ledger)
    register_resident(ledger, prepared)
    tokens = torch.empty(measurement.batch_size, measurement.seq_len, dtype=torch.long, device="meta")
    ledger.see(tokens)
    batch = Batch(tokens, tokens, "none")
    with ledger, CudaFunctions(measurement.attention):
        ledger.enter(WARM_UP)
        prepared.step(batch, lambda phase: None)
        run_steps(ledger, prepared, [batch])
    replayed = replay(ledger)
    phases = {name: replayed.phase_peaks[name] for name in ("forward", "backward", "step")}
    process = replayed.peak_reserved + measurement.gpu.context_bytes()
    return {"allocated": max(phases.values()), "reserved": replayed.peak_reserved, "process": process, **phases}


def refuse_attention(measurement: Measurement) -> None:
    """Raise QzoError for an attention kernel that the GPU cannot run with these heads, as `bench run` does."""
    if measurement.attention in KERNELS:
        heads = head_size(measurement.source)
        call = Call(TORCH[measurement.dtype], heads, requires_grad=True, causal=True)
        refuse_unable(measurement.attention, measurement.gpu.compute_capability, call)


def prepare(measurement: Measurement, world: SimWorld, ledger: Ledger) -> Prepared:
    """Model, optimizer and step of the measurement: torch's AdamW as it is by default on a GPU (foreach)."""
    dtype, checkpointing = TORCH[measurement.dtype], measurement.gradient_checkpointing
    if measurement.method == "qlora":
        model = to_nf4(world.model(dtype))
        see_loading(ledger, model)
        with ledger:
            model = prepared_nf4(model, world, checkpointing)
    else:
        model = frozen_base(world, dtype, checkpointing)
        see_loading(ledger, model)
    if checkpointing:
        model.enable_input_require_grads()
    with ledger:
        adapted, trained = add_adapters(model, world, measurement.rank, 2 * measurement.rank, measurement.targets)
    optimizer = torch.optim.AdamW(trained, foreach=True)

    def step(batch: Batch, enter: Enter) -> float:
        enter("forward")
        output = adapted(input_ids=batch.input_ids, labels=batch.labels)
        enter("backward")
        output.loss.backward()
        enter("step")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    return Prepared(adapted, optimizer, step, measurement.dtype, "adamw")


def see_loading(ledger: Ledger, model: PreTrainedModel, read_ahead: int = READ_AHEAD_BYTES) -> None:
    """Loading as transformers does it with bitsandbytes: one allocation of the final size, given back at once, that the
    parameters are then carved from in the order of their names. What becomes NF4 comes to the GPU unquantized, waits
    for the main thread, and leaves when it is packed (transformers/modeling_utils.py, caching_allocator_warmup;
    core_model_loading.py, spawn_materialize).
    """
    parameters = sorted(model.named_parameters(), key=lambda item: _natural(item[0]))
    if any(_is_packed(parameter) for _, parameter in parameters):
        ledger.release(ledger.allocate(sum(parameter.nbytes for _, parameter in parameters)))
    waiting: deque[tuple[Block, Parameter]] = deque()
    for _, parameter in parameters:
        if not _is_packed(parameter):
            ledger.see(parameter)
            continue
        waiting.append((ledger.allocate(_unquantized_bytes(parameter, model.dtype)), parameter))
        while waiting and sum(block.nbytes for block, _ in waiting) >= read_ahead:
            _pack(ledger, *waiting.popleft())
    while waiting:
        _pack(ledger, *waiting.popleft())
    for buffer in model.buffers():
        ledger.see(buffer)


def _is_packed(parameter: Any) -> bool:
    return hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")


def _unquantized_bytes(parameter: Any, dtype: torch.dtype) -> int:
    if hasattr(parameter, "SCB"):
        return int(parameter.numel() * dtype.itemsize)
    return int(parameter.quant_state.shape.numel() * parameter.quant_state.dtype.itemsize)


def _pack(ledger: Ledger, unquantized: Block, parameter: Any) -> None:
    """What bitsandbytes allocates for it, in its order (functional.py, quantize_4bit; nn/modules.py, Int8Params)."""
    if hasattr(parameter, "SCB"):
        half = ledger.allocate(parameter.numel() * 2)  # fp16, what is quantized
        ledger.see(parameter.SCB)
        ledger.see(parameter)
        ledger.release(half)
    elif parameter.quant_state.nested:
        state, second = parameter.quant_state, parameter.quant_state.state2
        absmax = ledger.allocate(state.absmax.numel() * 4)
        ledger.see(parameter)
        ledger.see(state.offset)
        shifted = ledger.allocate(state.absmax.numel() * 4)
        for tensor in (second.absmax, state.absmax, second.code):
            ledger.see(tensor)
        ledger.release(shifted)
        ledger.release(absmax)
    else:
        ledger.see(parameter.quant_state.absmax)
        ledger.see(parameter)
    ledger.release(unquantized)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
