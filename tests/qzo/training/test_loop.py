"""The training loop: kills, order of the data, the best state, learning rates, losses that are not finite."""

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import standin
import torch
from standin import metrics, same

import qzo
from qzo import QzoError
from qzo.durable import read_tensors
from qzo.errors import NotFinite
from qzo.journal import lines as journal_lines
from qzo.training.batches import batch_numbers
from qzo.training.learners import make_learner
from qzo.training.loop import train
from qzo.training.run import Run
from qzo.training.settings import TrainSettings

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("method", ["qzo", "ft"])
def test_a_run_killed_again_and_again_ends_as_one_never_stopped(tmp_path, method):
    command = [sys.executable, str(HELPERS / "training_lives.py"), str(tmp_path), "40", method]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lives = done.stdout.splitlines()
    assert lives[-1].endswith("exit 0") and sum(line.endswith("killed") for line in lives) >= 5
    assert same(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "run.pt"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    assert same(*(read_tensors(tmp_path / name / "best.safetensors")[0] for name in ("whole", "run")))
    assert [entry["step"] for entry in metrics(tmp_path / "run") if "loss" in entry] == list(range(1, 41))


class Scripted:
    """A learner of one number, which counts steps."""

    slope_name, skipped, optimizer = "d", 0, torch.optim.SGD([torch.zeros(1)], lr=1.0)

    def __init__(self):
        self.steps = 0

    def tensors(self):
        return {"steps": torch.tensor([float(self.steps)])}

    def mark(self):
        return {}

    def step(self, loss, lr):
        self.steps += 1
        return types.SimpleNamespace(loss=loss(), slope=lr, clipped=False, skipped=False)

    def record(self, save):
        pass


@pytest.mark.parametrize(
    ("metric", "accuracies", "losses", "best", "steps"),
    [
        ("accuracy", [0.5, 0.7, 0.6, 0.65, 0.9], [1, 1, 1, 1, 1], 2, 6),
        ("accuracy", [0.5, 0.7, 0.7, 0.7, 0.7], [1, 1, 0.9, 0.9, 0.95], 4, 8),
        ("accuracy", [0.5, math.nan, 0.4, 0.3, 0.2], [1, math.nan, 1, 1, 1], 0, 4),
        ("loss", [0.9, 0.5, 0.5, 0.5, 0.5], [1, 0.9, 0.8, 0.7, 0.6], 8, 8),
    ],
)
def test_the_best_state_is_kept_and_patience_ends_the_run(tmp_path, metric, accuracies, losses, best, steps):
    settings = TrainSettings(steps=8, eval_every=2, patience=2)
    results = iter([{"accuracy": a, "loss": b, "count": 1} for a, b in zip(accuracies, losses, strict=True)])
    run = Run(tmp_path / "run", settings, {}, metric, resume=False)
    trained = train(Scripted(), run, lambda step: step, lambda batch: 1.0, lambda: next(results))
    assert (trained.best_step, trained.steps, trained.stopped_early) == (best, steps, steps < 8)
    assert float(read_tensors(tmp_path / "run/best.safetensors")[0]["steps"]) == best


@pytest.mark.parametrize("raised", [False, True])
def test_a_validation_that_is_not_finite_is_never_the_best_and_ends_a_run_before_its_first_step(tmp_path, raised):
    def evaluation(values):
        numbers = iter(values)

        def evaluate():
            value = next(numbers)
            if raised and math.isnan(value):
                raise NotFinite("the logits are not finite in float16; run it in a wider dtype, --dtype bfloat16")
            return {"accuracy": 0.5, "loss": value, "count": 1}

        return evaluate

    settings = TrainSettings(steps=4, eval_every=2)
    learner, run = Scripted(), Run(tmp_path / "begun", settings, {}, "accuracy", resume=False)
    with pytest.raises(QzoError, match=r"before the first step, .*--dtype bfloat16"):
        train(learner, run, lambda step: step, lambda batch: 1.0, evaluation([math.nan]))
    assert learner.steps == 0 and run.best is None and not (tmp_path / "begun/best.safetensors").exists()
    run = Run(tmp_path / "run", settings, {}, "accuracy", resume=False)
    trained = train(Scripted(), run, lambda step: step, lambda batch: 1.0, evaluation([1.0, math.nan, 0.9]))
    assert (trained.best_step, trained.best["loss"]) == (4, 0.9)
    validations = [entry["validation"] for entry in metrics(tmp_path / "run") if "validation" in entry]
    assert [result["loss"] for result in validations] == [1, None, 0.9]


@pytest.mark.parametrize(("scheduler", "wanted"), [("linear", [4, 3, 2, 1]), ("cosine", [4, 3.414214, 2, 0.585786])])
def test_the_learning_rate_is_a_function_of_the_step(scheduler, wanted):
    settings = TrainSettings(steps=4, lr=4.0, scheduler=scheduler)
    assert [settings.lr_at(step) for step in range(4)] == pytest.approx(wanted)


def test_qzo_learns_an_easy_task(make_model, tmp_path):
    model = qzo.quantize(make_model(), 4, 32)
    settings = TrainSettings(steps=120, lr=1e-4, eval_every=60)
    encoder, splits = standin.Objective(None, None), standin.Task().splits()
    run = Run(tmp_path / "run", settings, {}, "loss", resume=False)
    learner = make_learner(model, settings, run.folder)
    first = standin.evaluate(model, encoder, splits["validation"])["loss"]
    trained = train(
        learner,
        run,
        lambda step: encoder.batch([splits["train"][n] for n in batch_numbers([1] * 64, [0] * 64, 16, 0, step)]),
        lambda batch: qzo.label_loss(model, **batch),
        lambda: standin.evaluate(model, encoder, splits["validation"]),
    )
    learner.close()
    assert trained.best["loss"] < first - 0.2 and trained.best_step > 0


@pytest.mark.parametrize("method", ["qzo", "mezo", "ft"])
def test_losses_that_are_not_finite_are_skipped_counted_and_end_the_run(make_model, tmp_path, method):
    model = make_model(dtype=torch.float32)
    model = qzo.quantize(model, 4, 32) if method == "qzo" else model
    settings = TrainSettings(method, steps=40, eval_every=100)
    run = Run(tmp_path / "run", settings, {}, "loss", resume=False)
    learner = make_learner(model, settings, run.folder)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}

    def loss(step):
        value = qzo.label_loss(model, torch.tensor([[5, 6, 7]]), torch.tensor([[-100, -100, 7]]))
        return value * (math.nan if step == 1 or step >= 4 else 1.0)

    with pytest.raises(QzoError, match="not finite for 10 steps in a row, up to step 13"):
        train(learner, run, lambda step: step, loss, lambda: {"loss": 0.0})
    learner.close()
    steps = [entry for entry in metrics(tmp_path / "run") if "validation" not in entry]
    assert [entry["step"] for entry in steps if entry["skipped"]] == [2, *range(5, 14)] and steps[1]["loss"] is None
    assert learner.skipped == 10 and learner.steps == 13
    assert all(tensor.isfinite().all() for tensor in learner.tensors().values()) and not same(before, learner.tensors())
    if method != "ft":
        assert journal_lines.read(tmp_path / "run/run.journal").steps == 13
