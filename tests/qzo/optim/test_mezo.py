"""MeZO: exact restoring without a second copy of the weights."""

import copy

import pytest
import torch
from reference import ReferenceSpsa
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qzo import QZO, MeZO

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def some_weights(dtype):
    shapes = {"a": (300, 251), "b": (7,), "c": (130, 129)}
    return {name: (torch.randn(shape) * 0.02).to(dtype) for name, shape in shapes.items()}


def bits(tensors):
    return {name: tensor.clone().view(torch.uint8) for name, tensor in tensors.items()}


def assert_same(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def quadratic(tensors):
    def closure():
        return sum(((tensor.float() - 0.5) ** 2).sum() for tensor in tensors.values())

    return closure


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", [None, "binomial"])
def test_six_exact_steps_equal_the_slow_reference_bit_for_bit(dtype, distribution):
    live = some_weights(dtype)
    if distribution:
        live["a"] = live["a"].view(-1)[:3001].clone()
    twin = {name: tensor.clone() for name, tensor in live.items()}
    noise = "philox" if distribution else "generator"
    optimizer = MeZO(live.items(), lr=1e-6, clip_threshold=1000.0, seed=3, noise=noise)
    reference = ReferenceSpsa(twin, 1e-6, 1e-3, 1000.0, 3, masters=False, distribution=distribution)
    for _ in range(6):
        optimizer.step(quadratic(live))
        assert optimizer.last.directional_derivative == reference.step(quadratic(twin))
        assert_same(bits(live), bits(twin))
    assert not optimizer._moved and not optimizer.state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("how", ["nan", "raise"])
def test_an_undone_step_gives_every_bit_back(dtype, when, how):
    live = some_weights(dtype)
    live["b"][:4] = torch.tensor([0.0, -0.0, 1e-30, float("nan")])
    start = bits(live)
    optimizer = MeZO(live)
    losses = iter([1.0] * when)

    def closure():
        loss = next(losses, None)
        if loss is None and how == "raise":
            raise RuntimeError("stop")
        return float("nan") if loss is None else loss

    if how == "raise":
        with pytest.raises(RuntimeError, match="stop"):
            optimizer.step(closure)
    else:
        losses = iter([1.0, float("nan")] if when else [float("nan"), 1.0])
        optimizer.step(lambda: next(losses))
        assert optimizer.last.skipped
    assert_same(bits(live), start)
    assert not optimizer._moved


def test_an_error_halfway_through_a_perturbation_is_undone_too(monkeypatch):
    live = some_weights(torch.bfloat16)
    start = bits(live)
    optimizer = MeZO(live)
    clone, clones = torch.Tensor.clone, []

    def failing(tensor):
        clones.append(1)
        if len(clones) == 7:
            raise RuntimeError("out of memory")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(lambda: 1.0)
    monkeypatch.undo()
    assert len(clones) == 7
    assert_same(bits(live), start)


def test_classic_arithmetic_drifts_where_the_exact_one_does_not():
    for exact in (True, False):
        live = some_weights(torch.bfloat16)
        start = bits(live)
        MeZO(live, lr=0.0, exact=exact).step(lambda: 1.0)
        assert torch.equal(live["a"].view(torch.uint8), start["a"]) == exact


def test_classic_and_exact_steps_are_close():
    live = some_weights(torch.float32)
    twin = {name: tensor.clone() for name, tensor in live.items()}
    MeZO(live, lr=1e-6).step(quadratic(live))
    MeZO(twin, lr=1e-6, exact=False).step(quadratic(twin))
    for name in live:
        torch.testing.assert_close(live[name], twin[name], rtol=0, atol=1e-8)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest storage born."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("make", [QZO, MeZO, lambda weights: MeZO(weights, exact=False)])
def test_a_step_makes_no_tensor_larger_than_a_chunk(make):
    weights = {"a": torch.rand(1024, 1024).bfloat16()}
    optimizer = make(weights)
    with LargestStorage() as largest:
        optimizer.step(lambda: 1.0)
    assert largest.bytes == 1024 * 1024 // 4 * 4  # a quarter of the elements, fp32


def test_frozen_and_tied_parameters_move_once(make_model, input_ids):
    model = make_model(tied=True).requires_grad_(False)
    optimizer = MeZO(model.named_parameters(remove_duplicate=False), lr=1e-4)
    names = [name for name, _ in model.named_parameters()]
    optimizer.step(lambda: model(input_ids, labels=input_ids).loss)
    assert list(optimizer.direction()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_parameters_that_require_gradients_are_trained_without_any():
    layer = nn.Linear(8, 8)
    start = layer.weight.clone()
    MeZO(layer.named_parameters(), lr=1e-3).step(lambda: layer(torch.ones(8)).sum())
    assert layer.weight.requires_grad and layer.weight.grad is None and not torch.equal(layer.weight, start)


def test_resume_is_bit_identical():
    live = some_weights(torch.bfloat16)
    optimizer = MeZO(live, lr=1e-5, seed=2)
    optimizer.step(quadratic(live))
    saved, twin = copy.deepcopy(optimizer.state_dict()), {name: tensor.clone() for name, tensor in live.items()}
    optimizer.step(quadratic(live))
    other = MeZO(twin)
    other.load_state_dict(saved)
    other.step(quadratic(twin))
    assert_same(bits(live), bits(twin))
    again = copy.deepcopy(other)
    assert again.steps == 2 and again.exact and again.last == other.last


def test_a_classic_step_runs_on_meta():
    live = {"a": torch.empty(300, 200, dtype=torch.bfloat16, device="meta")}
    optimizer = MeZO(live, exact=False)
    optimizer.step(lambda: 1.0)
    assert optimizer.steps == 1


def test_an_error_after_a_chunk_moved_gives_every_bit_back(monkeypatch):
    from qzo.optim import mezo

    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = weight.clone()
    optimizer = mezo.MeZO([weight])
    lost, calls = mezo._lost, []

    def fail_on_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return lost(*arguments)

    monkeypatch.setattr(mezo, "_lost", fail_on_the_third)
    with pytest.raises(MemoryError):
        optimizer.step(lambda: weight.float().sum())
    assert torch.equal(weight, before)


@pytest.mark.parametrize("numel", [2000, 32_000])
def test_nothing_as_large_as_even_a_small_tensor_is_born(numel):
    from bench.ledger.ledger import Ledger

    weight = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
    optimizer = MeZO([weight])
    with Ledger() as ledger:
        ledger.assign("weights", [weight])
        optimizer.step(lambda: 1.0)
    assert max(event.block.nbytes for event in ledger.events[1:]) < weight.nbytes
