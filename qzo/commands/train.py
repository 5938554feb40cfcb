"""`qzo train MODEL --data FILE` or `--task T`: fine-tune a model, into the folder of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qzo.commands import data
from qzo.commands.moved import add_moved, check_moved
from qzo.errors import printable, required
from qzo.optim.estimator import NOISE, SIDES
from qzo.training.presets import PRESETS, usual_preset
from qzo.training.settings import AUTO, DTYPES, METHODS, SCHEDULERS, UPDATES, TrainSettings


def _number(text: str) -> float | str:
    return text if text == AUTO else float(text)


def _count(text: str) -> int | str:
    return text if text == AUTO else int(text)


_number.__name__, _count.__name__ = "number", "int"  # what argparse calls them
Option = tuple[Any, str]  # type, choices, or bool for a flag; help
OPTIONS: dict[str, dict[str, Option]] = {
    "how long": {
        "steps": (int, "steps in all; default 200 with --preset auto, else 1000"),
        "batch_size": (_count, "examples a step; auto: 4 to 16, as long as rows are"),
        "max_length": (int, "tokens a row; longer texts are cut at the beginning; default: the model's positions"),
        "eval_batch_size": (int, "examples that a validation runs together"),
        "eval_every": (int, "steps between validations; default 20 with --preset auto, else 100"),
        "patience": (int, "validations without a new best before training stops; default: never"),
        "seed": (int, "of data order, split and z"),
    },
    "update": {
        "lr": (_number, "learning rate; auto: measured before the first step, and halved where losses rise"),
        "scheduler": (SCHEDULERS, "of the learning rate"),
        "update": (tuple(UPDATES), "rule, qzo only"),
        "dtype": (DTYPES, "of unquantized tensors; default: as load chooses, float32 for ft"),
    },
    "measuring the loss without gradients (qzo, mezo)": {
        "eps": (_number, "step of the finite difference; auto: measured, as lr"),
        "relative": (bool, "eps and lr relative to each scale"),
        "clip_threshold": (_number, "bound of d, inf for none; auto: three times the d of the first batch"),
        "directions": (int, "random directions a step"),
        "estimator": (SIDES, "losses on both sides of each direction, on one and a common one, or on one among others"),
        "normalize": (bool, "divide d by the spread of the losses over the directions"),
        "noise": (tuple(NOISE), "where random directions come from; philox: the same on every device"),
        "centering": (float, "share of the label words' mean over the batch that is left out of the loss"),
        "layers": (str, "train these decoder layers only, FIRST-LAST, e.g. 14-24; auto: as the kind of data suits"),
    },
}


def add_command(commands: Any) -> None:
    """Add `train` to the subcommands of a parser."""
    default = TrainSettings()
    parser = commands.add_parser("train", help="fine-tune a model on a task")
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file, hub id or run; quantized for qzo and qlora")
    add_moved(parser)
    parser.add_argument("--method", choices=METHODS, default=argparse.SUPPRESS, help="default qzo")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default=argparse.SUPPRESS,
        help="what is not given by an option: auto, the default of qzo, measures it and needs no expert; reward is "
        "the default with --reward; paper has the method's own, for qzo those of arXiv 2505.13430 for 7B models",
    )
    data.add_options(parser)
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default results/train/TASK-METHOD-SEED)")
    parser.add_argument("--device", help="where to train (default: the GPU if there is one)")
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="send numbers and settings, no data, to this project of Weights & Biases"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (known, text) in options.items():
            value = getattr(default, name)
            shown = "" if value is None or "default" in text else f" (default {value})"
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if known is bool else {"type": known}
            if isinstance(known, tuple):
                kind = {"choices": known}
            group.add_argument(
                f"--{name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                help=text + ("" if known is bool else shown),
                **kind,
            )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, and print how the run ended and what the test gave."""
    names = TrainSettings.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in names}
    from qzo.regular import is_there
    from qzo.training.run import RUN, begun_with, read_run
    from qzo.training.task import train_task
    from qzo.training.together import together
    from qzo.training.tuned.state import is_tuned

    check_moved(options.moved, Path(options.model), is_tuned(Path(options.model)))
    if options.wandb is not None:
        required("wandb", "wandb")  # before anything that takes long
    name = options.task or Path(options.data or "").name
    usual = f"{name}-{given.get('method', 'qzo')}-{given.get('seed', 0)}"
    asked = Path(options.out or Path("results/train") / usual)
    before = begun_with(asked) if options.resume else {}
    method = str(given.get("method", before.get("method", TrainSettings.method)))
    with together(asked, options.resume, method) as (out, resume, ranks):
        if resume and options.out and is_there(out / RUN):
            data.take_over(options, read_run(out))
        own = data.own_data(options)
        begun = begun_with(out) if resume else {}  # what is not given by an option is as it was
        method = str(given.get("method", begun.get("method", TrainSettings.method)))
        begun = begun if begun.get("method", method) == method else {}
        preset = given.get("preset") or begun.get("preset") or usual_preset(method, bool(options.reward))
        settings = TrainSettings(**{**PRESETS[preset], **begun, **given, "method": method, "preset": preset})
        device = None if options.device is None else str(data.device(options.device))
        folder, wandb = None if own else options.data, None if ranks and ranks.rank else options.wandb
        trained, test = train_task(
            options.model, options.task, settings, out, folder, resume, own, device, wandb, options.moved, ranks
        )
        early = ", stopped early" if trained.stopped_early else ""
        print(f"steps        {trained.steps:>12,}{early}\nskipped      {trained.skipped:>12,}")
        print(f"best step    {trained.best_step:>12,}")
        print(_scores(trained, test))
        print(printable(f"{out} holds the run; qzo export {out} OUT writes the model"))


def _scores(trained: Any, test: dict[str, Any]) -> str:
    """A line a score: before training and in the best state, of validation and, where there is one, of the test."""
    results = [trained.first, trained.best, *((trained.first_test, test) if test else ())]
    lines = [_row("", ["", "validation", *(("", "test") if test else ())])]
    lines.append(_row("", ["before", "best"] * (len(results) // 2)))
    for name in dict.fromkeys((*trained.best, *test)):
        values = [result.get(name) for result in results]
        if any(isinstance(value, float) for value in values):  # not counts, nor what the task tells beside
            lines.append(_row(name, [f"{value:.4f}" if isinstance(value, float) else "" for value in values]))
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return "".join([f"{name:<13}", *(f" {cell:>12}" for cell in cells)]).rstrip()
