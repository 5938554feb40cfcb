"""How well each quantizer keeps the outputs of a model's layers: `python -m bench.studies.gptq MODEL --out FILE`."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qzo
from bench.cases.models import resolve
from bench.cases.weights import load, tokenizer
from bench.commands.parser import Parser
from bench.records.environment import environment
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.quantizers.calibration import token_batches
from qzo.tasks.source.reviews import reviews

QUANTIZERS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"method": "gptq"},
    "gptq, act-order": {"method": "gptq", "act_order": True},
}
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; 0, or 2 and one line on stderr."""
    parser = Parser(prog="python -m bench.studies.gptq", description=__doc__)
    parser.add_argument("model", help="name from `bench list models` that has weights, folder, .gguf file or hub id")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="sequences to calibrate on, and as many to measure on")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a sequence")
    logging.basicConfig(format="%(message)s")
    for name in ("qzo", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        record = measure(options.model, options.bits, options.group_size, options.samples, options.seq_len)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(name: str, n_bits: int, group_size: int, samples: int, seq_len: int) -> dict[str, Any]:
    """The record: the error of every layer under every quantizer, and the model's perplexity, on held-out reviews.

    Reviews with even numbers are calibration text, those with odd numbers are held out. Weights are bf16, scales fp16,
    arithmetic fp32. Raises QzoError.
    """
    machine = environment()  # the commit that this code is of, whatever happens while it runs
    source = resolve(name)
    tokens = tokenizer(source)
    if tokens is None:
        raise QzoError(f"{name} has no tokenizer; give a model with its weights")
    text = reviews()
    calibration, held_out = (
        token_batches(lambda string: tokens.encode(string, add_special_tokens=False), part, samples, seq_len)
        for part in ("\n".join(text[::2]), "\n".join(text[1::2]))
    )
    model = load(source, torch.bfloat16).eval()
    models: dict[str, nn.Module] = {}
    for quantizer, options in QUANTIZERS.items():
        log.info("%s", quantizer)
        given = {"calibration": calibration, **options} if options else {}
        models[quantizer] = qzo.quantize(copy.deepcopy(model), n_bits, group_size, **given).float()
    model.float()
    errors = layer_errors(model, models, held_out)
    perplexities = {key: round(perplexity(each, held_out), 3) for key, each in {"16-bit": model, **models}.items()}
    return {
        "model": source.name,
        "n_bits": n_bits,
        "group_size": group_size,
        "symmetric": True,
        "text": "rotten-tomatoes",
        "calibration_tokens": samples * seq_len,
        "held_out_tokens": samples * seq_len,
        "seq_len": seq_len,
        "perplexity": perplexities,
        "layers": errors,
        "environment": machine,
    }


@torch.no_grad()
def layer_errors(
    model: nn.Module, models: dict[str, nn.Module], batches: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """Layer -> quantizer -> ||W X - Ŵ X||² / ||W X||², where X is what the layer gets in the unquantized model.

    So every quantizer is judged on the same inputs, and none on inputs that it has changed.
    """
    layers = {path for path, module in next(iter(models.values())).named_modules() if isinstance(module, QuantLinear)}
    totals = {path: dict.fromkeys(("output", *models), 0.0) for path in sorted(layers, key=_natural)}
    handles = []
    for path, total in totals.items():
        twins = {name: each.get_submodule(path) for name, each in models.items()}

        def hook(
            module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            total: dict[str, float] = total,
            twins: dict[str, nn.Module] = twins,
        ) -> None:
            bias = module.bias
            plain = output if bias is None else output - bias  # type: ignore[operator]
            total["output"] += float(plain.double().pow(2).sum())
            for name, twin in twins.items():
                total[name] += float((twin(args[0]) - output).double().pow(2).sum())

        handles.append(model.get_submodule(path).register_forward_hook(hook))
    for batch in batches:
        model(batch)
    for handle in handles:
        handle.remove()
    return {path: {name: total[name] / total["output"] for name in models} for path, total in totals.items()}


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """exp of the mean loss of every token but the first of each sequence."""
    losses = [float(model(batch, labels=batch).loss) * len(batch) for batch in batches]
    return math.exp(sum(losses) / sum(len(batch) for batch in batches))


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sort key in which layer 2 stands before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


if __name__ == "__main__":
    sys.exit(main())
