"""Records for the paper's printed memory figures: `python -m bench.studies.paper --out FILE`.

One record for each simulated case of its protocol, and one entry for each way of sharding full fine-tuning. What the
paper printed is no input here; `python -m reports.studies.paper.page` sets both side by side.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases.case import BenchCase
from bench.records.files import write_json
from bench.studies.fsdp import MODES, PRECISIONS, FsdpSetting, simulate
from bench.worlds import sim
from bench.worlds.workers import InOrder, workers
from qzo.errors import QzoError

# One SST-2 example is two sequences: the prompt with each of the two answers (--train_as_classification in the scripts
# of MeZO and QZO). Tokens: prompts "SENTENCE It was terrible" of 4,000 SST-2 training sentences, with SmolLM2's
# tokenizer and one BOS, are 15 tokens long on average; the longest of 100 drawn at random has a median of 50 (5 %: 39,
# 95 %: 58), and the collator pads to a multiple of 8. The tokenizers of OPT and Llama and the paper's own 100 examples
# were not at hand.
SEQUENCES = 2
SEQ_LEN = 56
ZEROTH_ORDER_GPU, FIRST_ORDER_GPU = "rtx-4090", "a100-80gb"
MODELS = ("opt-6.7b", "llama2-7b", "llama3.1-8b")
GPUS = (1, 2, 4, 8)
PROTOCOL = {
    "sequences": SEQUENCES,
    "seq_len": SEQ_LEN,
    "text": "SST-2, one example a step, which is two sequences (the prompt with each answer), of 56 tokens: the "
    "longest prompt of 100 examples (median of random draws: 50; 5 %: 39, 95 %: 58), padded to a multiple of 8",
    "gpus": f"{ZEROTH_ORDER_GPU} for zeroth-order methods, {FIRST_ORDER_GPU} for the others",
}


def cases() -> list[BenchCase]:
    """Every case whose record the comparison needs: the bench's own methods, those as released, the alternatives."""
    zeroth = [(model, method) for model in MODELS for method in ("mezo", "mezo-reference", "qzo", "qzo-reference")]
    zeroth += [("llama2-13b", "qzo-2bit"), ("llama2-13b", "qzo-2bit-reference")]
    first = [(model, method, False) for model in MODELS for method in ("ft-mixed", "ft-sgd")]
    first += [("opt-6.7b", method, checkpointing) for method in ("lora", "qlora") for checkpointing in (True, False)]
    common: dict[str, Any] = {"batch_size": SEQUENCES, "seq_len": SEQ_LEN}
    return [
        *(BenchCase(model, method, gpu=ZEROTH_ORDER_GPU, **common) for model, method in zeroth),
        *(
            BenchCase(model, method, gpu=FIRST_ORDER_GPU, gradient_checkpointing=checkpointing, **common)
            for model, method, checkpointing in first
        ),
    ]


def settings() -> list[FsdpSetting]:
    """Every way of sharding that is tabulated; on one GPU nothing is sharded, so one mode stands for both."""
    grid = itertools.product(PRECISIONS, MODES, GPUS)
    return [FsdpSetting(gpus, mode, precision) for precision, mode, gpus in grid if gpus > 1 or mode == MODES[0]]


def fsdp_entry(job: tuple[str, FsdpSetting]) -> dict[str, Any]:
    """One rank of one model under one setting, as it is written to the file; all sizes in bytes."""
    model, setting = job
    peak = simulate(model, setting, SEQUENCES, SEQ_LEN, FIRST_ORDER_GPU)
    return {
        "model": model,
        **asdict(setting),
        "bytes_per_parameter": PRECISIONS[setting.precision].bytes_per_parameter,
        "gpu": FIRST_ORDER_GPU,
        "rank": {"allocated": peak.allocated, "reserved": peak.reserved, "process": peak.process},
        "at_peak": peak.at_peak,
    }


def collect(models: Sequence[str] = MODELS) -> dict[str, Any]:
    """Everything that the file holds: protocol, records, and the FSDP grid of `models`."""
    jobs = [(model, setting) for model in models for setting in settings()]
    with workers(len(jobs)) as in_order:
        records = _watched("cases", in_order, sim.run, cases())
        grid = _watched("FSDP settings", in_order, fsdp_entry, jobs)
    return {"protocol": PROTOCOL, "records": records, "fsdp": grid}


def _watched(what: str, in_order: InOrder, function: Callable[..., Any], jobs: Sequence[Any]) -> list[Any]:
    done = []
    for number, result in enumerate(in_order(function, jobs), 1):
        print(f"\r[{number}/{len(jobs)}] {what}", end="", file=sys.stderr, flush=True)
        done.append(result)
    print(file=sys.stderr)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate everything and write the file; exit code 0, or 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.paper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", default="reports/studies/paper/paper_records.json", help="file to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        print(f"wrote {write_json(Path(options.out), collect())}", file=sys.stderr)
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
