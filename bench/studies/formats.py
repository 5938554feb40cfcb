"""Every quantization format on one model: `python -m bench.studies.formats --out FILE` measures what FILE lacks.

All start from the weights of SmolLM2-135M's GGUF, quantized layer by layer to each format; the GGUF itself is taken
straight, packed as it is. For each: bytes, number of scales, seconds and allocated peak of a step on this CPU, and the
accuracy on a task before and after some steps of QZO, with the same settings for all. Stopped at any moment, the
command goes on with the format that was not finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qzo
from bench.cases.case import choose
from bench.cases.quantizations import DEFAULT, FORMATS, RANDOM, quantize_as
from bench.cases.weights import gguf_source
from bench.commands.parser import Parser
from bench.ledger.ledger import Ledger
from bench.records.environment import environment
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer
from qzo.checkpoints.write import write_tuned
from qzo.durable import replace_file
from qzo.errors import QzoError
from qzo.live.scales import quantized_bytes, quantized_layers
from qzo.live.trainable import offsets, scale_group
from qzo.models.prefix import SharedPrefix
from qzo.training.batches import batch_numbers

MODEL, TASK = "smollm2-135m", "rotten-tomatoes"
STRAIGHT = "gguf file"  # the model's own file: Q4_1 layers and a Q8_0 vocabulary
NAMES = (STRAIGHT, *(name for name, known in FORMATS.items() if name != DEFAULT and known.note != RANDOM))
WATCHED_STEP = 1  # the first one finds out what is asked only once
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What every format is trained with; see reports/studies/accuracy/settings.md for how they were found.

    Args:
        steps, directions, batch_size: of QZO, one-sided: a step takes one forward pass more than it has directions.
        lr, eps, clip_threshold: relative amounts; lr stays the same, for there are few steps.
        first_layer, last_layer: decoder layers whose scales are trained.
        examples: of the test set, for both accuracies.
        seed: of splits, data order and noise.
    """

    steps: int = 24
    directions: int = 8
    batch_size: int = 16
    lr: float = 0.15
    eps: float = 1e-2
    clip_threshold: float = 1.0
    first_layer: int = 15
    last_layer: int = 21
    examples: int = 200
    seed: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what --out lacks, and write it there; 0, or 2 and one line on stderr."""
    parser = Parser(
        prog="python -m bench.studies.formats", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it holds already is not run again")
    parser.add_argument("--formats", help=f"comma-separated; default all: {', '.join(NAMES)}")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of QZO, 2 or more")
    parser.add_argument("--examples", type=int, default=Settings.examples, help="of the test set")
    parser.add_argument("--threads", type=int, help="of PyTorch; default all cores")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        names = NAMES if options.formats is None else tuple(options.formats.split(","))
        for name in names:
            choose("format", name, NAMES)
        if options.steps < 2 or options.examples < 1:
            raise QzoError(f"steps={options.steps}, examples={options.examples}; give at least 2 steps and 1 example")
        if options.threads:
            torch.set_num_threads(options.threads)
        settings = Settings(steps=options.steps, examples=options.examples)
        for name in names:
            if not _has(options.out, name, settings):
                log.info("%s", name)
                add(options.out, _entry(name, settings), settings)
    except (QzoError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _entry(name: str, settings: Settings) -> dict[str, Any]:
    """What `measure` finds; the reason instead, where the format's library is missing."""
    try:
        return measure(name, settings)
    except (QzoError, ImportError) as error:
        log.warning("%s: %s", name, error)
        return {"format": name, "missing": " ".join(str(error).split())}


def measure(name: str, settings: Settings, model_name: str = MODEL, task_name: str = TASK) -> dict[str, Any]:
    """The entry of one format. Raises QzoError without a GGUF, and for sizes that do not fit."""
    started = time.monotonic()
    file = str(gguf_source(model_name).weights)
    model, about = prepare(name, file, settings.seed)
    task = tasks.get(task_name)
    splits, encoder = task.splits(seed=settings.seed), tasks.Encoder(task, load_tokenizer(file))
    entry = {"format": name, "quantization": about, **sizes(model)}
    examples = splits["test"][: settings.examples]
    before = tasks.evaluate(model, encoder, examples)
    learned = train(model, encoder, splits["train"], settings)
    scores = {"before": _shown(before), "after": _shown(tasks.evaluate(model, encoder, examples))}
    if name == STRAIGHT:
        scores["read back"] = _shown(tasks.evaluate(exported(model, file), encoder, examples))
    machine = {**environment(), "threads": torch.get_num_threads()}
    return {**entry, **learned, **scores, "seconds": round(time.monotonic() - started, 1), "environment": machine}


