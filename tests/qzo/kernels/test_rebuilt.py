"""Weights that are rebuilt once for several passes."""

import torch

from qzo import quantize
from qzo.kernels.native import by_operators
from qzo.kernels.rebuilt import kept_weights


def test_kept_weights_give_the_same_bits_and_are_rebuilt_once(make_model, monkeypatch):
    model = quantize(make_model(), 4, 32)
    layer = type(model.model.layers[0].mlp.up_proj)
    ids, rebuilt, rows = torch.randint(5, 96, (2, 7)), [], layer._rows
    monkeypatch.setattr(layer, "_rows", lambda self, *args: rebuilt.append(self) or rows(self, *args))
    with torch.no_grad(), by_operators():
        plain = model(ids).logits
        count = len(rebuilt)
        with kept_weights():
            assert all(torch.equal(model(ids).logits, plain) for _ in range(2))
        assert count and len(rebuilt) == 2 * count
        layer_scales = model.model.layers[0].mlp.up_proj.scales
        layer_scales.mul_(2)
        with kept_weights():
            assert not torch.equal(model(ids).logits, plain)
