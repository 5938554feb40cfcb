"""A small training with QZOTrainer that is killed and resumed: checkpoints, journal, best model, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import standin
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainingArguments

from qzo import QZOTrainer, load

DATA = standin.Task().splits()
OPTIONS: dict[str, Any] = {
    "learning_rate": 5e-3,
    "max_steps": 5,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "lr_scheduler_type": "cosine",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


def dataset(split: str, count: int = 16) -> list[dict[str, Any]]:
    """Rows of one length, as a dataset."""
    batch = standin.Objective(None, None).batch(DATA[split][:count])
    return [{name: tensor[number] for name, tensor in batch.items()} for number in range(count)]


def make(model: Path, folder: Path, **more: Any) -> QZOTrainer:
    """A trainer whose checkpoints and journal are in `folder`."""
    return QZOTrainer(
        load(model),
        TrainingArguments(str(folder / "out"), **{**OPTIONS, **more}),
        train_dataset=dataset("train"),
        eval_dataset=dataset("validation"),
        callbacks=[EarlyStoppingCallback(2)],
        journal=folder / "run.journal",
    )


def live(model: Path, folder: Path, **more: Any) -> None:
    """From wherever `folder` stands to the end, and the model written to `folder`/tuned and over `folder`/out."""
    trainer = make(model, folder, **more)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "tuned"))
    trainer.save_model(str(folder / "out"))


def ends(folder: Path) -> dict[str, bytes]:
    """What must be the same after any number of lives: journal, models, the last checkpoint's scales and masters."""
    places = ["run.journal", "tuned/model.safetensors", "tuned/config.json", "out/model.safetensors", "out/config.json"]
    last = max((folder / "out").glob("checkpoint-*"), key=lambda place: int(place.name.rpartition("-")[2]))
    files = [folder / place for place in places] + [last / "optimizer.pt"]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    trained = load_file(last / "trained.safetensors")  # its metadata are written in no order
    return found | {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in trained.items()}


def left_over(folder: Path) -> list[str]:
    """Hidden files and folders, which nobody needs once a run is through."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))
