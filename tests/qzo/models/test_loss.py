"""The loss at labelled positions only."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qzo.errors import QzoError
from qzo.models.loss import label_loss, last_columns_only


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("labelled", [1, 3, 11, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_equals_the_models_own(make_model, input_ids, family, labelled, padded):
    model = make_model(family)
    labels = input_ids.clone()
    labels[:, : 12 - labelled] = -100
    labels[1, -1] = -100
    mask = torch.ones_like(input_ids)
    if padded:
        mask[0, :4] = 0
    positions = torch.stack([torch.arange(12), torch.arange(12)])
    positions[0] -= 4 if padded else 0  # the first token that is no padding stands at 0
    own = model(input_ids=input_ids, attention_mask=mask, position_ids=positions.clamp(min=0), labels=labels).loss
    torch.testing.assert_close(label_loss(model, input_ids, labels, mask), own, rtol=1e-5, atol=1e-6)
    keep = min(labelled, 11)
    torch.testing.assert_close(label_loss(model, input_ids, labels, mask, keep), own, rtol=1e-5, atol=1e-6)


def test_logits_are_computed_for_the_positions_that_predict_a_label_only(make_model, input_ids):
    model = make_model(dtype=torch.bfloat16)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    labels = torch.full_like(input_ids, -100)
    labels[:, -2:] = input_ids[:, -2:]
    loss = label_loss(model, input_ids, labels)
    assert shapes == [(2, 2, 96)] and loss.dtype == torch.float32


def test_nothing_is_read_where_keep_is_given():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
            return SimpleNamespace(logits=torch.empty(2, logits_to_keep, 96, device="meta"))

    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    assert label_loss(Model(), ids, ids, keep=1).shape == ()


def test_labels_that_cannot_count_are_refused(make_model, input_ids):
    model = make_model()
    labels = torch.full_like(input_ids, -100)
    labels[:, 0] = 7
    with pytest.raises(QzoError, match="at least 1 label"):
        label_loss(model, input_ids, labels)
    with pytest.raises(QzoError, match="at least 1 label"):
        label_loss(model, input_ids, input_ids, keep=12)
    with pytest.raises(QzoError, match="must be"):
        label_loss(model, input_ids, labels[:, 1:])


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_head_multiplies_one_contiguous_block(make_model, input_ids, sequences, keep):
    model = make_model().requires_grad_(False)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    label_loss(model, input_ids[:sequences], input_ids[:sequences], keep=keep)
    columns = max(keep, 2 // sequences)  # at least two rows in all
    assert seen[0].shape == (sequences, columns, 64) and seen[0].stride() == (columns * 64, 64, 1)
    with pytest.raises(ZeroDivisionError), last_columns_only(model, 3):
        1 / 0  # noqa: B018
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_last_mlp_computes_only_what_the_head_reads(make_model, input_ids, family):
    model = make_model(family)
    shapes = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, n=number: shapes.update({n: tuple(inputs[0].shape)}))
    label_loss(model, input_ids, input_ids, keep=2)
    assert shapes == {0: (2, 12, 64), 1: (2, 12, 64)}  # hooks from before see what the layer hands on
    seen = []
    inner = model.model.layers[-1].mlp
    forward = inner.forward
    inner.forward = lambda hidden: (seen.append(tuple(hidden.shape)), forward(hidden))[1]
    label_loss(model, input_ids, input_ids, keep=2)
    assert seen == [(2, 3, 64)]
    model(input_ids=input_ids)
    assert seen[1:] == [(2, 12, 64)]  # and afterwards all columns again


def test_gradients_are_those_of_the_models_own_loss(make_model, input_ids):
    model = make_model()
    labels = input_ids.clone()
    labels[:, :9] = -100
    own = torch.autograd.grad(model(input_ids=input_ids, labels=labels).loss, list(model.parameters()))
    ours = torch.autograd.grad(label_loss(model, input_ids, labels), list(model.parameters()))
    for a, b in zip(ours, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_mlp_that_takes_further_columns_computes_all_of_them(make_model, input_ids):
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden, further):
            assert hidden.shape == further.shape
            return self.inner(hidden)

    model = make_model()
    expected = label_loss(model, input_ids, input_ids, keep=2)
    layer = model.model.layers[-1]
    layer.mlp, own = Twice(layer.mlp), layer.mlp
    handle = layer.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[0]), prepend=True)
    assert torch.allclose(label_loss(model, input_ids, input_ids, keep=2), expected, rtol=1e-5)
    handle.remove()
    layer.mlp = own
