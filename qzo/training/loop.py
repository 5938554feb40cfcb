"""The training loop: any loss, any model, validation at intervals, the best state kept, resumed to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qzo.errors import NotFinite
from qzo.signals import held
from qzo.training.auto.guard import Guard
from qzo.training.learners import Learner, ZerothOrder
from qzo.training.run import Result, Run
from qzo.training.telemetry.memory import peak_bytes
from qzo.training.telemetry.progress import Progress
from qzo.training.telemetry.prospect import Prospect


@dataclass(frozen=True)
class Trained:
    """How a run ended: after `steps` steps, `skipped` of them left out; best validation, after `best_step` steps; the
    first one, before any step; what the test gave before any, empty where that is not known.
    """

    steps: int
    skipped: int
    best_step: int
    best: Result
    stopped_early: bool
    first: Result
    first_test: Result = field(default_factory=dict)


def train(
    learner: Learner,
    run: Run,
    batch_at: Callable[[int], Any],
    loss: Callable[[Any], Tensor],
    evaluate: Callable[[], Result],
    progress: Progress | None = None,
) -> Trained:
    """Take steps until `run.settings.steps` are taken or validation has not improved for `patience` times.

    Killed at any moment and called again with the same arguments, a learner and a run made anew, it ends with the very
    tensors of a run that was never stopped, provided that `batch_at`, `loss` and the machine are the same.

    Args:
        learner: from `make_learner`, in the run's folder.
        run: from `Run`.
        batch_at: step, from 0 -> batch; a function of the step alone, see `qzo.training.batches`.
        loss: batch -> scalar loss of the model as it stands; without dropout.
        evaluate: result of a validation of the model as it stands; needs the run's metric and "loss".
        progress: what to show it with.

    Raises QzoError where the validation before the first step is not finite, where losses are not several times in a
    row, and where the disk is full; what is on disk then is sound, and the run can be resumed. A later validation that
    is not finite is recorded as null and is never the best.
    """
    settings = run.settings
    run.begin(learner.steps)
    started = time.monotonic()
    plain = isinstance(learner, ZerothOrder) and settings.update == "sgd" and not settings.normalize
    clip = settings.optimizer_options()["clip_threshold"] or math.inf
    guard = Guard()
    for value in run.losses:
        guard.after(value)
    prospect = Prospect(settings.steps, clip) if plain and not learner.steps else None
    while True:
        if _due(learner.steps, settings.steps, settings.eval_every) and not run.validated(learner.steps):
            _validate(learner, run, evaluate, progress)
        exhausted = settings.patience is not None and run.stale >= settings.patience
        if exhausted or learner.steps >= settings.steps:
            break
        step, lr = learner.steps, settings.lr_at(learner.steps) * (guard.factor if run.guarded else 1)
        batch = batch_at(step)
        with ExitStack() as stack:
            if not isinstance(learner, ZerothOrder):
                stack.enter_context(held())  # a signal in the midst of it would leave half a step
            outcome = learner.step(lambda batch=batch: loss(batch), lr)  # type: ignore[misc]
            stack.enter_context(held())
            entry = {"step": learner.steps, "loss": outcome.loss, learner.slope_name: outcome.slope, "lr": lr}
            flags = {"clipped": outcome.clipped, "skipped": outcome.skipped}
            run.write({**entry, **flags, "seconds": round(time.monotonic() - started, 3)})
            learner.record(_due(learner.steps, settings.steps, settings.eval_every))
        risen = guard.after(outcome.loss)
        if progress is not None:
            progress.step(learner.steps, outcome, lr)
            if risen is not None:
                progress.notice(f"{risen}: {_remedy(run, guard)}")
            notice = None if prospect is None else prospect.after(outcome.loss, outcome.slope, lr)
            if notice is not None and isinstance(learner, ZerothOrder) and not learner.optimizer.lr_told:
                progress.notice(notice)
    assert run.best is not None
    early, first = learner.steps < settings.steps, run.validations[0][1]
    return Trained(learner.steps, learner.skipped, *run.best, stopped_early=early, first=first)


def _remedy(run: Run, guard: Guard) -> str:
    if run.guarded:
        return f"from here on with {guard.factor:g} of the lr"
    return "the best state is kept; where it does not come down again, begin anew with a smaller lr"


def _due(taken: int, steps: int, every: int) -> bool:
    return taken % every == 0 or taken == steps


@torch.no_grad()
def _validate(learner: Learner, run: Run, evaluate: Callable[[], Result], progress: Progress | None) -> None:
    result = _result(learner.steps, run.metric, evaluate)
    memory = peak_bytes(learner.optimizer)
    better = run.add_validation(learner.steps, result, learner.tensors(), learner.mark(), memory)
    if progress is not None:
        progress.validation(learner.steps, result, better)


def _result(steps: int, metric: str, evaluate: Callable[[], Result]) -> Result:
    """Of a validation; NaN where logits are not finite. Raises NotFinite for that before the first step."""
    try:
        result = evaluate()
    except NotFinite as error:
        if steps == 0:
            raise NotFinite(f"before the first step, {error}") from error
        return {metric: math.nan, "loss": math.nan}
    if steps == 0 and not all(math.isfinite(result[name]) for name in {metric, "loss"} & result.keys()):
        raise NotFinite(
            f"before the first step, validation gives {metric} {result.get(metric)} and loss {result.get('loss')}; "
            "run it in a wider dtype, --dtype bfloat16 or float32"
        )
    return result
