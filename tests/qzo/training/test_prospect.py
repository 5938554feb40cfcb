"""A learning rate with which a run will not learn is told after its first steps, with one that suits it."""

import math
import random

import pytest
import standin
import torch
from transformers import TrainingArguments

from qzo import QZOTrainer, load
from qzo.training.telemetry.prospect import FIRST, Prospect


def told(steps, lr, d, loss=1.0, clip=math.inf):
    prospect = Prospect(steps, clip)
    notices = [prospect.after(loss, d * (-1) ** step, lr) for step in range(2 * FIRST)]
    assert all(notice is None for step, notice in enumerate(notices) if step != FIRST - 1)
    return notices[FIRST - 1]


@pytest.mark.parametrize("d", [1e-3, 1.0, 30.0])
def test_too_small_or_too_large_is_told_once_and_the_lr_named_is_neither(d):
    small, large = told(100, 1e-5 / d**2, d), told(100, 1.1 / d**2, d)
    assert "nothing would be learned" in small and "it will diverge" in large
    for notice in (small, large):
        suited = float(notice.partition("an lr of about ")[2].split(",")[0])
        assert told(100, suited, d) is None
    assert told(990, 1e-5 / d**2, d) is not None and told(1010, 1e-5 / d**2, d) is None  # a hundredth is enough


def test_what_is_clipped_moves_less():
    assert "diverge" in told(100, 1e-3, 100.0) and told(100, 1e-3, 100.0, clip=1.0) is None


def test_steps_that_are_not_finite_or_flat_tell_nothing():
    prospect = Prospect(100)
    assert all(prospect.after(1.0, d, 1e-30) is None for d in [math.nan, math.inf] * FIRST)
    assert told(100, 1e-7, 0.0) is None


@pytest.mark.parametrize(
    ("lr", "message"), [(1e-12, "nothing would be learned"), (10.0, "lr 10 is too large; begin"), (3e-5, None)]
)
def test_the_trainer_warns_of_the_lr_it_was_given(make_model, tmp_path, recwarn, lr, message):
    folder = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)
    dice = random.Random(0)
    rows = [[dice.randrange(5, 96) for _ in range(8)] for _ in range(20)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=10, per_device_train_batch_size=2, learning_rate=lr, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    QZOTrainer(load(folder), arguments, train_dataset=data).train()
    found = [str(one.message) for one in recwarn if "an lr of about" in str(one.message)]
    assert len(found) == (message is not None) and all(message in text for text in found)


def test_the_lr_named_is_of_the_model_before_it_was_wrecked():
    """As MeZO's first steps with an lr far too large: d of 10, and of thousands from the second step on."""
    prospect = Prospect(100)
    (notice,) = filter(None, [prospect.after(2.0, d, 1.0) for d in [10.0] + [3000.0] * (FIRST - 1)])
    assert "give an lr of about 1e-04" in notice and "lower the loss, which is 2, by 7.9e+06" in notice
