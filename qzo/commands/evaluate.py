"""`qzo eval MODEL --data FILE` or `--task T`: the score of a model, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qzo.commands import data
from qzo.commands.moved import add_moved, check_moved
from qzo.errors import QzoError, printable
from qzo.output import check_output, write_output
from qzo.training.settings import DTYPES

SIZES = {"train": 1000, "validation": 500, "test": 1000}  # as in the papers
PERCENT = ("accuracy", "f1", "em", "macro_f1", "exact_match")
NUMBERS = ("reward", "greedy_reward", "spread", "ended", "tokens", "loss", "perplexity", "margin")
MOST_LABELS = 12  # of a confusion matrix that is shown


def add_command(commands: Any) -> None:
    """Add `eval` to the subcommands of a parser."""
    parser = commands.add_parser("eval", help="score a model on a task, or on data of your own")
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id; of a run, its best state")
    add_moved(parser)
    data.add_options(parser)
    parser.add_argument("--split", choices=tuple(SIZES), help="which examples (default test, else validation)")
    parser.add_argument("--samples", type=int, metavar="N", help="examples, default 1000, or 500 of validation")
    parser.add_argument("--seed", type=int, help="of the splits (default 0, of a run its own)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples run together (default 16)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens a row; longer texts are cut at the beginning; default: the model's positions, of a run its own",
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
    from qzo.training.tuned.state import is_tuned, read_tuned

    _check(options)
    source = Path(options.model)
    check_moved(options.moved, source, is_tuned(source))
    tuned = read_tuned(source, model=options.moved) if is_tuned(source) else None
    task, splits = _task(options)  # before the model: wrong data costs no time
    if options.calibrated and not task.words:
        raise QzoError(f"--calibrated needs a task with label words; {task.name} has none: leave it out")
    objective: Any = tasks.objective(task, load_tokenizer(tuned.model if tuned else options.model), options.max_length)
    objective.rows(splits[options.split])  # what is too short is told before the model is loaded
    dtype = getattr(torch, options.dtype) if options.dtype else None
    device = data.device(options.device)
    model: Any = tuned.load(dtype, device) if tuned else load(options.model, dtype, device)
    objective = objective.fitted(row_length(model, options.max_length, options.model))
    rows, encoder, prior = objective.rows(splits[options.split]), objective.encoder, None
    if options.calibrated:
        prior = tasks.label_prior(model, encoder, splits["train"], options.batch_size)
        result = tasks.evaluate(model, encoder, rows, options.batch_size, prior)
    else:
        result = objective.evaluate(model, rows, options.batch_size, last=True)
    record: dict[str, Any] = {"model": options.model, "task": task.name, "split": options.split, "seed": options.seed}
    record |= {"max_length": encoder.max_length, "cut": encoder.cut(splits[options.split])}
    record |= {"metric": task.metric, "prior": prior, **result}
    print(_table(record, objective.cuts))
    if options.json:
        write_output(options.json, json.dumps(record, indent=2) + "\n")


def _task(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The task that was asked for, or the one of a run, and its splits; `options` get the run's settings."""
    from qzo import tasks
    from qzo.regular import is_there
    from qzo.training.own import SOURCE, OwnData, fingerprint
    from qzo.training.run import RUN, read_run
    from qzo.training.telemetry.progress import tell

    about: dict[str, Any] = {}
    if options.task is None and options.data is None and is_there(Path(options.model) / RUN):
        about = read_run(Path(options.model))
        options.task, options.data = about.get("task"), None if about.get("task") is None else about.get("data")
        settings = about["settings"]
        options.seed = settings.get("seed", 0) if options.seed is None else options.seed
        options.max_length = options.max_length or settings.get("max_length")
    options.seed = options.seed or 0
    own = OwnData.of_run(about) or (None if options.task else data.own_data(options))
    if own is not None and own.reward is not None and about:
        reward = replace(own.reward, keep_weights=bool(options.keep_weights))
        own = replace(own, reward=reward)
        if reward.scorer.digest != about.get(SOURCE):
            tell(f"notice: the file of {reward.scorer.name} has changed since {options.model} was trained")
    if options.task:
        data.own_data(options)  # options that are for others
    task: Any = tasks.from_data(**own.options()) if own else tasks.get(options.task, options.data)
    if own is None:
        options.split = options.split or "test"
        return task, _splits(task, options)
    splits = task.splits(options.seed)
    if about.get("rows") not in (None, fingerprint(splits)) and options.seed == about["settings"].get("seed", 0):
        raise QzoError(f"{own.data} has other rows than {options.model} was trained on; name the data by --data")
    options.split = options.split or ("test" if "test" in splits else "validation")
    if options.split not in splits:
        raise QzoError(f"there is no {options.split} split of {own.data}; choose {' or '.join(splits)}")
    return task, {**splits, options.split: splits[options.split][: options.samples]}


def _check(options: argparse.Namespace) -> None:
    for name in ("samples", "batch_size", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise QzoError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if options.json:
        check_output(options.json)


def _splits(task: Any, options: argparse.Namespace) -> dict[str, list[Any]]:
    """The usual splits; a part of the one asked for where fewer samples are wanted, a larger draw where more are."""
    samples = options.samples or SIZES[options.split]
    sizes = {**SIZES, options.split: max(samples, SIZES[options.split])}
    splits = task.splits(options.seed, **sizes)
    return {**splits, options.split: splits[options.split][:samples]}


def _table(record: dict[str, Any], cuts: tuple[str, str]) -> str:
    lines = {"model": record["model"], "task": f"{record['task']}, {record['split']} split, seed {record['seed']}"}
    lines["examples"] = f"{record['count']:,}"
    if record["cut"]:
        lines["cut"] = f"{record['cut']:,} {cuts[0]}, longer than {record['max_length']} tokens: {cuts[1]}"
    scores = [record["metric"], *(name for name in PERCENT if name in record and name != record["metric"])]
    lines |= {name: f"{100 * record[name]:.1f} %" for name in scores if name not in NUMBERS}
    lines |= {name: f"{record[name]:.4f}" for name in NUMBERS if name in record}
    if "predictions" in record:
        lines["predictions"] = ", ".join(f"{word} {count:,}" for word, count in record["predictions"].items())
    if record["prior"] is not None:
        lines["prior"] = " ".join(f"{value:.3f}" for value in record["prior"]) + " (log-probabilities, subtracted)"
    table = [f"{name:<12} {value}" for name, value in lines.items()]
    return "\n".join(map(printable, [*table, *_confusion(record.get("confusion", {}))]))


def _confusion(counts: dict[str, dict[str, int]]) -> list[str]:
    """What was taken for what, of at most 12 labels, a line a label."""
    if not 0 < len(counts) <= MOST_LABELS:
        return []
    return [
        f"{'labelled' if number == 0 else '':<12} {label}: "
        + (", ".join(f"{guess} {count:,}" for guess, count in guesses.items()) or "none")
        for number, (label, guesses) in enumerate(counts.items())
    ]
