"""Layers below the first trained one are computed once for all evaluations on a batch, and nothing else changes."""

from functools import partial

import pytest
import torch
from torch import nn

import qzo
from qzo.models.prefix import SharedPrefix, decoder_layers


class Batch:
    def __init__(self, ids):
        self.ids = ids


def loss_of(model):
    return lambda batch: qzo.label_loss(model, batch.ids, batch.ids)


def count_calls(layer):
    calls = []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1)) if hasattr(layer, "self_attn") else (
        layer.attn.register_forward_hook(lambda *_: calls.append(1))
    )
    return calls


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("directions", [1, 3])
def test_a_step_is_to_the_bit_the_same_and_runs_the_lower_layer_once(make_model, input_ids, family, directions):
    results = []
    for shared in (False, True):
        torch.manual_seed(1)
        model = qzo.quantize(make_model(family), 4, 32)
        optimizer = qzo.QZO(qzo.scales(model, (1, 1)), lr=1e-3, directions=directions)
        loss = loss_of(model)
        if shared:
            loss = SharedPrefix(model, loss, 1)
        batches = [Batch(input_ids), Batch(input_ids.flip(0)), Batch(input_ids.flip(1))]
        calls = [count_calls(layer) for layer in decoder_layers(model)]
        losses = [optimizer.step(partial(loss, batch)) for batch in batches]
        results.append((losses, {name: scale.clone() for name, scale in qzo.scales(model).items()}))
        passes = 2 * directions * len(batches)
        expected = [len(batches) + 1, passes + 1] if shared else [passes, passes]  # 1: the check at the first reuse
        assert [len(each) for each in calls] == expected
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_outside_of_the_loss_the_model_computes_as_ever(make_model, input_ids):
    model = make_model()
    shared, batch = SharedPrefix(model, loss_of(model), 1), Batch(input_ids)
    shared(batch), shared(batch)
    expected = model(input_ids.flip(0)).logits
    with torch.no_grad():
        decoder_layers(model)[0].mlp.up_proj.weight.mul_(2)
    assert not torch.equal(model(input_ids.flip(0)).logits, expected)


def test_an_error_in_a_pass_leaves_nothing_behind(make_model, input_ids):
    model = make_model()
    shared, batch = SharedPrefix(model, loss_of(model), 1), Batch(input_ids)
    whole = float(shared(batch))
    handle = decoder_layers(model)[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared(batch)
    handle.remove()
    assert float(shared(Batch(input_ids))) == whole == float(loss_of(model)(batch).detach())


class Noting(nn.Module):
    """A layer that also leaves a note, which is added to the loss."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def forward(self, hidden):
        self.notes.append(hidden.sum())
        return hidden * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.notes = []
        self.layers = nn.ModuleList([Noting(self.notes), nn.Linear(4, 4)])

    def forward(self, hidden):
        self.notes.clear()
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.sum() + sum(self.notes)


def test_layers_that_hand_on_more_than_their_output_are_not_shared():
    model, batch = Model(), torch.ones(2, 4)
    shared = SharedPrefix(model, model, 1)
    losses = [float(shared(batch)) for _ in range(3)]
    assert not shared.shares and losses == [float(model(batch).detach())] * 3


def test_a_model_without_numbered_layers_is_an_error():
    with pytest.raises(qzo.QzoError, match="Linear has no numbered layers"):
        SharedPrefix(nn.Linear(2, 2), lambda batch: batch, 1)