def prepare(name: str, file: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """The model in fp32, quantized to a format, and what a record says of that."""
    if name == STRAIGHT:
        return load(file, torch.float32, dequantize=False), {"format": "gguf", "bits": 4, "group_size": 32}
    model: Any = load(file, torch.float32)
    about = quantize_as(model, name, seed=seed)
    return model.eval(), about


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes and weights of all quantized layers, tables included, and the number of their scales."""
    parts = quantized_bytes(model)
    count = parts.pop("scale_count")
    layers = list(quantized_layers(model).values())
    weights = sum(_weights(layer) for layer in layers)
    return {"layers": len(layers), "weights": weights, "quantized_bytes": sum(parts.values()), "scales": count}


def _weights(layer: Any) -> int:
    if hasattr(layer, "num_embeddings"):
        return int(layer.num_embeddings * layer.embedding_dim)
    return int(layer.out_features * layer.in_features)


def train(model: Any, encoder: Any, examples: Sequence[Any], settings: Settings) -> dict[str, Any]:
    """Take the steps as `qzo train` does: offsets follow their scales, and what lies below is computed once a batch.

    Returns losses, median seconds of a step, and the allocated peak in bytes of the second one, which is not timed.
    """
    scales = qzo.scales(model, (settings.first_layer, settings.last_layer))
    optimizer = qzo.QZO(
        [scale_group(model, scales)], settings.lr, settings.eps, settings.clip_threshold, settings.seed,
        relative=True, directions=settings.directions, estimator="one-sided",
    )  # fmt: skip
    loss = SharedPrefix(model, lambda batch: tasks.loss(model, batch), settings.first_layer)
    known = [encoder.length(example) for example in examples], [example.label for example in examples]
    losses, seconds, peak = [], [], 0
    for step in range(settings.steps):
        numbers = batch_numbers(*known, settings.batch_size, settings.seed, step)
        closure = partial(loss, encoder.batch([examples[number] for number in numbers]))
        started = time.perf_counter()
        if step == WATCHED_STEP:
            value, peak = watched(model, optimizer, closure)
        else:
            value = float(optimizer.step(closure))
            seconds.append(time.perf_counter() - started)
        losses.append(round(value, 4))
    found = {"step_seconds": round(statistics.median(seconds), 4), "peak_allocated_bytes": peak}
    return {**found, "trained_scales": sum(scale.numel() for scale in scales.values()), "losses": losses}


def exported(model: Any, file: str) -> Any:
    """What transformers reads, dequantized to fp32, from the trained model's GGUF file."""
    tuned = {f"{name.removesuffix('scales')}offsets": offset for name, offset in offsets(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "tuned"
        write_tuned(file, {**qzo.scales(model), **tuned}, target)
        return load(target / Path(file).name, torch.float32).eval()


def watched(model: nn.Module, optimizer: torch.optim.Optimizer, closure: Any) -> tuple[float, int]:
    """Loss and allocated peak of a step, model and optimizer state included, by the ledger; bytes."""
    held = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    with Ledger("cpu") as ledger:
        for tensor in (*model.parameters(), *model.buffers(), *held):
            ledger.see(tensor)
        value = float(optimizer.step(closure))
    return value, ledger.peak_bytes()


def _shown(result: dict[str, Any]) -> dict[str, Any]:
    return {"accuracy": result["accuracy"], "loss": round(result["loss"], 4), "count": result["count"]}


def add(file: Path, entry: dict[str, Any], settings: Settings) -> None:
    """Put an entry into the record, in place of one of the same format; entries of other settings are dropped."""
    old = _read(file)
    kept = [one for one in old.get("entries", []) if one["format"] != entry["format"]]
    if old.get("settings") != asdict(settings):
        kept = []
    entries = sorted([*kept, entry], key=lambda one: NAMES.index(one["format"]))
    record = {"model": MODEL, "task": TASK, "settings": asdict(settings), "entries": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8-sig"))) if file.exists() else {}


def _has(file: Path, name: str, settings: Settings) -> bool:
    """Whether the record holds this format with these settings; a format that was missing is tried again."""
    record = _read(file)
    entries = record.get("entries", []) if record.get("settings") == asdict(settings) else []
    return any(entry["format"] == name and "missing" not in entry for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
