"""Layers of a training step that repeat the events of two of them: the same events as of a step traced in full."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.ledger.ledger import Ledger
from bench.ledger.repeat import repeated_layers
from bench.ledger.repeat_training import NotAlike

LAYERS = 6  # the first and the last have other neighbours, and two of the rest are traced


class Layer(nn.Module):
    """x + tanh(x W) U, recomputed in backward where asked."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 3 * width, device="meta"), nn.Linear(3 * width, width, device="meta")
        self.calls, self.recomputed, self.twice = 0, False, []

    def forward(self, x, positions=None):
        self.calls += 1
        x = x if positions is None else x * positions
        return checkpoint(self._forward, x, use_reentrant=False) if self.recomputed else self._forward(x)

    def _forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x) * 2 if self.twice else self.inner(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.begin, self.layers = nn.Linear(16, 16, device="meta"), nn.ModuleList(Layer() for _ in range(LAYERS))

        self.positions = False

    def forward(self, x):
        x = self.layers[0](self.begin(x))
        positions = torch.empty(16, device="meta") if self.positions else None
        for layer in self.layers[1:]:
            x = layer(x, positions)
        del positions
        return x.sum()


def events(model: Model, layers=repeated_layers, steps: int = 2) -> list[tuple]:
    """Sign, bytes, phase and role of all that happened."""
    ledger = Ledger("meta")
    ledger.assign("weights", model.parameters())
    with ledger, layers(ledger, model):
        for _ in range(steps):
            ledger.enter("forward")
            loss = model(torch.empty(4, 16, device="meta"))
            ledger.enter("backward")
            loss.backward()
            ledger.assign("gradients", [parameter.grad for parameter in model.parameters()])
            model.zero_grad()
    return [(event.sign, event.block.nbytes, event.phase, event.block.role) for event in ledger.events]


def in_full(ledger, model):
    return contextlib.nullcontext()


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_layers_between_the_traced_ones_repeat_forward_and_backward(recomputed):
    model = Model()
    for layer in model.layers:
        layer.recomputed = recomputed
    expected = events(model, in_full)
    for layer in model.layers:
        layer.calls = 0
    assert events(model) == expected
    assert [layer.calls for layer in model.layers] == [2, 2, 0, 0, 2, 2]  # once a step


def test_what_all_of_them_use_may_go_with_the_first():
    model = Model()
    model.positions = True
    assert events(model) == events(model, in_full)
    assert model.layers[2].calls == 2  # in full alone


def test_gradients_have_the_shapes_of_what_is_trained_and_stay_where_they_are():
    model = Model()
    model.layers[2].outer.bias.requires_grad_(False)  # then it is of another kind
    ledger = Ledger("meta")
    ledger.assign("weights", model.parameters())
    with ledger, repeated_layers(ledger, model):
        model(torch.empty(4, 16, device="meta")).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.shape == parameter.shape for parameter in trained)
    assert model.layers[2].outer.bias.grad is None


def test_layers_that_only_look_alike_are_found_out():
    model = Model()
    model.layers[4].twice = [True]  # no plain word; the second of the traced ones keeps one tensor more
    with pytest.raises(NotAlike):
        events(model)


def test_layers_that_are_told_different_things_are_of_different_kinds():
    model = Model()
    for number, layer in enumerate(model.layers):
        layer.layer_idx, layer.keeps_values = number, number == 3
    assert events(model) == events(model, in_full)
    assert [layer.calls for layer in model.layers] == [4] * LAYERS  # none has two neighbours like the others' any more


def test_gradients_that_set_something_off_are_not_repeated():
    model = Model()
    seen = []
    for parameter in model.layers.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    events(model, steps=1)
    assert len(seen) == 4 * LAYERS
    assert [layer.calls for layer in model.layers] == [1] * LAYERS


def test_a_second_backward_adds_to_the_gradients_that_are_there():
    model = Model()
    runs = []
    for layers in (in_full, repeated_layers):
        ledger = Ledger("meta")
        ledger.assign("weights", model.parameters())
        with ledger, layers(ledger, model):
            for _ in range(2):
                model(torch.empty(4, 16, device="meta")).backward()
        model.zero_grad()
        runs.append([(event.sign, event.block.nbytes) for event in ledger.events])
    assert runs[0] == runs[1]
