"""What a QZO step costs in time and memory on this CPU: `python -m bench.studies.step --out FILE`.

Steps and forward passes take turns, so that whatever else the machine does falls on all of them alike; what is compared
are medians of the ratios within a turn. FILE holds a record for each kind of CPU, told apart by its instructions for
bf16 products; a new one takes the place of that of its kind.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import qzo
from bench.cases import text, weights
from bench.cases.case import BenchCase
from bench.cases.group_sizes import default_group_size
from bench.cases.models import resolve
from bench.cases.quantizations import FORMATS, quantize_as
from bench.commands.parser import Parser
from bench.ledger.events import highest_rise
from bench.methods.as_released import OutOfPlace, full_loss
from bench.records.environment import environment
from bench.simulator.cpu.gemm import fast_bf16
from bench.worlds import cpu
from qzo.errors import QzoError
from qzo.kernels import native
from qzo.kernels.instructions import has_bf16, has_tiles
from qzo.live.scales import has_signed_scales

MODEL, BATCH_SIZE, SEQ_LEN = "smollm2-135m", 16, 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORWARDS, BODIES = "two forward passes", "two forward passes without the head"
QZO, PHILOX, OPERATORS, PANELS = "qzo", "qzo along z of Philox", "qzo by operators", "qzo by panels"
MEZO, RELEASED = "mezo", "mezo-reference"
LONG_TO_MAKE = ("aqlm-2x8",)  # codes of minutes, for a step whose time is that of aqlm-1x16
ORDER = [(True, False), (True, True), (False, False)]  # kinds of CPU, as they stand in FILE
log = logging.getLogger(__name__)
Action = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; 0, or 2 and one line on stderr."""
    parser = Parser(prog="python -m bench.studies.step", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--turns", type=int, default=9, help="timed turns of each dtype, after one that is not")
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        if options.turns < 1:
            raise QzoError(f"--turns {options.turns} is not a positive number; give 1 or more")
        kept = [other for other in _read(options.out) if kind(other) != (has_bf16(), has_tiles())]
        qzo.keep_freed_memory()  # of what follows none takes memory from the system that it had before
        record = {
            "model": MODEL, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "threads": torch.get_num_threads(),
            "bf16_instructions": has_bf16(), "tiles": has_tiles(), "compiled": native.is_compiled(),
            "compiled_products": native.multiplies_here(), "environment": environment(),
            "seconds": {name: seconds(dtype, options.turns) for name, dtype in DTYPES.items()}, "memory": memory(),
            "formats": formats(options.turns),
        }  # fmt: skip
        records = sorted([*kept, record], key=lambda one: ORDER.index(kind(one)))
        options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def kind(record: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the CPU of a record multiplies bf16 numbers itself, and whether it has tiles for that."""
    return record["bf16_instructions"], record.get("tiles", False)


def _read(file: Path) -> list[dict[str, Any]]:
    """The records that are there already, before anything is measured. Raises QzoError for a file of another kind."""
    if not file.exists():
        return []
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        records = None
    known = isinstance(records, list) and all(isinstance(r, dict) and "bf16_instructions" in r for r in records)
    if not known:
        raise QzoError(f"{file} holds no records of this benchmark; choose another --out")
    return records


def seconds(dtype: torch.dtype, turns: int) -> dict[str, list[float]]:
    """Action -> seconds of each turn, models in `dtype`: 16 sequences of 40 tokens, each with one label at its end."""
    source = resolve(MODEL)
    batch = text.batch(source, BATCH_SIZE, SEQ_LEN, seed=0, step=0)
    return _timed(f"{dtype}", {**_forwards(source, dtype, batch), **_steps(source, dtype, batch)}, turns)


def formats(turns: int) -> dict[str, list[float]]:
    """Quantization format -> seconds of a QZO step in bf16 in each turn; none where a library is missing."""
    source = resolve(MODEL)
    batch = text.batch(source, BATCH_SIZE, SEQ_LEN, seed=0, step=0)
    actions: dict[str, Action] = {}
    for name in FORMATS:
        model = weights.load(source, torch.bfloat16).eval()
        try:
            if name not in LONG_TO_MAKE:
                quantize_as(model, name)
                actions[name] = _step_of(model, batch)
        except (ImportError, QzoError) as error:
            log.info("%s is left out: %s", name, error)
    return _timed("formats", actions, turns)


def _step_of(model: nn.Module, batch: text.Batch) -> Action:
    signed = has_signed_scales(model)
    optimizer = qzo.QZO(qzo.trainable(model), lr=1e-7, eps=1e-3, relative=True, nonnegative=not signed)
    return lambda: optimizer.step(lambda: qzo.label_loss(model, batch.input_ids, batch.labels, keep=1))


def _timed(what: str, actions: dict[str, Action], turns: int) -> dict[str, list[float]]:
    """Action -> seconds of each turn, after one that is not counted."""
    taken: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if turn:
                taken.setdefault(name, []).append(round(time.perf_counter() - start, 4))
        log.info("%s, turn %d of %d", what, turn, turns)
    return taken


def _forwards(source: Any, dtype: torch.dtype, batch: text.Batch) -> dict[str, Action]:
    model: Any = weights.load(source, dtype).eval()

    @torch.no_grad()
    def twice(module: nn.Module) -> None:
        for _ in range(2):
            module(input_ids=batch.input_ids, use_cache=False)

    return {FORWARDS: lambda: twice(model), BODIES: lambda: twice(model.get_decoder())}


def _steps(source: Any, dtype: torch.dtype, batch: text.Batch) -> dict[str, Action]:
    """A step of QZO, in each way that there is here, of MeZO, and of MeZO as its authors' code takes it."""

    def model() -> Any:
        return weights.load(source, dtype).eval().requires_grad_(False)

    quantized, dense, released = model(), model(), model()
    qzo.quantize(quantized, n_bits=4, group_size=default_group_size(quantized))
    own = {
        QZO: qzo.QZO(qzo.scales(quantized)),
        PHILOX: qzo.QZO(qzo.scales(quantized), noise="philox"),
        MEZO: qzo.MeZO(dense.named_parameters(), lr=1e-6),
    }
    theirs = OutOfPlace([{"params": list(released.named_parameters())}], 1e-6, seed=0)

    def loss(of: nn.Module) -> torch.Tensor:
        return qzo.label_loss(of, batch.input_ids, batch.labels, keep=1)

    def within(way: Callable[[], AbstractContextManager[None]]) -> None:
        with way():
            own[QZO].step(lambda: loss(quantized))

    ways = {OPERATORS: native.by_operators} if native.is_compiled() else {}
    if has_tiles() and native.is_compiled():  # elsewhere that is what a step does anyway, or it cannot
        ways[PANELS] = native.products_on_tiles
    return {
        QZO: lambda: own[QZO].step(lambda: loss(quantized)),
        PHILOX: lambda: own[PHILOX].step(lambda: loss(quantized)),
        **{name: partial(within, way) for name, way in ways.items()},
        MEZO: lambda: own[MEZO].step(lambda: loss(dense)),
        RELEASED: lambda: theirs.step(lambda: full_loss(released, batch)),
    }


def memory() -> dict[str, int]:
    """Bytes of a QZO step in bf16 by PyTorch's allocation events, and of what it cannot do without.

    "floor": codes, scales, unquantized weights. "layer": the largest linear layer in bf16. "activations": how far one
    forward pass of the unquantized model, with the same bf16 products, rises above what was there.
    """
    record = cpu.run(BenchCase(MODEL, "qzo", "cpu", batch_size=BATCH_SIZE, seq_len=SEQ_LEN, steps=3))
    source = resolve(MODEL)
    model = weights.load(source, torch.bfloat16).eval()
    batch = text.batch(source, BATCH_SIZE, SEQ_LEN, seed=0, step=0)
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, fast_bf16():
        qzo.label_loss(model, batch.input_ids, batch.labels, keep=1)
    return {
        "peak": record["peak"]["allocated"],
        "floor": record["floor"],
        "layer": max(layer.weight.nbytes for layer in layers),
        "activations": highest_rise(profiler),
    }


if __name__ == "__main__":
    sys.exit(main())
