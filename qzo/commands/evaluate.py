"""`qzo eval MODEL --task T`: the score of a model on a task, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qzo.errors import QzoError, printable
from qzo.output import check_output, write_output
from qzo.training.settings import DTYPES

SIZES = {"train": 1000, "validation": 500, "test": 1000}  # as in the papers
PERCENT = ("accuracy", "f1", "em")


def add_command(commands: Any) -> None:
    """Add `eval` to the subcommands of a parser."""
    parser = commands.add_parser("eval", help="score a model on a task, by prompts and label words")
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id; of a run, its best state")
    parser.add_argument("--base", metavar="MODEL", help="of a run: where its model lies now, if that moved")
    parser.add_argument(
        "--task", required=True, help="sst2, rte, cb, boolq, wic, copa, multirc, squad, rotten-tomatoes"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with TASK/train.jsonl and validation.jsonl")
    parser.add_argument("--split", choices=tuple(SIZES), default="test", help="which examples (default test)")
    parser.add_argument("--samples", type=int, metavar="N", help="examples, default 1000, or 500 of validation")
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default 0)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples run together (default 16)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens a row; longer texts are cut at the beginning; default: the model's positions",
    )
    parser.add_argument("--calibrated", action="store_true", help="subtract the label words' prior on training texts")
    parser.add_argument("--device", default="cpu", help="where to run (default cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="of unquantized tensors (default: as load chooses)")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Evaluate, print the table, write the JSON file."""
    import torch

    from qzo import tasks
    from qzo.checkpoints.load import load, load_tokenizer
    from qzo.models.positions import row_length
    from qzo.training.tuned import is_tuned, read_tuned

    _check(options)
    tuned = read_tuned(Path(options.model), model=options.base) if is_tuned(Path(options.model)) else None
    if options.base and tuned is None:
        raise QzoError(f"--base is for a run whose model moved, and {options.model} is a model; leave it out")
    task = tasks.get(options.task, options.data)
    if options.calibrated and not task.words:
        raise QzoError(f"--calibrated needs a task with label words; {task.name} has none")
    splits = _splits(task, options)  # before the model: wrong data costs no time
    tokenizer = load_tokenizer(tuned.model if tuned else options.model)
    if options.max_length is not None:  # what is too short is told before the model is loaded
        tasks.Encoder(task, tokenizer, options.max_length).cut(splits[options.split])
    dtype = getattr(torch, options.dtype) if options.dtype else None
    device = _device(options.device)
    model: Any = tuned.load(dtype, device) if tuned else load(options.model, dtype, device)
    encoder = tasks.Encoder(task, tokenizer, row_length(model, options.max_length, options.model))
    cut = encoder.cut(splits[options.split])
    prior = tasks.label_prior(model, encoder, splits["train"], options.batch_size) if options.calibrated else None
    result = tasks.evaluate(model, encoder, splits[options.split], options.batch_size, prior)
    named = {name: getattr(options, name) for name in ("model", "task", "split", "seed")}
    record = {**named, "max_length": encoder.max_length, "cut": cut, "metric": task.metric, "prior": prior, **result}
    print(_table(record))
    if options.json:
        write_output(options.json, json.dumps(record, indent=2) + "\n")


def _check(options: argparse.Namespace) -> None:
    for name in ("samples", "batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise QzoError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.json:
        check_output(options.json)


def _device(name: str) -> Any:
    """A device that is there. Raises QzoError for others."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # PyTorch has no kind of its own for it
        raise QzoError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def _splits(task: Any, options: argparse.Namespace) -> dict[str, list[Any]]:
    """The usual splits; a part of the one asked for where fewer samples are wanted, a larger draw where more are."""
    samples = options.samples or SIZES[options.split]
    sizes = {**SIZES, options.split: max(samples, SIZES[options.split])}
    splits = task.splits(options.seed, **sizes)
    return {**splits, options.split: splits[options.split][:samples]}


def _table(record: dict[str, Any]) -> str:
    lines = {"model": record["model"], "task": f"{record['task']}, {record['split']} split, seed {record['seed']}"}
    lines["examples"] = f"{record['count']:,}"
    if record["cut"]:
        lines["cut"] = (
            f"{record['cut']:,} prompts, longer than {record['max_length']} tokens: their texts at the beginning, "
            "questions and answers are whole"
        )
    scores = [record["metric"], *(name for name in PERCENT if name in record and name != record["metric"])]
    lines |= {name: f"{100 * record[name]:.1f} %" for name in scores}
    lines["loss"] = f"{record['loss']:.4f}"
    lines["predictions"] = ", ".join(f"{word} {count:,}" for word, count in record["predictions"].items())
    if record["prior"] is not None:
        lines["prior"] = " ".join(f"{value:.3f}" for value in record["prior"]) + " (log-probabilities, subtracted)"
    return "\n".join(printable(f"{name:<12} {value}") for name, value in lines.items())
