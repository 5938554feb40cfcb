"""How d is measured: against autograd, along several directions, on one side, over micro-batches."""

import copy
import math
import statistics

import pytest
import torch
from tiny import Tiny

from qzo import QZO, MeZO, quantize, scales, trainable
from qzo.errors import QzoError
from qzo.optim.noise import full_noise, mixed_chunks


def some_scales():
    return {"a": torch.rand(40, 30) * 0.02, "b": torch.rand(7) * 0.02}


def quadratic(tensors):
    return lambda: sum(((tensor.float() - 0.013) ** 2).sum() for tensor in tensors.values())


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def true_derivative(loss, live, z, offsets, relative):
    """<gradient, z> by autograd in fp64 sums; an offset moves by m / s for each unit of its scale."""
    tensors = [*live.values(), *offsets.values()]
    for tensor in tensors:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(loss(), tensors)
    for tensor in tensors:
        tensor.requires_grad_(False)
    of = {id(tensor): gradient.double() for tensor, gradient in zip(tensors, gradients, strict=True)}
    total = 0.0
    for name, scale in live.items():
        along = z[name].double() * (scale.double() if relative else 1)
        total += float((of[id(scale)] * along).sum())
        if name in offsets:
            total += float((of[id(offsets[name])] * along * offsets[name].double() / scale.double()).sum())
    return total


@pytest.mark.parametrize(("relative", "eps"), [(False, 3e-4), (True, 3e-3)])
@pytest.mark.parametrize("offset", [False, True])
def test_d_is_the_true_directional_derivative_within_one_percent_in_20_directions(offset, relative, eps):
    model = Tiny(offset=offset)
    groups = trainable(model, "scales+offsets")
    optimizer = QZO(groups, lr=0.0, eps=eps, relative=relative, clip_threshold=None)
    for _ in range(20):
        optimizer.step(model.loss)
        followers = groups[0]["offsets"]
        exact = true_derivative(model.loss, scales(model), optimizer.direction(), followers, relative)
        assert len(followers) == 2 * offset
        assert optimizer.last.directional_derivative == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("n_bits", [3, 4])
