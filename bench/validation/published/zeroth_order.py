"""Rows of zeroth-order methods: what princeton-nlp/MeZO and liangyuwang/zo2 run, and what nvidia-smi says of it.

MeZO's figure 2 is on MultiRC, whose prompts have 400 tokens on average, batch 1. In-context learning has 32 examples
before it, cut at the 2,048 positions of OPT. Neither number is told with the figure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource
from bench.cases.text import Batch
from bench.ledger.ledger import Ledger
from bench.methods.as_released import full_loss, mezo_reference
from bench.methods.prepared import Prepared
from bench.simulator.allocator.replay import ROUND_BYTES, replay
from bench.simulator.cuda.kernels import rules
from bench.simulator.shared import collector_off
from bench.validation.frameworks.streams import replay_streams
from bench.validation.frameworks.zo2 import streamed_step
from bench.validation.published.row import Row, model_of
from bench.worlds.sim import SimWorld
from bench.worlds.watch import register_resident, run_steps
from qzo.errors import QzoError

PROMPT, CONTEXT = 400, 2048  # tokens
EAGER = "eager"
Figures = dict[str, int]


def predict(row: Row) -> Figures:
    """The process's bytes. Raises QzoError for several GPUs and for a method that no code is known of."""
    if row.get("gpus", 1) > 1:
        raise QzoError(f"the sum over {row['gpus']} GPUs: how the model is divided among them is not known here")
    method = row["method"]
    run = next((run for name, run in METHODS if method.startswith(name)), None)
    if run is None:
        raise QzoError(f"how MeZO's scripts run {method} is not known here")
    return run(row)


@collector_off()
def _mezo(row: Row) -> Figures:
    """A step of the released code."""
    source, gpu = model_of(row), _gpu(row)
    world, ledger = _world(row, source), _ledger(gpu, source)
    prepared = mezo_reference(BenchCase(source.name, "mezo-reference"), world)
    register_resident(ledger, prepared)
    with ledger, world.functions():
        run_steps(ledger, prepared, [_batch(row["seq_len"] or PROMPT)])
    return _figures(ledger, gpu)


def _forward(row: Row, tokens: int) -> Figures:
    """An evaluation: one forward pass in fp16 that keeps its keys and values."""
    source, gpu = model_of(row), _gpu(row)
    world, ledger = _world(row, source), _ledger(gpu, source)
    model = world.model(torch.float16).eval()
    register_resident(ledger, Prepared(model, torch.optim.SGD([torch.zeros(1)]), lambda *_: 0.0, "float16", "none"))
    with ledger, world.functions(), torch.no_grad():
        ledger.enter("forward")
        full_loss(model, _batch(tokens))
    return _figures(ledger, gpu)


@collector_off()
def _zo2(row: Row) -> Figures:
    """Steps of test_memory.py: layers come and go, each in the pool of its CUDA stream."""
    source, gpu = model_of(row), _gpu(row)
    source.config.tie_word_embeddings = False  # its OPTForCausalLM ties nothing
    world, ledger = _world(row, source), _ledger(gpu, source)
    model = world.model(torch.float16).train()
    with ledger, world.functions(), torch.no_grad():
        streamed_step(ledger, model, _batch(row["seq_len"]))
    reserved = replay_streams(ledger)
    return {"reserved": reserved, "process": reserved + gpu.context_bytes(backward=False)}


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


def _batch(tokens: int) -> Batch:
    ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
    return Batch(ids, ids.clone(), "none")


METHODS: tuple[tuple[str, Callable[[Row], Figures]], ...] = (
    ("mezo, layers streamed", _zo2),
    ("mezo", _mezo),
    ("zero-shot", lambda row: _forward(row, PROMPT)),
    ("in-context", lambda row: _forward(row, CONTEXT)),
)
