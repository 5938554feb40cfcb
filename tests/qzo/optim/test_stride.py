"""An lr that moves the scales too far is told once, by a loop of one's own too, with one that does not."""

import copy
import warnings

import pytest
import torch

from qzo import QZO


def told(d, steps=8, tensor=None, name="scales", warm=(), rise=0.2, **options):
    """Warnings of an lr in steps whose d is as given, and whose losses rise by a share of the first one each."""
    scales = torch.full((64,), 5e-3) if tensor is None else tensor
    optimizer = QZO({name: scales}, **{"eps": 1e-3, "lr": 1e-5, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, slope in enumerate([*warm, *[d] * steps]):
            loss = 2.0 * (1 + rise * step)
            losses = iter([loss + side * slope * optimizer.param_groups[0]["eps"] for side in (1.0, -1.0)])
            optimizer.step(lambda losses=losses: next(losses))
    return [str(one.message) for one in caught if "is too large" in str(one.message)]


def test_steps_that_move_scales_by_a_fifth_are_told_once_with_an_lr_that_is_not():
    [notice] = told(250.0)  # clipped to 100
    assert "more than 10% of themselves, the last one by 20%" in notice and "relative=True with eps=1e-2" in notice
    assert "up to step 2," in notice and "an lr of about 5e-07, or" in notice and "went from 2 to 2.8: lr" in notice
    assert not told(250.0, lr=5e-7)


def test_large_steps_are_left_alone_while_the_loss_does_not_rise():
    """Models with few scales bear them: of 18,432 the best lr of five moves them by a tenth."""
    assert not told(250.0, rise=0.0, steps=40) and not told(250.0, rise=-0.01, steps=40)
    assert not told(250.0, rise=0.02, steps=5)  # by less than a tenth: one batch is not as another
    [late] = told(250.0, rise=0.02, steps=9)
    assert "7 steps in a row" in late and not told(250.0, rise=0.2, warm=[5.0] * 5 + [250.0] * 2, steps=0)


def test_steps_longer_than_the_scales_are_told_whatever_the_loss_says():
    """It cannot rise far where the model knew nothing yet."""
    [notice] = told(250.0, lr=1e-3, rise=0.0)
    assert "by 2000%" in notice


def test_relative_amounts_are_measured_by_themselves():
    [notice] = told(-1.5, lr=0.1, eps=1e-2, relative=True)
    assert "an lr of about 7e-03" in notice and "or relative" not in notice
    assert not told(1.5, lr=7e-3, eps=1e-2, relative=True)


def test_one_steep_batch_is_no_trend_and_the_lr_named_is_of_the_first_step():
    assert not told(0.0, steps=1, warm=[250.0, 250.0, 0.0, 250.0, 250.0])
    [notice] = told(1000.0, warm=[10.0], clip_threshold=None, lr=1e-4)
    assert "an lr of about 5e-06" in notice


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"betas": (0.9, 0.999)}])
def test_other_rules_make_other_steps(options):
    assert not told(250.0, **options)


def test_what_are_no_scales_may_begin_at_nothing():
    assert not told(250.0, tensor=torch.full((64,), 1e-6), name="lora", nonnegative=False)


def test_a_copy_tells_nothing_and_goes_on():
    optimizer = QZO({"scales": torch.full((64,), 0.5)})
    optimizer.step(lambda: 1.0)
    copy.deepcopy(optimizer).step(lambda: 1.0)
