"""Random numbers of the model during a step: the same at every evaluation, and none of the caller's."""

import pytest
import torch
from tiny import Tiny
from torch import nn

from qzo import QZO, Journal, MeZO, QzoError, check_live, scales


class Dropped(Tiny):
    """With dropout between its layers."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.dropout = nn.Dropout(0.3)
        self.masks = []

    def forward(self, x):
        kept = self.dropout(torch.ones_like(x))
        self.masks.append(kept)
        return super().forward(x * kept)


MEASURED = {"two-sided": {}, "one-sided": {"estimator": "one-sided", "directions": 3}}


@pytest.mark.parametrize("kind", [QZO, MeZO])
@pytest.mark.parametrize("how", MEASURED)
def test_all_evaluations_of_a_step_see_the_same_masks_and_other_steps_others(kind, how):
    model = Dropped().train()
    optimizer = kind(scales(model), lr=1e-6, seed=4, **MEASURED[how])
    for _ in range(2):
        optimizer.step([lambda: model.loss(0), lambda: model.loss(1)])
    count = len(model.masks) // 2
    steps = [model.masks[:count], model.masks[count:]]
    for masks in steps:
        first, second = masks[0::2], masks[1::2]  # of the two micro-batches
        assert all(torch.equal(mask, first[0]) for mask in first) and not torch.equal(first[0], second[0])
        assert all(torch.equal(mask, second[0]) for mask in second)
    assert not torch.equal(steps[0][0], steps[1][0])


def test_the_difference_is_that_of_the_scales_not_of_the_masks():
    model = Dropped().train()
    optimizer, found = QZO(scales(model), lr=0.0, eps=1e-4, clip_threshold=None), []
    for _ in range(3):
        optimizer.steps = 0
        optimizer.step(model.loss)
        found.append(optimizer.last.directional_derivative)
    assert len(set(found)) == 1 and abs(found[0]) < 30


def test_a_step_takes_nothing_of_the_callers_stream_even_if_it_fails():
    model = Dropped().train()
    optimizer = QZO(scales(model))
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    optimizer.step(model.loss)
    assert torch.equal(torch.rand(4), wanted)
    torch.manual_seed(5)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: torch.rand(3).sum() / 0 if False else 1 / 0)
    assert torch.equal(torch.rand(4), wanted)


def test_a_resume_is_bit_identical_with_dropout(tmp_path):
    def train(name, lives):
        for last in lives:
            torch.manual_seed(last)  # the global generator is where nobody knows
            model = Dropped(torch.float16).train()
            optimizer = QZO(scales(model), lr=1e-4, seed=1)
            with Journal(tmp_path / name, model, optimizer) as journal:
                for step in range(journal.resume(), last):
                    optimizer.step(lambda: model.loss(step))  # noqa: B023
                    journal.record()
        return optimizer.truth()

    whole, cut = train("whole", [6]), train("cut", [2, 5, 6])
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_live_check_is_not_led_astray_by_dropout():
    model = Dropped().train()
    assert check_live(model, model.loss)
    for layer in (model.first, model.second):
        layer.forward = lambda x: x * 2  # computes with other things
    with pytest.raises(QzoError, match="training would change nothing"):
        check_live(model, model.loss)
