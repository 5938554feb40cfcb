"""Training a model on a task: what `qzo train` does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo.checkpoints.load import load, load_tokenizer
from qzo.durable import read_tensors, replace_file
from qzo.errors import QzoError
from qzo.live.check import check_live
from qzo.live.trainable import live_named
from qzo.models.prefix import SharedPrefix
from qzo.training.batches import batch_numbers
from qzo.training.learners import check_model, make_learner
from qzo.training.loop import Trained, train
from qzo.training.progress import Progress
from qzo.training.run import BEST, Result, Run, check_folder, dtype_of
from qzo.training.settings import QUANTIZED, TrainSettings

RESULT = "result.json"


def train_task(
    source: str,
    task_name: str,
    settings: TrainSettings,
    out: str | os.PathLike[str],
    data: str | None = None,
    resume: bool = False,
) -> tuple[Trained, Result]:
    """Train a model on a task and test its best state; returns how training ended, and the result of the test.

    `out` then holds the run (see `qzo.training.run`) and `result.json`, both of what is returned.

    Args:
        source: of the model, as in `qzo.load`; quantized for qzo and qlora, which take a .gguf file packed.
        task_name: of `qzo.tasks`; its examples are split by `settings.seed`.
        settings: how.
        out: folder of the run, new or empty, or with `resume` one to go on with.
        data: folder of the task's files, None for where the task has them from.
        resume: go on where the run ended.

    Raises QzoError for wrong input, losses that are not finite, and a full disk; what is on disk can be resumed.
    """
    tasks: Any = import_module("qzo.tasks")
    out = Path(out)
    about = {"model": _place(source), "task": task_name, "data": data if data is None else _place(data)}
    check_folder(out, settings, about, resume)
    task = tasks.get(task_name, data_dir=data)
    splits = task.splits(seed=settings.seed)
    packed = settings.method in QUANTIZED
    model: Any = load(source, dtype_of(asdict(settings)), _device(), dequantize=not packed).eval()
    check_model(model, settings, source)
    encoder = tasks.Encoder(task, load_tokenizer(source), max_length=256)
    device, examples = next(model.parameters()).device, splits["train"]
    known = [encoder.length(example) for example in examples], [example.label for example in examples]

    def batch_at(step: int) -> Any:
        numbers = batch_numbers(*known, settings.batch_size, settings.seed, step)
        return encoder.batch([examples[number] for number in numbers]).to(device)

    def evaluate(split: str = "validation") -> Result:
        return dict(tasks.evaluate(model, encoder, splits[split], batch_size=settings.batch_size))

    def loss(batch: Any) -> torch.Tensor:
        value: torch.Tensor = tasks.loss(model, batch, settings.centering)
        return value

    first = (settings.layer_range or (0, 0))[0]
    run = Run(out, settings, about, task.metric, resume)
    trained = _run(model, source, run, batch_at, SharedPrefix(model, loss, first) if first else loss, evaluate)
    put_best(model, out)
    test = evaluate("test")
    content = json.dumps({**asdict(trained), "test": test}, indent=2) + "\n"
    replace_file(out / RESULT, lambda path: path.write_text(content, encoding="utf-8"))
    return trained, test


def _run(model: nn.Module, source: str, run: Run, batch_at: Any, loss: Any, evaluate: Any) -> Trained:
    """Make what the loop needs, and release it whatever happens."""
    try:
        learner = make_learner(model, run.settings, run.folder, source)
        progress = Progress(run.settings.steps, learner.steps, learner.slope_name, run.folder)
        for notice in learner.notices:
            progress.notice(notice)
        try:
            if run.settings.method == "qzo" and learner.steps < run.settings.steps:
                first = batch_at(learner.steps)
                check_live(model, lambda: loss(first), run.settings.seed, run.settings.layer_range)
            return train(learner, run, batch_at, loss, evaluate, progress)
        except KeyboardInterrupt as error:
            raise QzoError(f"stopped after {learner.steps} steps; go on with --resume") from error
        finally:
            progress.close()
            learner.close()
    finally:
        run.close()


@torch.no_grad()
def put_best(model: nn.Module, folder: Path) -> None:
    """Write the best state of a run into the model it was trained on."""
    own = live_named(model)
    for name, value in read_tensors(folder / BEST)[0].items():
        own[name].copy_(value)


def _place(source: str) -> str:
    """A path made absolute; a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
