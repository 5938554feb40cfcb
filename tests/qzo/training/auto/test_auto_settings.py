"""What is chosen where nobody names a number: from forward passes whose losses are known here, and from the data."""

import math
from dataclasses import replace

import pytest
import torch

from qzo import QZO, quantize, scales
from qzo.errors import NotFinite, QzoError
from qzo.live.trainable import scale_group
from qzo.training.auto.choose import FARTHEST, NOISE, chosen, told
from qzo.training.auto.guard import WINDOW, Guard
from qzo.training.auto.layers import chosen_layers
from qzo.training.auto.probe import Probe, probe
from qzo.training.auto.rows import chosen_rows
from qzo.training.presets import PRESETS
from qzo.training.settings import TrainSettings

AUTO = TrainSettings(**PRESETS["auto"], preset="auto")


@pytest.fixture
def model(make_model):
    return quantize(make_model(), n_bits=4, group_size=32)


def parabola(named, slope, curvature, height=2.0):
    """A loss that rises by `slope` along the first scale, and by `curvature` in all, in relative coordinates."""
    start = {name: tensor.float().clone() for name, tensor in named.items()}
    count = sum(tensor.numel() for tensor in named.values())

    def loss():
        moved = torch.cat([(named[name].float() / start[name] - 1).flatten() for name in start])
        return height + slope * moved.sum() / math.sqrt(count) + curvature / count * moved.square().sum() / 2

    return loss


def test_a_probe_measures_slope_and_curvature_and_leaves_the_model_to_the_bit(model):
    named = scales(model)
    before = {name: tensor.clone() for name, tensor in named.items()}
    found = probe(model, named, parabola(named, slope=0.5, curvature=30.0))
    assert found.loss == 2.0 and found.curvature == pytest.approx(30.0, rel=0.15) and 0.1 < found.slope < 1.2
    assert found.evaluations == 9 and all(torch.equal(before[name], named[name]) for name in before)


@pytest.mark.parametrize(("curvature", "radius"), [(1.0, 0.2), (1e4, 0.003)])
def test_a_probe_goes_as_far_as_the_loss_rises_visibly_and_no_farther(model, curvature, radius):
    named = scales(model)
    found = probe(model, named, parabola(named, 0.1, curvature))
    assert found.radius == pytest.approx(radius, rel=0.1) and found.curvature == pytest.approx(curvature, rel=0.3)


def test_a_loss_that_is_not_finite_is_no_measurement(model):
    with pytest.raises(NotFinite, match="--dtype bfloat16 or float32"):
        probe(model, scales(model), lambda: torch.tensor(math.nan))


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_the_noise_of_all_steps_is_its_share_of_the_loss(scheduler):
    settings, found = replace(AUTO, scheduler=scheduler, steps=200), Probe(0.7, 0.5, 4.0, 0.05, 9)
    lr = chosen(settings, found)["lr"]
    steps = [lr * settings.schedule(step) * found.slope / math.sqrt(8) for step in range(200)]
    assert sum(0.5 * rho**2 * found.curvature for rho in steps) == pytest.approx(
        NOISE * found.loss, rel=0.11
    )  # lr has two digits


def test_a_short_run_takes_no_giant_steps_and_a_steep_one_does_not_overshoot():
    few = chosen(replace(AUTO, steps=2), Probe(0.7, 0.5, 4.0, 0.05, 9))
    assert few["lr"] * 0.5 / math.sqrt(8) == pytest.approx(FARTHEST, rel=0.05) and few["clip_threshold"] == 1.5
    steep = chosen(replace(AUTO, steps=2), Probe(1.0, 1e-3, 50.0, 0.05, 9))
    assert steep["lr"] == pytest.approx(0.25 * 8 / 50) and steep["eps"] == 3e-2
    assert all(math.isfinite(value) and value > 0 for value in chosen(AUTO, Probe(0.0, 0.0, 0.0, 0.2, 9)).values())


def test_a_slope_that_rounding_hides_is_told_where_it_is_rounded():
    settings = replace(AUTO, lr=0.1, eps=1e-2, clip_threshold=0.2, layers="15-29", batch_size=4)
    flat, steep = Probe(3.5, 0.05, 26.0, 0.05, 9, 0.002), Probe(3.3, 3.0, 24.0, 0.05, 9, 0.002)
    assert "--dtype float32" in told(flat, settings, exact=False) and "layers 15-29, lr 0.1 linear" in told(
        steep, settings, False
    )
    assert "--dtype" not in told(flat, settings, exact=True) + told(steep, settings, exact=False)


def test_what_is_given_by_hand_is_not_chosen():
    assert set(chosen(replace(AUTO, lr=0.1, clip_threshold=math.inf), Probe(1.0, 1.0, 10.0, 0.05, 9))) == {"eps"}


@pytest.mark.parametrize(
    ("count", "chooses", "layers"),
    [
        (30, True, "15-21"),
        (30, False, "15-29"),
        (32, True, "16-23"),
        (4, True, "2-2"),
        (3, False, None),
        (0, True, None),
    ],
)
def test_layers_by_the_kind_of_data(count, chooses, layers):
    assert chosen_layers(count, chooses) == layers


@pytest.mark.parametrize(
    ("lengths", "chooses", "rows"),
    [([17] * 9, False, 16), ([20, 41, 90], False, 12), ([128] * 9, False, 4), ([9000], False, 4), ([128], True, 16)],
)
def test_a_batch_has_as_many_rows_as_their_length_allows_and_every_label_in_its_share(lengths, chooses, rows):
    assert chosen_rows(lengths, chooses) == rows


def test_directions_are_compared_with_one_another_so_that_what_all_share_is_no_slope(model):
    """A loss off by the same at all evaluations but that of the model itself, as bfloat16 rounds a batch of few."""
    named = scales(model)
    options = {"lr": 0.0, "eps": 0.03, "relative": True, "directions": 8, "estimator": AUTO.estimator}
    optimizer = QZO([scale_group(model, named)], **options)
    plain = parabola(named, slope=0.5, curvature=0.0)
    optimizer.step(plain)
    expected = optimizer.last.derivatives
    optimizer = QZO([scale_group(model, named)], **options)
    optimizer.step(lambda: plain() + (0.0 if float(plain()) == 2.0 else 0.02))
    assert optimizer.last.derivatives == pytest.approx(expected, abs=1e-4)


def test_losses_that_rise_halve_the_lr_and_unlucky_batches_do_not():
    guard, noisy = Guard(), [1.0, 1.3, 0.8, 1.1, 0.7, 1.2, 0.9, 1.0]
    assert not any(guard.after(value) for value in [*noisy, *reversed(noisy), *[value + 0.1 for value in noisy]])
    told = [guard.after(value + 1) for value in noisy]
    assert told[-1] is not None and "from 1 to 2 (means of 8 steps)" in told[-1] and guard.factor == 0.5
    assert not any(guard.after(value + 1) for value in noisy), "from where it is, it has not risen again"
    assert not any(guard.after(math.inf) for _ in range(2 * WINDOW)), "a step that is not counted tells nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relative": False}, 'lr="auto" is for qzo with relative amounts and the update sgd, not for relative=False'),
        ({"update": "adam"}, "not for update=adam; give a number, or --preset paper"),
        ({"eps": "some"}, "eps=some is not a positive number"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(QzoError) as caught:
        TrainSettings(**{**PRESETS["auto"], **options})
    assert message in str(caught.value)
