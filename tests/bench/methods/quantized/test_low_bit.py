"""The layers that bitsandbytes gets are those that transformers would give it."""

import pytest
import torch
from torch import nn

from bench.cases.pretrained import AutoConfig, AutoModelForCausalLM
from bench.methods.quantized.int8 import to_int8
from bench.methods.quantized.nf4 import to_nf4
from qzo.errors import QzoError

pytest.importorskip("bitsandbytes")


def empty(model_type: str, **fields):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.bfloat16)


@pytest.mark.parametrize("quantize", [to_nf4, to_int8])
def test_linear_layers_and_conv1d_are_quantized_and_the_head_is_not(quantize):
    model = quantize(empty("gpt2", n_layer=1))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert type(layers.pop("lm_head")) is nn.Linear
    assert len(layers) == 4 and not any(type(layer) is nn.Linear for layer in layers.values())
    assert layers["transformer.h.0.mlp.c_fc"].out_features == 4 * 768


def test_a_child_of_linear_stays_as_it_is():
    model = to_nf4(empty("llama4_text", num_hidden_layers=2, num_local_experts=4))
    routers = [module for module in model.modules() if type(module).__name__ == "Llama4Router"]
    assert routers and all(router.weight.dtype == torch.bfloat16 for router in routers)


def test_a_model_without_a_layer_to_quantize_is_refused_in_one_line():
    with pytest.raises(QzoError, match=r"no layer of FalconForCausalLM.*FalconLinear; choose .*lora"):
        to_nf4(empty("falcon", num_hidden_layers=1))


def test_the_config_says_that_the_model_is_quantized():
    model = to_nf4(empty("falcon_mamba", num_hidden_layers=1))
    assert model.config._is_quantized and model.backbone.config._is_quantized
