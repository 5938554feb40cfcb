"""gptqmodel's modules by a stand-in with their tensors and attributes; `test_gptqmodel.py` has the library itself."""

import sys
import types

import pytest
import torch
from awq_files import awq_tensors, slow_weight
from torch import nn

from qzo import QZO, adopt, quantize, release, scales
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear


class BaseQuantLinear(nn.Module):
    """What all kernels of gptqmodel have."""

    adapter, online_full_had, online_partial_had, planar, cleared = None, False, False, False, False

    def __init__(self, tensors, bits, group_size, in_features, out_features, bias=None):
        super().__init__()
        self.bits, self.group_size, self.in_features, self.out_features = bits, group_size, in_features, out_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    def _clear_runtime_weight_cache(self):
        self.cleared = True


@pytest.fixture(autouse=True)
def library(monkeypatch):
    module = types.ModuleType("gptqmodel.nn_modules.qlinear")
    module.BaseQuantLinear = BaseQuantLinear
    monkeypatch.setitem(sys.modules, module.__name__, module)


def kernel(name, bits=4):
    """A module of the kernel of that name, and its weight [N, K]."""
    made = type(name, (BaseQuantLinear,), {})
    if "Awq" in name:
        tensors = awq_tensors(torch.randn(96, 64), "x", 32)
        return made({part[2:]: t for part, t in tensors.items()}, bits, 32, 64, 96), slow_weight(tensors, "x")
    layer = QuantLinear.from_weight(torch.randn(96, 64), None, bits, 32, symmetric=False)
    return made(dict(layer.named_buffers()), bits, 32, 64, 96, torch.randn(96)), layer.dequantize()


@pytest.mark.parametrize("name", ["TorchLinear", "TorchAtenLinear", "AwqTorchLinear", "TorchAtenAwqLinear"])
def test_modules_are_taken_over_on_their_tensors_and_given_back(name):
    module, weight = kernel(name)
    model, x = nn.Sequential(module), torch.randn(3, 64)
    adopt(model)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-4)
    for part, tensor in model[0].named_buffers():
        assert tensor.data_ptr() == getattr(module, part).data_ptr()
    optimizer = QZO(scales(model), lr=1e-3)
    optimizer.step(lambda: model(x).square().mean())
    tuned = scales(model)["0.scales"]
    assert "origin" not in dict(model[0].named_modules()) and list(model.state_dict()) == [
        *(["0.bias"] if module.bias is not None else []),
        *(f"0.{part}" for part, _ in model[0].named_buffers()),
    ]
    release(model)
    assert model[0] is module and module.cleared and torch.equal(module.scales, tuned)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("TorchAtenLinear", {"qweight": torch.zeros(64, 48, dtype=torch.uint8)}, "has repacked its qweight, and comp"),
        (
            "TorchFusedLinear",
            {"qzeros": torch.zeros(2, 96)},
            "has repacked its qzeros, and computes with a copy",
        ),
        ("TorchLinear", {"scales": None}, "has repacked its scales"),
        ("TorchLinear", {"planar": True}, "a TorchLinear with planar 4-bit codes cannot be taken over"),
        ("TorchLinear", {"adapter": "lora"}, "a TorchLinear with an adapter or a rotation cannot be taken over"),
        ("TorchLinear", {"bits": 5}, "n_bits=5 is not supported"),
        ("AwqTorchLinear", {"bits": 8}, "a AwqTorchLinear with 8 bits cannot be taken over"),
        ("MarlinLinear", {}, "the codes of gptqmodel's kernel MarlinLinear are not known here; load it with backend="),
    ],
)
def test_what_cannot_be_taken_over_is_told_before_anything_changes(name, changes, message):
    first, second = kernel("TorchLinear")[0], kernel(name)[0]
    for key, value in changes.items():
        setattr(second, key, value)
    model = nn.Sequential(first, second)
    with pytest.raises(QzoError, match=f"^1: .*{message}") as caught:
        adopt(model)
    assert "\n" not in str(caught.value) and model[0] is first and model[1] is second


def test_layers_that_qzo_made_have_nothing_to_give_back():
    model = quantize(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), 4, 32)
    with pytest.raises(QzoError, match="no layer to give back"):
        release(model)
