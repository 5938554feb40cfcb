"""One architecture of each kind that once could not be simulated, and what the study makes of any."""

import pytest

from bench.cases.case import BenchCase
from bench.cases.pretrained import CONFIG_MAPPING
from bench.studies.architectures import short_config, shortened
from bench.worlds.cell import run


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("phi3", "lora"),  # query, key and value are one matrix
        ("deepseek_v3", "qlora"),  # values are narrower than queries
        ("falcon_mamba", "qlora"),  # has no attention, and computes with a weight that a quantized layer has not
        ("gpt_bigcode", "qlora"),
        ("gemma4_text", "ft-sgd"),  # heads of two widths
        ("jamba", "qzo"),
        ("recurrent_gemma", "lora"),
        ("zaya", "mezo"),  # its last router takes the states of the one before it
        ("hunyuan_v1_moe", "qzo-2bit"),  # asks for the dtype of its router's weight
        ("inkling2_text", "ft-sgd"),  # calls SDPA beside its own attention
    ],
)
def test_architectures_of_all_kinds_are_simulated(model_type, method, tmp_path):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    short_config(model_type).save_pretrained(tmp_path)
    record = run(BenchCase(str(tmp_path), method, gpu="rtx-4090", seq_len=16))
    assert (record["status"], record["message"]) == ("ok", None)


def test_what_a_models_own_code_cannot_do_is_said_in_one_line_without_a_traceback(tmp_path, capfd):
    short_config("git").save_pretrained(tmp_path)  # takes no text without a picture
    record = run(BenchCase(str(tmp_path), "ft-sgd", gpu="rtx-4090", seq_len=16))
    assert record["status"] == "unsupported"
    assert record["message"].startswith("the model's own code cannot do it (modeling_git.py, line ")
    assert "\n" not in record["message"] and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "method", "words"),
    [
        ("jetmoe", "ft-sgd", "asks for what only tensors with data can tell; choose --dev"),
        ("bamba", "peqa-lean", "reads the weight of a layer past its forward, and a QuantLinear has none; choose"),
    ],
)
def test_what_the_bench_cannot_give_a_model_is_not_called_the_models_fault(model_type, method, words, tmp_path):
    short_config(model_type).save_pretrained(tmp_path)
    assert words in run(BenchCase(str(tmp_path), method, gpu="rtx-4090", seq_len=16))["message"]


@pytest.mark.parametrize("method", ["ft-sgd", "lora"])
def test_an_architecture_without_checkpointing_is_refused_where_it_is_asked_for(method, tmp_path):
    short_config("openai-gpt").save_pretrained(tmp_path)
    record = run(BenchCase(str(tmp_path), method, gpu="rtx-4090", seq_len=16, gradient_checkpointing=True))
    assert record["status"] == "unsupported"
    assert "OpenAIGPTLMHeadModel has no gradient checkpointing in transformers; leave it out" in record["message"]


def test_a_short_config_shows_every_kind_of_layer():
    jamba = short_config("jamba")
    assert jamba.num_hidden_layers == 5  # the first of its attention layers is the fifth
    assert set(jamba.layers_block_type) == {"mamba", "attention"}


def test_a_config_that_is_too_short_to_build_gets_more_layers():
    assert short_config("zamba").num_hidden_layers > 3  # the first of its shared blocks; the second is tied to it


def test_lists_and_settings_of_layers_are_cut_with_their_number():
    fields = {"num_hidden_layers": 4, "kinds": ["a", "b", "a", "c"], "of": {"0": 1, "3": 2}, "text": {"n_layer": 9}}
    assert shortened(fields, 3) == {
        "num_hidden_layers": 3, "kinds": ["a", "b", "a"], "of": {"0": 1}, "text": {"n_layer": 3},
    }  # fmt: skip


def test_the_defaults_of_transformers_are_not_changed():
    before = CONFIG_MAPPING["llama"]().num_hidden_layers
    assert short_config("llama").num_hidden_layers < before == CONFIG_MAPPING["llama"]().num_hidden_layers
