"""Run a method's steps under the ledger and turn what was seen into a record: the part all worlds share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.cases.case import BenchCase
from bench.cases.methods import BY_NAME
from bench.cases.text import Batch
from bench.ledger.ledger import Ledger
from bench.methods.prepared import Prepared
from bench.records.record import ROLES, Record, build_record
from bench.worlds.components import FLOOR, components, nbytes, role

WATCHED_STEPS = 2  # the first makes the optimizer's state, the second is the steady one


def register_resident(ledger: Ledger, prepared: Prepared) -> dict[str, int]:
    """Tell the ledger what is there before the first step; return the bytes of each part."""
    parts = components(prepared.model)
    for part, tensors in parts.items():
        ledger.assign(role(part), tensors)
    ledger.assign("optimizer", prepared.optimizer_tensors())
    return {part: nbytes(tensors) for part, tensors in parts.items()}


def assign_batches(ledger: Ledger, batches: Iterable[Batch]) -> None:
    """Tell the ledger that these batches are there."""
    for batch in batches:
        for part in batch.parts():
            ledger.assign("temporaries", part.tensors().values())


def run_steps(ledger: Ledger, prepared: Prepared, batches: Iterable[Batch]) -> list[float]:
    """One optimizer step for each batch under the (already active) ledger; the losses."""

    def enter(phase: str) -> None:
        if phase == "step":  # backward is over: now it is known which storages are gradients
            ledger.assign("gradients", prepared.gradients())
        if prepared.replaces_weights:  # what has taken their place by now is weights from its birth on
            register_resident(ledger, prepared)
        ledger.enter(phase)

    losses = []
    for batch in batches:
        losses.append(prepared.step(batch, enter))
        ledger.assign("optimizer", prepared.optimizer_tensors())
    return losses


def describe(
    case: BenchCase,
    world: str,
    environment: dict[str, Any],
    prepared: Prepared,
    ledger: Ledger,
    parts: dict[str, int],
    total_parameters: int,
    allocated: int,
    phases: dict[str, int] | None = None,
    **measured: Any,
) -> Record:
    """The record of a watched case.

    Args:
        parts: bytes of each resident part.
        allocated: the allocator's own peak after loading; what it exceeds the ledger's by is `unattributed`.
        phases: the allocator's own peak in each phase; None takes the ledger's.
        measured: reserved, process, step_seconds, losses.
    """
    after_load = [name for name in ledger.phases if name != "load"]
    peak = ledger.peak(after_load)
    at_peak = {name: peak.roles.get(name, 0) for name in ROLES}
    at_peak["unattributed"] = max(0, allocated - peak.nbytes)
    held = [tensor for group in prepared.optimizer.param_groups for tensor in group["params"]]
    trained = sum(tensor.numel() for tensor in held if tensor.requires_grad or not case.first_order)
    adapters = sum(tensor.numel() for tensor in held) if BY_NAME[case.method].trains == "adapters" else 0
    return build_record(
        case_of(case, prepared),
        world,
        environment,
        total=total_parameters + adapters,
        trainable=trained,
        allocated=sum(at_peak.values()),
        at_peak=at_peak,
        floor=sum(parts.get(part, 0) for part in FLOOR),
        phases=phases or ledger.phase_peaks(),
        components=parts,
        notes=prepared.notes,
        **measured,
    )


def case_of(case: BenchCase, prepared: Prepared | None = None) -> dict[str, Any]:
    """The `case` object of a record; what only the prepared method knows is null without it."""
    return {
        "model": case.model,
        "method": case.method,
        "batch_size": case.batch_size,
        "seq_len": case.seq_len,
        "dtype": prepared.dtype if prepared else None,
        "attention": case.attention,
        "gradient_checkpointing": case.recomputes,
        "optimizer": prepared.optimizer_name if prepared else None,
        "quantization": prepared.quantization if prepared else None,
        "gpu": case.gpu,
        "recipe": prepared.recipe.stated() if prepared and prepared.recipe else None,
    }
