"""Where adapters go, for each way in which architectures name what queries and values come from."""

import pytest
import torch

from bench.cases.pretrained import AutoConfig, AutoModelForCausalLM
from bench.methods.targets import adapter_targets

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "xlm": ["q_lin", "v_lin"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "falcon": ["query_key_value"],
    "persimmon": ["query_key_value"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    "jamba": ["q_proj", "v_proj"],
    "mamba": ["in_proj"],
    "bamba": ["in_proj"],
    "moshi": ["q_proj.linear", "v_proj.linear"],
    "qwen3_next": ["q_proj", "v_proj", "in_proj_qkvz"],
    "rwkv": ["key", "value", "receptance", "output"],  # what PEFT says
    "xlnet": ["layer_1", "layer_2"],  # its attention has no layers, so all there are
}


def empty(model_type: str):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", TARGETS)
def test_adapters_go_to_what_queries_and_values_come_from(model_type):
    assert adapter_targets(empty(model_type)) == TARGETS[model_type]


def test_a_vision_tower_with_layers_of_the_same_name_gets_no_adapters():
    model = empty("gemma3")
    targets = adapter_targets(model)
    assert len(targets) == 2 * len(model.model.language_model.layers)
    assert all(path.startswith("model.language_model.layers.") for path in targets)
