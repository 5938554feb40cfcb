"""A training run that is killed with SIGKILL again and again: `python training_lives.py FOLDER LIVES METHOD`.

The parent first trains without a kill in FOLDER/whole, then forks a child for each life of FOLDER/run; each but the
last kills itself at a random one of the moments where a run touches data or disk. The tensors that both end with are
in FOLDER/whole.pt and FOLDER/run.pt.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
from pathlib import Path

import torch
from tiny import Tiny
from torch import nn

from qzo.training.batches import batch_numbers
from qzo.training.learners import make_learner
from qzo.training.loop import train
from qzo.training.run import Run
from qzo.training.settings import TrainSettings

SETTINGS = {
    "qzo": TrainSettings(
        "qzo", steps=40, lr=1e-5, eval_every=7, scheduler="cosine", directions=2, update="adam", seed=2
    ),
    "ft": TrainSettings("ft", steps=40, lr=1e-2, eval_every=4, scheduler="linear", seed=2),
}
MOST = 60  # moments that a life may see before it dies; a step has five


def plain() -> Tiny:
    """The same network without quantized layers."""
    model = Tiny()
    for name in ("first", "second"):
        layer = nn.Linear(64, 64, bias=False)
        layer.weight.data = getattr(model, name).dequantize()
        setattr(model, name, layer)
    return model


class Life:
    """Counts moments and dies at the one given."""

    def __init__(self, last: int | None) -> None:
        self.left = last

    def moment(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left = None if self.left is None else self.left - 1

    def around(self, owner: object, name: str) -> None:
        """Make the moments before and after a method is called dangerous."""
        method = getattr(owner, name)

        def call(*arguments, **named):
            self.moment()
            result = method(*arguments, **named)
            self.moment()
            return result

        setattr(owner, name, call)


def live(folder: Path, method: str, last: int | None = None) -> dict[str, torch.Tensor]:
    """Train from wherever the folder stands; returns the trained tensors."""
    life, settings = Life(last), SETTINGS[method]
    model = Tiny(torch.float16) if method == "qzo" else plain()
    model.x = model.x.float() if method == "ft" else model.x
    run = Run(folder, settings, {"model": "tiny"}, "accuracy", resume=True)
    learner = make_learner(model, settings, folder)
    for owner, name in ((run, "write"), (learner, "record"), (run, "add_validation")):
        life.around(owner, name)

    def evaluate():
        life.moment()
        logits, y = model(model.x[63]), model.y[63]
        loss = nn.functional.cross_entropy(logits.float(), y)
        return {"accuracy": float((logits.argmax(-1) == y).float().mean()), "loss": float(loss)}

    def batch_at(step):
        life.moment()
        return batch_numbers([1] * 63, [0] * 63, 1, settings.seed, step)[0], math.nan if step == 3 else 1.0

    trained = train(learner, run, batch_at, lambda batch: model.loss(batch[0]) * batch[1], evaluate)
    learner.close()
    run.close()
    assert (trained.steps, trained.skipped) == (settings.steps, 1)
    return {name: tensor.clone() for name, tensor in learner.tensors().items()}


def main(folder: Path, lives: int, method: str) -> None:
    dice = random.Random(method)
    torch.save(live(folder / "whole", method), folder / "whole.pt")  # what PyTorch imports late is now imported, once
    for number in range(lives):
        child = os.fork()
        if child == 0:
            tensors = live(folder / "run", method, dice.randrange(MOST) if number < lives - 1 else None)
            torch.save(tensors, folder / "run.pt")
            os._exit(0)
        dice.randrange(MOST)  # as the child did
        _, status = os.waitpid(child, 0)
        print(number, "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
        if not os.WIFSIGNALED(status):
            break


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
