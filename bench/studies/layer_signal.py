"""Which layers can learn a task from forward passes alone: `python -m bench.studies.layer_signal MODEL --out FILE`.

For a choice between two label words with the margin m = s_1 - s_0, p = sigmoid(m - b) and b such that the mean of p is
that of the labels (the prior of the label words taken off), the loss has at the scales Δ of one layer, in coordinates
relative to each scale,

    signal     |g|²,  g = mean of (p - y) Δ ∂m/∂Δ                  less what the spread of few examples adds to it
    curvature  tr H = mean of p (1 - p) |Δ ∂m/∂Δ|²                 Gauss-Newton
    common     mean of p (1 - p) times |mean of Δ ∂m/∂Δ|²          the part of it along which every margin moves alike:
                                                                   the prior of the label words; less as above

A step of SPSA on batches of B examples, whose gradients scatter by about tr H / B, gains at best

    gain = ½ r² / (r + 1/B)   at   lr = r / (r + 1/B) / tr H,   r = |g|² / tr H

so with r small against 1/B the gain goes with r², whatever the number of scales: leaving out layers that add much
curvature and little signal makes every step worth more, and so does leaving the common part out of the loss
(`centering` of `qzo.tasks.loss`). Needs gradients, once, for one example at a time.
"""

from __future__ import annotations

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
from bench.commands.parser import Parser
from bench.records.environment import environment
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer
from qzo.errors import QzoError
from qzo.tasks.example import Example
from qzo.tasks.scoring import candidate_scores

TASK = "rotten-tomatoes"
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the record; 0, or 2 and one line on stderr."""
    parser = Parser(prog="python -m bench.studies.layer_signal", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a GPTQ checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=200, help="training examples")
    parser.add_argument("--seed", type=int, default=0, help="of the splits")
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        if options.samples < 2:
            raise QzoError(f"--samples {options.samples} is too few; choose at least 2")
        machine, task = environment(), tasks.get(TASK)
        model: Any = load(options.model, torch.float32).eval()
        encoder = tasks.Encoder(task, load_tokenizer(options.model))
        layers = measure(model, encoder, task.splits(options.seed)["train"][: options.samples])
        record = {"task": TASK, "samples": options.samples, "layers": layers, "environment": machine}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(model: nn.Module, encoder: tasks.Encoder, examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Name of the scales -> {"signal", "curvature", "common"} of a model in fp32, on a task with two label words.

    The scales become leaves that require a gradient. Raises QzoError for other tasks and unquantized models.
    """
    if len(encoder.task.words) != 2:
        raise QzoError(f"{encoder.task.name} has not two label words; take a task with two, such as sst2")
    leaves = _leaves(model)
    with torch.no_grad():
        margins = torch.cat([_margins(model, encoder, [example]) for example in examples])
    labels = torch.tensor([float(example.label) for example in examples])
    prior = balanced_prior(margins, labels)
    mean, shared = ({name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for _ in range(2))
    spread, squares, curvature = (dict.fromkeys(leaves, 0.0) for _ in range(3))
    weight = 0.0
    for number, example in enumerate(examples, 1):
        p = float(torch.sigmoid(margins[number - 1] - prior))
        weight += p * (1 - p) / len(examples)
        gradients = torch.autograd.grad(_margins(model, encoder, [example])[0], list(leaves.values()))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            relative = gradient * leaf.detach()
            square = float(relative.square().sum())
            mean[name].add_(relative, alpha=p - example.label)
            shared[name].add_(relative)
            squares[name] += square
            spread[name] += (p - example.label) ** 2 * square
            curvature[name] += p * (1 - p) * square
        if number % 50 == 0:
            log.info("%d of %d examples", number, len(examples))
    n, pairs = len(examples), len(examples) * (len(examples) - 1)
    return {
        name: {
            "signal": (float(mean[name].square().sum()) - spread[name]) / pairs,
            "curvature": curvature[name] / n,
            "common": weight * (float(shared[name].square().sum()) - squares[name]) / pairs,
        }
        for name in leaves
    }


def balanced_prior(margins: Tensor, labels: Tensor) -> float:
    """b with mean of sigmoid(margins - b) = mean of the labels, by bisection."""
    low, high = float(margins.min()) - 20, float(margins.max()) + 20
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(margins - middle).mean() > labels.mean() else (low, middle)
    return middle if math.isfinite(middle) else 0.0


def _margins(model: nn.Module, encoder: tasks.Encoder, examples: Sequence[Example]) -> Tensor:
    scores = candidate_scores(model, encoder.batch(examples))
    return scores[:, 1] - scores[:, 0]


def _leaves(model: nn.Module) -> dict[str, Tensor]:
    """The scales in fp32, live, as what gradients are taken of."""
    model.requires_grad_(False)
    leaves = {}
    for name in qzo.scales(model):
        layer: Any = model.get_submodule(name.removesuffix(".scales"))
        layer.scales = layer.scales.float().requires_grad_(True)
        leaves[name] = layer.scales
    return leaves


if __name__ == "__main__":
    sys.exit(main())
