"""A remedy is put behind refusals that pass: of layers that are taken over, and of tensors that are written."""

import pytest
import torch

import qzo
from qzo.checkpoints.write import write_checkpoint


def test_a_layer_that_cannot_be_taken_over_is_told_with_what_helps():
    module = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    module.weight.quant_state.shape = (32, 128)
    message = r"^0: its weight has the shape .*; load the model's files with qzo.load, or leave this layer unquantized$"
    with pytest.raises(qzo.QzoError, match=message):
        qzo.adopt(torch.nn.Sequential(module))


def test_tensors_of_another_checkpoint_are_told_with_what_helps(make_model, tmp_path):
    qzo.save(qzo.quantize(make_model(), group_size=32), tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.scales"
    with pytest.raises(qzo.QzoError, match=r"; give the checkpoint that these tensors were tuned on") as caught:
        write_checkpoint(tmp_path / "model", {name: torch.ones(3, 3)}, tmp_path / "out")
    assert name in str(caught.value) and not (tmp_path / "out").exists()
