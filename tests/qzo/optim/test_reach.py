"""Updates that would leave a number that is not finite are left out, whole: counted, and θ is that of the last step."""

import itertools
import math

import pytest
import torch

from qzo import QZO, MeZO, QzoError
from qzo.optim.guards.reach import adam_ratio

RULES = {
    "plain": {},
    "relative": {"relative": True},
    "momentum": {"momentum": 0.9},
    "adam": {"betas": (0.9, 0.999)},
    "several": {"directions": 3},
}


def tensors(dtype=torch.float16):
    torch.manual_seed(0)
    return {name: (torch.rand(shape) * 0.02 + 0.001).to(dtype) for name, shape in {"a": (70, 50), "b": (3,)}.items()}


def copied(named):
    return {name: tensor.clone() for name, tensor in named.items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Slope:
    """A loss that is `steep` times the sum of all numbers."""

    def __init__(self, named, steep=1.0):
        self.named, self.steep = named, steep

    def __call__(self):
        return self.steep * sum(float(tensor.double().sum()) for tensor in self.named.values())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_huge_finite_update_is_skipped_and_the_weights_are_those_before(rule, dtype):
    live = tensors(dtype)
    optimizer = QZO(live, lr=1e-5, clip_threshold=None, **RULES[rule])
    loss = Slope(live)
    optimizer.step(loss)
    before, truth = copied(live), copied(optimizer.truth())
    loss.steep = 1e30
    optimizer.param_groups[0]["lr"] = 1e12 if dtype == torch.float16 else 1e38
    for count in range(1, 10):
        optimizer.step(loss)
        assert optimizer.last.skipped and optimizer.skipped_steps == count and optimizer.steps == 1 + count
        assert same(live, before) and same(optimizer.truth(), truth)
    with pytest.raises(QzoError, match=r"an update was not finite for 10 .*weights are those of the last good step"):
        optimizer.step(loss)
    assert same(live, before)
    optimizer.param_groups[0]["lr"], loss.steep = 1e-5, 1.0
    optimizer.step(loss)
    assert not optimizer.last.skipped and optimizer.skipped_in_a_row == 0
    assert not same(optimizer.truth(), truth)


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float16, 1e6), (torch.bfloat16, 1e38)])
@pytest.mark.parametrize("options", [{}, {"directions": 2}, {"clip_threshold": 1.0}])
def test_mezo_too(dtype, lr, options):
    live = tensors(dtype)
    optimizer = MeZO(live, lr=lr, **options)
    before = copied(live)
    optimizer.step(Slope(live, 1e3))
    assert optimizer.last.skipped and same(live, before)


@pytest.mark.parametrize("rule", ["relative", "momentum"])
def test_an_lr_beyond_fp32_leaves_no_number_infinite_where_d_is_0_too(rule):
    live = tensors()
    optimizer = QZO(live, lr=1e39, **RULES[rule], **({"momentum": 0.9} if rule == "relative" else {}))
    optimizer.step(lambda: 1.0)
    assert all(bool(tensor.isfinite().all()) for tensor in [*live.values(), *optimizer.truth().values()])


def test_without_an_undo_list_an_eps_beyond_the_dtype_is_refused_and_the_weights_are_untouched():
    live = tensors()
    before = copied(live)
    with pytest.raises(QzoError, match=r"eps=1e\+06 moves weights beyond 65504, .*exact=False.*; choose e\.g\. 1e-3"):
        MeZO(live, eps=1e6, exact=False).step(Slope(live))
    assert same(live, before)


def test_an_offset_that_would_overflow_counts():
    scale, offset = torch.full((64,), 0.01), torch.full((64,), 30000.0, dtype=torch.float16)
    optimizer = QZO([{"params": {"x.scales": scale}, "offsets": {"x.scales": offset}}], lr=1e-3, clip_threshold=None)
    optimizer.step(Slope({"x": scale}, 40))
    assert optimizer.last.skipped and bool((offset == 30000).all()) and bool((scale == 0.01).all())


def test_no_update_ever_leaves_what_is_not_finite():
    """Settings from harmless to absurd."""
    kinds = itertools.product((1e-4, 1.0, 1e3, 1e6, 1e20, 1e38), (None, 1.0, 1e10), (1.0, 1e8, 1e30), RULES, (0, 1))
    skipped = taken = 0
    for lr, clip, steep, rule, seed in itertools.islice(kinds, 900):
        live = tensors(torch.float16 if seed else torch.float32)
        made = QZO(live, lr=lr, clip_threshold=clip, seed=seed, max_skipped=None, **RULES[rule])
        loss = Slope(live, steep)
        for _ in range(3):
            before = copied(live)
            made.step(loss)
            assert all(bool(tensor.isfinite().all()) for tensor in live.values()), (lr, clip, steep, rule)
            assert all(bool(tensor.isfinite().all()) for tensor in made.truth().values()), (lr, clip, steep, rule)
            skipped, taken = skipped + made.last.skipped, taken + (not made.last.skipped)
            assert not made.last.skipped or same(live, before)
    assert skipped > 300 and taken > 300


def test_harmless_steps_need_no_second_look(monkeypatch):
    live = tensors()
    optimizer = QZO(live, lr=1e-4, momentum=0.9)
    looks = []
    monkeypatch.setattr(optimizer, "_try", lambda *_: looks.append("tried"))
    measured = optimizer._measured
    monkeypatch.setattr(optimizer, "_measured", lambda number: (looks.append("measured"), measured(number))[1])
    for _ in range(50):
        optimizer.step(Slope(live))
    assert looks == ["measured"] and optimizer.skipped_steps == 0


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.5, 0.25), (0.9, 0.5)])
def test_the_ratio_of_moments_is_never_larger_than_its_bound(betas):
    dice = torch.Generator().manual_seed(0)
    closest = 0.0
    for _ in range(200):
        m = v = 0.0
        for t in range(1, 9):
            g = float(torch.randn((), generator=dice)) * 10 ** float(torch.randn((), generator=dice))
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            ratio = abs(m) / (1 - betas[0] ** t) / math.sqrt(v / (1 - betas[1] ** t))
            assert ratio <= adam_ratio(*betas, t) * 1.000001
            closest = max(closest, ratio / adam_ratio(*betas, t))
    assert closest > 0.9