def test_d_is_the_true_directional_derivative_of_a_llama_too(make_model, n_bits):
    model = quantize(make_model(), n_bits, 32)
    start = clones(scales(model))
    input_ids = torch.randint(5, 96, (16, 24))

    def loss():  # an fp32 forward; the mean in fp64, since at 4.6 one unit of fp32 is 2 % of the smallest 2 eps d
        logits = model(input_ids).logits[:, :-1].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    optimizer = QZO(scales(model), lr=0.0, eps=2e-5, clip_threshold=None)
    for _ in range(20):
        optimizer.step(loss)
        assert all(torch.equal(scale, start[name]) for name, scale in scales(model).items())
        exact = true_derivative(loss, scales(model), optimizer.direction(), {}, False)
        assert optimizer.last.directional_derivative == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_several_directions_are_averaged(distribution):
    live = some_scales()
    start = clones(live)
    optimizer = QZO(live, lr=1e-3, clip_threshold=0.02, directions=3, distribution=distribution, seed=2)
    seen = []
    value = optimizer.step(lambda: seen.append(clones(live)) or quadratic(live)())
    losses = [float(quadratic(tensors)()) for tensors in seen]
    assert len(losses) == 6 and value == pytest.approx(sum(losses) / 6)
    d = [(losses[2 * j] - losses[2 * j + 1]) / 2e-3 for j in range(3)]
    assert optimizer.last.derivatives == tuple(d) and optimizer.last.directional_derivative == d[0]
    applied = [max(-0.02, min(0.02, value)) for value in d]
    assert optimizer.last.applied == (tuple(applied),) and optimizer.last.clipped
    z = [optimizer.direction(j) for j in range(3)]
    for name in live:
        assert torch.equal(seen[2][name], start[name] + z[1][name] * 1e-3)
        expected = start[name] - 1e-3 * sum(dj * zj[name] for dj, zj in zip(applied, z, strict=True)) / 3
        torch.testing.assert_close(live[name], expected.clamp(min=0), rtol=0, atol=1e-9)
        assert not torch.equal(z[0][name], z[1][name])
    with pytest.raises(QzoError, match="direction 3 of 3"):
        optimizer.direction(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mezo_averages_directions_from_the_very_same_weights(dtype):
    live = {"a": torch.randn(900).to(dtype) * 0.02, "b": torch.randn(5).to(dtype)}
    start = clones(live)
    optimizer = MeZO(live, lr=0.0, directions=3)
    seen = []
    optimizer.step(lambda: seen.append(clones(live)) or quadratic(live)())
    for name in live:
        assert torch.equal(live[name], start[name])
        for j in range(3):
            z = optimizer.direction(j)[name]
            assert torch.equal(seen[2 * j][name], (start[name].float() + 1e-3 * z).to(dtype))
    moved = MeZO(clones(start), lr=1e-2, directions=3)
    target = dict(zip(start, moved.param_groups[0]["params"], strict=True))
    moved.step(quadratic(target))
    for name, tensor in target.items():
        g = sum(d * moved.direction(j)[name] for j, d in enumerate(moved.last.applied[0])) / 3
        torch.testing.assert_close(tensor, (start[name].float() - 1e-2 * g).to(dtype))


@pytest.mark.parametrize("make", [QZO, MeZO])
def test_one_sided_normalized_rademacher_is_fzoo(make):
    live = some_scales()
    start = clones(live)
    options = {"directions": 4, "distribution": "rademacher", "estimator": "one-sided", "normalize": True}
    optimizer = make(live, lr=1e-6, clip_threshold=None, seed=1, **options)
    seen = []
    value = optimizer.step(lambda: seen.append(clones(live)) or quadratic(live)())
    base, *losses = [float(quadratic(tensors)()) for tensors in seen]
    assert len(losses) == 4 and value == base == optimizer.last.loss_minus
    assert all(torch.equal(seen[0][name], start[name]) for name in live)
    spread = statistics.stdev(losses)
    for name in live:
        z = [optimizer.direction(j)[name] for j in range(4)]
        assert all(set(zj.unique().tolist()) == {-1.0, 1.0} for zj in z)
        g = sum((loss - base) * zj for loss, zj in zip(losses, z, strict=True)) / (4 * 1e-3)
        expected = start[name] - 1e-6 * g / spread
        expected = expected.clamp(min=0) if make is QZO else expected
        torch.testing.assert_close(live[name], expected, rtol=1e-5, atol=1e-8)


def test_equal_losses_move_nothing_when_normalized():
    live = some_scales()
    start = clones(live)
    optimizer = QZO(live, lr=1.0, directions=3, estimator="one-sided", normalize=True)
    optimizer.step(lambda: 1.0)
    assert optimizer.last.applied == ((0.0, 0.0, 0.0),) and not optimizer.last.skipped
    assert all(torch.equal(live[name], start[name]) for name in live)


def test_micro_batches_add_up_to_one_big_batch():
    runs = {}
    for name, parts in {"big": 1, "micro": 4}.items():
        model = Tiny(torch.float32)
        x, y = model.x[:4].flatten(0, 1), model.y[:4].flatten()
        cross_entropy = torch.nn.functional.cross_entropy
        closures = [
            lambda x=x, y=y, m=model: cross_entropy(m(x), y) / parts  # noqa: B023
            for x, y in zip(x.chunk(parts), y.chunk(parts), strict=True)
        ]
        optimizer = QZO(scales(model), lr=1e-3)
        mean = optimizer.step(iter(closures) if parts > 1 else closures[0])
        runs[name] = (model, optimizer.last, mean)
    (big, one, _), (micro, sum_, mean) = runs["big"], runs["micro"]
    assert mean == pytest.approx((one.loss_plus + one.loss_minus) / 2, rel=1e-6)
    assert sum_.directional_derivative == pytest.approx(one.directional_derivative, rel=1e-3)
    torch.testing.assert_close(scales(big), scales(micro), rtol=0, atol=1e-6)
    with pytest.raises(QzoError, match="no closure at all"):
        optimizer.step([])


def test_all_micro_batches_see_the_same_perturbation():
    live = some_scales()
    seen = []
    QZO(live).step([lambda: seen.append(live["a"].clone()) or 1.0] * 3)
    assert all(torch.equal(seen[0], other) for other in seen[1:3]) and not torch.equal(seen[0], seen[3])
    assert len(seen) == 6


def test_mixed_noise_is_the_sum_of_its_directions():
    for numel in (7, 5000):
        chunks = [mixed.clone() for _, mixed in mixed_chunks(numel, 1, 2, 3, "cpu", [0.5, -2.0, 3.0], "rademacher")]
        whole = [full_noise(torch.Size([numel]), 1, 2, 3, "cpu", j, "rademacher") for j in range(3)]
        assert torch.equal(torch.cat(chunks), 0.5 * whole[0] - 2 * whole[1] + 3 * whole[2])


def test_n_nonfinite_losses_in_a_row_stop_training_and_change_nothing():
    live = some_scales()
    start = clones(live)
    optimizer = QZO(live, lr=1e-3, max_skipped=3)
    for _ in range(2):
        optimizer.step(lambda: math.nan)
    assert optimizer.last.skipped and (optimizer.skipped_steps, optimizer.steps) == (2, 2)
    with pytest.raises(QzoError, match="not finite for 3 steps in a row, up to step 2"):
        optimizer.step(lambda: math.inf)
    assert optimizer.steps == 2 and all(torch.equal(live[name], start[name]) for name in live)
    optimizer.step(quadratic(live))
    optimizer.step(lambda: math.nan)
    again = QZO(some_scales(), max_skipped=None)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (again.skipped_steps, again.skipped_in_a_row) == (3, 1)
    for _ in range(20):
        again.step(lambda: math.nan)


def test_one_bad_loss_among_several_directions_or_batches_skips_the_step():
    live = some_scales()
    start = clones(live)
    losses = iter([1.0, 2.0, 3.0, math.nan])
    MeZO(live, lr=1.0, directions=2).step(lambda: next(losses))
    QZO(live, lr=1.0).step([lambda: 1.0, lambda: math.inf])
    assert all(torch.equal(live[name], start[name]) for name in live)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, "directions=0"),
        ({"directions": 1.5}, "directions=1.5"),
        ({"distribution": "uniform"}, 'choose "gaussian" or "rademacher"'),
        ({"distribution": "binomial"}, 'not one of noise="generator"; choose "gaussian" or "rademacher"'),
        ({"noise": "philox", "distribution": "gaussian"}, 'noise="philox"; choose "binomial" or "rademacher"'),
        ({"noise": "white"}, 'noise="white" is not known; choose "generator" or "philox"'),
        ({"estimator": "central"}, 'choose "two-sided" or "one-sided"'),
        ({"normalize": True, "directions": 4}, 'needs estimator="one-sided"'),
        ({"normalize": True, "estimator": "one-sided"}, "directions >= 2"),
        ({"max_skipped": 0}, "max_skipped=0"),
    ],
)
@pytest.mark.parametrize("make", [QZO, MeZO])
def test_estimators_that_make_no_sense_are_refused(make, options, message):
    with pytest.raises(QzoError, match=message):
        make(some_scales(), **options)


