"""Gradients that meet are added as autograd adds them where nobody watches."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from bench.ledger.accumulation import ADD
from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger

ROWS, WIDTH = 600, 40


class Keeps(torch.autograd.Function):
    """A backward in Python that uses again what it has added."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        first = g * 2
        second = first + g
        return first * second


def tied(weight, ids):
    """The head's gradient, which comes first, is a view: the sum is a third tensor."""
    return F.linear(F.embedding(ids, weight), weight)


def tied_cast(weight, ids):
    """The head's gradient comes out of a cast: the sum goes into it."""
    half = weight.to(torch.bfloat16)
    return F.linear(F.embedding(ids, weight).to(torch.bfloat16), half).float()


def residual(weight, ids):
    twice = weight * 2
    once = twice + torch.tanh(twice) * 3
    return (once + torch.tanh(once)).pow(2)


def three_products(weight, ids):
    inputs = torch.tanh(F.embedding(ids, weight))
    return sum(F.linear(inputs, weight[:WIDTH] * number) for number in (1, 2, 3))


def shared(weight, ids):
    twice = weight * 2
    return (twice + twice * 1 + twice).pow(2)


def python(weight, ids):
    twice = weight * 2
    return Keeps.apply(twice) + twice


NETWORKS = (tied, tied_cast, residual, three_products, shared, python)


def inputs(device):
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    return weight.requires_grad_(), torch.zeros(3, dtype=torch.long, device=device)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_the_ledger_sees_the_peak_of_steps_that_nobody_watches(network):
    weight, ids = inputs("cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network(weight, ids).sum().backward()
    unwatched = highest_rise(profiler)
    for device in ("cpu", "meta"):
        other, ids = inputs(device)
        ledger = Ledger(device)
        ledger.assign("weights", [other])
        ledger.assign("temporaries", [ids])
        with ledger:
            network(other, ids).sum().backward()
        # numbers of four or eight bytes, of which some live in no tensor, aside
        assert ledger.peak_bytes() - weight.nbytes - ids.nbytes == pytest.approx(unwatched, abs=200), device
        if device == "cpu":
            assert torch.equal(other.grad, weight.grad)


def test_without_the_rule_a_sum_would_seem_to_take_a_third_tensor():
    peaks = []
    for counted in (True, False):
        weight, ids = inputs("meta")
        ledger = Ledger("meta")
        if not counted:
            ledger.accumulation.unshared = None
        with ledger:
            tied_cast(weight, ids).sum().backward()
        peaks.append(ledger.peak_bytes())
    assert peaks[1] - peaks[0] == weight.nbytes // 2  # the peak of the first is elsewhere


def test_a_sum_that_a_rule_has_seen_already_is_not_counted_twice():
    def see(ledger, func, args, kwargs):
        out = ledger.run(func, args, kwargs)
        ledger.see(out)
        return out

    levels = []
    for rules in ({}, {ADD: see}):
        weight, ids = inputs("meta")
        ledger = Ledger("meta", rules=rules)
        with ledger:
            residual(weight, ids).sum().backward()
        levels.append((ledger.peak_bytes(), ledger.live_bytes()))
    assert levels[0] == levels[1]
