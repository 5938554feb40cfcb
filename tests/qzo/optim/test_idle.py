"""An lr with which no run of any length learns is told by the optimizer itself, in a loop of one's own."""

import warnings

import pytest
import torch
from tiny import Tiny

from qzo import QZO, scales
from qzo.optim.guards.idle import FIRST, HORIZON, LEAST, Idle


def told(lr, d=1.0, loss=2.0, steps=2 * FIRST, change=1.0, **options):
    """Warnings of an lr in steps whose d is ±`d`; the lr is multiplied by `change` after each."""
    optimizer = QZO({"scales": torch.full((64,), 0.5)}, lr=lr, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            losses = iter([loss + side * d * optimizer.param_groups[0]["eps"] for side in (1.0, -1.0)])
            optimizer.step(lambda losses=losses: next(losses))
            optimizer.param_groups[0]["lr"] *= change
    return [str(one.message) for one in caught if f"even {HORIZON:,} steps" in str(one.message)]


@pytest.mark.parametrize("d", [0.1, 1.0, 30.0])
def test_an_lr_with_which_twenty_thousand_steps_do_nothing_is_told_once_with_one_that_is_not(d):
    limit = LEAST / HORIZON / d**2
    [notice] = told(0.9 * limit, d)
    assert "even 20,000 steps lower the loss, 2 now, by 0.009 at the most" in notice
    suited = float(notice.partition("an lr of about ")[2].split(",")[0])
    assert not told(suited, d) and not told(1.1 * limit, d) and suited == pytest.approx(100 * limit, rel=0.2)


def test_what_tells_nothing_is_not_told():
    assert not told(1e-9, steps=FIRST - 1)  # not yet
    assert not told(0.0) and not told(1e-9, d=0.0)  # nothing is to be learned, or nothing was seen
    assert not told(1e-9, change=1.01)  # warm-up
    assert not told(1e-9, momentum=0.9) and not told(1e-9, betas=(0.9, 0.999))
    assert told(1e-9, change=0.9)  # one that falls was largest at first


def test_a_small_loss_needs_small_steps():
    assert told(4e-7, loss=2.0) and not told(4e-7, d=0.1, loss=0.002 * 0.1) and told(4e-9, d=0.1, loss=0.002)


def test_groups_with_other_eps_and_lr_add_up():
    groups = [{"lr": 1e-9, "eps": 1e-3}, {"lr": 1e-6, "eps": 1e-4}]
    idle, alone = Idle(), Idle()
    for _ in range(FIRST - 1):
        assert not idle.after(groups, (1.0,), ((1.0,), (10.0,)), 2.0)
        alone.after(groups[:1], (1.0,), ((1.0,),), 2.0)
    assert not idle.after(groups, (1.0,), ((1.0,), (10.0,)), 2.0)
    with pytest.warns(UserWarning, match=r"with lr 1e-09 even"):
        assert alone.after(groups[:1], (1.0,), ((1.0,),), 2.0)


def test_the_default_lr_is_too_small_for_relative_amounts_and_not_for_a_learning_loop(recwarn):
    for options in ({"relative": True, "eps": 1e-2}, {"lr": 1e-4}):
        model = Tiny()
        optimizer = QZO(scales(model), **options)
        for step in range(FIRST):
            optimizer.step(lambda: model.loss(step))  # noqa: B023
    [notice] = [str(one.message) for one in recwarn]
    assert "with lr 1e-07 even 20,000 steps" in notice
