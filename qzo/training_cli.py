"""The commands `qzo train MODEL --task T` and `qzo export RUN OUT`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qzo.training_settings import DTYPES, METHODS, SCHEDULERS, UPDATES, TrainSettings


def add_commands(commands: Any) -> None:
    """Put both commands into the parser's."""
    _add_train(commands)
    export = commands.add_parser("export", help="write a tuned model in the checkpoint format it came in")
    export.add_argument("source", metavar="RUN", help="folder of qzo train, checkpoint of QZOTrainer, or a model")
    export.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    export.add_argument("--state", choices=("best", "last"), default="best", help="of a run (default best)")
    export.set_defaults(run=_export)


def _add_train(commands: Any) -> None:
    default = TrainSettings()
    train = commands.add_parser("train", help="fine-tune a model on a task")
    train.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id; quantized for qzo and qlora")
    train.add_argument("--task", required=True, help="name of the task, e.g. rotten-tomatoes")
    train.add_argument("--method", choices=METHODS, default=default.method, help="default qzo")
    train.add_argument("--data", metavar="DIR", help="folder with the task's JSONL files")
    train.add_argument("--out", metavar="DIR", help="folder of the run (default results/train/TASK-METHOD-SEED)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, to the bit")
    options = {
        "steps": (int, "steps in all"),
        "batch_size": (int, "examples a step"),
        "lr": (float, "learning rate; the default is the method's, for qzo 1e-7 as for 7B: small models need more"),
        "eps": (float, "step of the finite difference"),
        "clip_threshold": (float, "bound of d, inf for none; default 100 for qzo"),
        "directions": (int, "random directions a step"),
        "eval_every": (int, "steps between validations"),
        "patience": (int, "validations without a new best before training stops; default: never"),
        "seed": (int, "of data order, split and z"),
    }
    for name, (kind, text) in options.items():
        shown = "" if "default" in text else f" (default {getattr(default, name)})"
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text + shown)
    train.add_argument("--layers", metavar="FIRST-LAST", help="train these decoder layers only, e.g. 14-24")
    train.add_argument("--relative", action="store_true", help="eps and lr relative to each scale")
    train.add_argument("--update", choices=tuple(UPDATES), default=default.update, help="default sgd")
    train.add_argument("--scheduler", choices=SCHEDULERS, default=default.scheduler, help="default constant")
    train.add_argument("--dtype", choices=DTYPES, help="of unquantized tensors (default: as load chooses, fp32 for ft)")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    names = TrainSettings.__dataclass_fields__
    settings = TrainSettings(**{name: value for name, value in vars(options).items() if name in names})
    from qzo.training_task import train_task

    out = options.out or Path("results/train") / f"{options.task}-{settings.method}-{settings.seed}"
    trained, test = train_task(options.model, options.task, settings, out, options.data, options.resume)
    early = ", stopped early" if trained.stopped_early else ""
    print(f"steps        {trained.steps:>12,}{early}\nskipped      {trained.skipped:>12,}")
    print(f"best step    {trained.best_step:>12,}")
    for name, value in test.items():
        if isinstance(value, float):  # not counts, nor what the task tells beside
            print(f"{name:<12} {trained.best[name]:>12.4f} validation {value:>12.4f} test")
    print(f"{out} holds the run; qzo export {out} OUT writes the model")


def _export(options: argparse.Namespace) -> None:
    from qzo.export import export

    count = export(options.source, options.out, options.state)
    print(f"{options.out}: {count} tuned tensors written, all else as it came")
