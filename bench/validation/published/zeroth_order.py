"""Rows of zeroth-order methods: what princeton-nlp/MeZO and liangyuwang/zo2 run, and what the driver says of it.

MeZO's figure 2 is on MultiRC, batch 1. How long its prompts were is not told with it, but what its scripts draw is: a
thousand rows by NumPy's seed 0 (tasks.py, sample_subset), in the Trainer's order by seed 42. Their lengths are those of
its own template by GPT-2's vocabulary, and the allocator keeps what each needed that was longer than all before it, so
that these stand for the run: two hundred evaluations come out as their longest six do. In-context learning has 32
examples before it, cut at the 2,048 positions of OPT. Training scores both answers to a question at once, padded to a
multiple of eight (mezo.sh, train_as_classification). nvidia-smi tells the process; ZO2 asks NVML for what of the whole
card is used, with what the driver keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource
from bench.cases.recipes.recipe import Recipe
from bench.cases.text import Batch
from bench.ledger.ledger import Ledger
from bench.methods.as_released import mezo_reference
from bench.methods.prepared import Prepared
from bench.simulator.allocator.replay import ROUND_BYTES, replay
from bench.simulator.cuda.kernels import rules
from bench.simulator.shared import collector_off
from bench.validation.frameworks.mezo import answer, bound_scores, score_answers
from bench.validation.frameworks.streams import replay_streams
from bench.validation.frameworks.zo2 import resident_steps, streamed_step
from bench.validation.published.row import Published, Row, model_of
from bench.worlds.sim import SimWorld
from bench.worlds.watch import register_resident, run_steps
from qzo.errors import QzoError

EVALUATED = (200, 349, 508, 561, 568, 614)  # tokens of a prompt and its answer: each longer than all before it
TRAINED = (384, 544, 616, 632, 680, 744)
CONTEXT = (2048,)
CANDIDATES = 2  # sequences that a question is scored by
EAGER = "eager"
Figures = dict[str, int]


def read(row: Row) -> Published:
    """A row of Adam, by finetune.sh: fp32 weights, fp16 autocast, all weights or MeZO's own five prefix tokens."""
    prefix = {"num_virtual_tokens": 5, "task_type": "CAUSAL_LM"} if row["method"].startswith("prefix") else None
    recipe = Recipe(
        row["method"], {"fp16": True, "optim": "adamw_mixed"}, prefix, "PrefixTuningConfig", dtype="float32",
        attention=EAGER, batch_size=CANDIDATES, lengths=(max(TRAINED),), use_cache=True,
    )  # fmt: skip
    return Published(recipe, model_of(row), changes=(score_answers, bound_scores))


def predictor(row: Row) -> Callable[[Row], Figures] | None:
    """The function that predicts the row; None for one that a recipe says.

    Raises QzoError for several GPUs and for a method that no code is known of.
    """
    if row.get("gpus", 1) > 1:
        raise QzoError(f"the sum over {row['gpus']} GPUs: how the model is divided among them is not known here")
    method = row["method"]
    if method.endswith("(Adam)"):
        return None
    run = next((run for name, run in METHODS if method.startswith(name)), None)
    if run is None:
        raise QzoError(f"how MeZO's scripts run {method} is not known here")
    return run


@collector_off()
def _mezo(row: Row) -> Figures:
    """A step of the released code: out of place by MeZO's, in place by zo.py in ZO2's repository (test_memory.py)."""
    if row["seq_len"]:
        return _zo(row)
    source, gpu = model_of(row), _gpu(row)
    world, ledger = _world(row, source), _ledger(gpu, source)
    prepared = mezo_reference(BenchCase(source.name, "mezo-reference"), world)
    bound_scores(prepared.model)
    register_resident(ledger, prepared)
    with ledger, world.functions():
        run_steps(ledger, prepared, [_batch(tokens, CANDIDATES) for tokens in TRAINED])
    return _figures(ledger, gpu)


def _forward(row: Row, lengths: tuple[int, ...]) -> Figures:
    """Evaluations in fp16, one answer at a time."""
    source, gpu = model_of(row), _gpu(row)
    world, ledger = _world(row, source), _ledger(gpu, source)
    model = world.model(torch.float16).eval()
    bound_scores(model)
    register_resident(ledger, Prepared(model, torch.optim.SGD([torch.zeros(1)]), lambda *_: 0.0, "float16", "none"))
    with ledger, world.functions(), torch.no_grad():
        ledger.enter("forward")
        for tokens in lengths:
            answer(model, _batch(tokens).input_ids)
    return _figures(ledger, gpu)


def _zo(row: Row) -> Figures:
    """Steps of test_memory.py on a model that is there whole."""
    ledger, gpu = _tested(row, resident_steps)
    figures = _figures(ledger, gpu)
    return figures | {"process": figures["process"] + gpu.driver_reserved_bytes}


def _zo2(row: Row) -> Figures:
    """Steps of test_memory.py: layers come and go, each in the pool of its CUDA stream."""
    ledger, gpu = _tested(row, streamed_step)
    reserved = replay_streams(ledger)
    used = reserved + gpu.context_bytes(backward=False) + gpu.driver_reserved_bytes
    return {"reserved": reserved, "process": used}


@collector_off()
def _tested(row: Row, steps: Callable[[Ledger, Any, Batch], None]) -> tuple[Ledger, gpus.Gpu]:
    source, gpu = model_of(row), _gpu(row)
    source.config.tie_word_embeddings = False  # its OPTForCausalLM ties nothing
    world, ledger = _world(row, source), _ledger(gpu, source)
    model = world.model(torch.float16).train()
    with ledger, world.functions(), torch.no_grad():
        steps(ledger, model, _batch(row["seq_len"]))
    return ledger, gpu


def _figures(ledger: Ledger, gpu: gpus.Gpu) -> Figures:
    replayed = replay(ledger)
    process = replayed.peak_reserved + gpu.context_bytes(backward=False)
    return {"allocated": replayed.peak_allocated, "reserved": replayed.peak_reserved, "process": process}


def _world(row: Row, source: ModelSource) -> SimWorld:
    return SimWorld(source, EAGER)


def _ledger(gpu: gpus.Gpu, source: ModelSource) -> Ledger:
    return Ledger("meta", ROUND_BYTES, rules(gpu))


def _gpu(row: Row) -> gpus.Gpu:
    """ZO2's README does not tell its card; its paper measured on an A100."""
    return gpus.find("a100-80gb" if row["gpu"] == "not stated" else row["gpu"])


def _batch(tokens: int, rows: int = 1) -> Batch:
    ids = torch.empty(rows, tokens, dtype=torch.long, device="meta")
    return Batch(ids, ids.clone(), "none")


METHODS: tuple[tuple[str, Callable[[Row], Figures]], ...] = (
    ("mezo, layers streamed", _zo2),
    ("mezo", _mezo),
    ("zero-shot", lambda row: _forward(row, EVALUATED)),
    ("in-context", lambda row: _forward(row, CONTEXT)),
)