@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_the_way_of_measuring_is_saved_and_resumed(noise):
    live = some_scales()
    options = {"estimator": "one-sided", "distribution": "rademacher", "noise": noise, "normalize": True}
    optimizer = QZO(live, lr=1e-4, directions=2, **options)
    optimizer.step(quadratic(live))
    twin = clones(live)
    other = QZO(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(quadratic(live))
    other.step(quadratic(twin))
    assert optimizer.last == other.last
    assert all(torch.equal(live[name], twin[name]) for name in live)


def test_population_takes_each_direction_against_the_mean_of_the_others():
    live = some_scales()
    losses = iter([1.0, 2.0, 6.0])
    seen = []

    def loss():
        seen.append(live["a"].clone())
        return next(losses)

    optimizer = QZO(live, lr=0.0, eps=1e-3, clip_threshold=None, directions=3, estimator="population")
    assert optimizer.step(loss) == 3.0 and len(seen) == 3
    assert optimizer.last.derivatives == pytest.approx([-3e3, -1.5e3, 4.5e3])
    normal = QZO(live, lr=0.0, eps=1e-3, clip_threshold=None, directions=3, estimator="population", normalize=True)
    losses = iter([1.0, 2.0, 6.0])
    normal.step(loss)
    assert normal.last.applied[0] == pytest.approx([d / statistics.stdev([1, 2, 6]) for d in (-3e3, -1.5e3, 4.5e3)])


def test_population_measures_a_gradient_without_bias_and_nothing_where_all_losses_are_the_same():
    live = some_scales()
    optimizer = QZO(live, lr=0.0, eps=1e-4, clip_threshold=None, directions=64, estimator="population")
    loss = quadratic(live)
    start, gradient = clones(live), {name: 2 * (tensor - 0.013) for name, tensor in live.items()}
    optimizer.step(lambda: loss().double())
    exact = [sum((gradient[n] * z).sum().item() for n, z in optimizer.direction(j).items()) for j in range(64)]
    mean = statistics.fmean(exact)
    wanted = [(d - mean) * 64 / 63 for d in exact]
    assert optimizer.last.derivatives == pytest.approx(wanted, rel=0.02, abs=0.02 * max(map(abs, wanted)))
    optimizer = QZO(live, lr=1.0, eps=1e-4, clip_threshold=None, directions=7, estimator="population", normalize=True)
    optimizer.step(lambda: 0.1)
    assert optimizer.last.applied == ((0.0,) * 7,) and all(torch.equal(live[name], start[name]) for name in live)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 1}, "compares directions with one another"),
        ({"directions": 4, "estimator": "two-sided", "normalize": True}, 'needs estimator="one-sided" or "population"'),
    ],
)
def test_population_needs_several_directions(options, message):
    with pytest.raises(QzoError, match=message):
        QZO(some_scales(), **{"estimator": "population", **options})
