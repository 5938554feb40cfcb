"""What of a model is quantized: names, layers that no layout holds, heads; and what is then saved loads again."""

import json
import logging

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MambaConfig, Qwen2MoeConfig

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.commands.main import main
from qzo.formats.gptq.layer import QuantLinear
from qzo.models.walk import left_plain

ALL = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}


def quantized(model):
    return {path for path, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"skip": "mlp"}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"skip": ["mlp.down_proj", "o_proj"]}, ALL - {"down_proj", "o_proj"}),
        ({"only": ["*.q_proj", "mlp.*"]}, {"q_proj", "gate_proj", "up_proj", "down_proj"}),
        ({"only": "self_attn", "skip": "k_proj"}, {"q_proj", "v_proj", "o_proj"}),
        ({"skip": r"re:.*\.(gate|up)_proj$"}, ALL - {"gate_proj", "up_proj"}),
        ({}, ALL),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_names_choose_layers(make_model, input_ids, options, kinds, method):
    calibration = {"calibration": [input_ids]} if method == "gptq" else {}
    model = qzo.quantize(make_model(), 4, 32, method=method, **calibration, **options)
    assert {path.rpartition(".")[2] for path in quantized(model)} == kinds and len(quantized(model)) == 2 * len(kinds)


def test_one_layer_of_the_two_by_its_path(make_model):
    model = qzo.quantize(make_model(), 4, 32, skip="model.layers.1")
    assert {path[:14] for path in quantized(model)} == {"model.layers.0"}
    assert quantized(qzo.quantize(make_model(), 4, 32, only="layers.0.mlp.up_proj")) == {"model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"skip": "proj"},
            "skip: 'proj' names no layer that is quantized here, such as model.layers.0.self_attn.q_proj",
        ),
        ({"only": ["mlp", "lm_heat"]}, "only: 'lm_heat' names no layer that is quantized here, such as"),
        ({"skip": "re:("}, r"skip: 're:\(' is no regular expression: .*; mend it"),
        ({"skip": "model"}, "skip and only leave no layer to quantize; name fewer"),
    ],
)
def test_names_that_name_nothing_are_told_before_anything_is_replaced(make_model, options, message):
    model = make_model()
    with pytest.raises(qzo.QzoError, match=message):
        qzo.quantize(model, 4, 32, **options)
    assert not quantized(model)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_small_layers_that_no_layout_holds_stay_and_are_told(input_ids, tmp_path, caplog, method):
    sizes = {
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = Qwen2MoeConfig(**tiny_config("llama", False).to_diff_dict() | sizes | {"model_type": "qwen2_moe"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    calibration = {"calibration": [input_ids]} if method == "gptq" else {}
    with caplog.at_level(logging.WARNING):
        qzo.quantize(model, 4, 16, method=method, **calibration)
    gates = [f"model.layers.{number}.mlp.shared_expert_gate" for number in range(2)]
    assert left_plain(model) == gates
    assert "left in 16 bits: 2 x model.layers.*.mlp.shared_expert_gate (out_features=1 is not a multiple" in caplog.text
    qzo.save(model, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert list(settings["dynamic"]) == [f"-:^{gate.replace('.', chr(92) + '.')}$" for gate in gates]
    assert torch.equal(qzo.load(tmp_path / "saved")(input_ids).logits, model(input_ids).logits)


def test_a_group_size_that_suits_few_layers_is_an_error_with_one_that_suits_all(make_model):
    model = make_model()
    with pytest.raises(qzo.QzoError, match=r"in_features=64 is not divisible by group_size=80; choose 32, or -1"):
        qzo.quantize(model, 4, 80)
    assert not quantized(model)
    qzo.quantize(model, 4, 64)  # down_proj has in_features=160
    assert left_plain(model) == [f"model.layers.{number}.mlp.down_proj" for number in range(2)]


def test_mamba_is_quantized_around_what_it_reads_itself(input_ids):
    config = MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, time_step_rank=8, state_size=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    before = model(input_ids).logits
    qzo.quantize(model, 8, -1)
    assert {path.rpartition(".")[2] for path in quantized(model)} == {"in_proj", "out_proj", "x_proj"}
    torch.testing.assert_close(model(input_ids).logits, before, rtol=0.1, atol=0.1)


def test_subclasses_that_compute_something_else_stay(caplog):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Doubled(64, 32))
    qzo.quantize(model, 4, 32)
    assert quantized(model) == {"0", "1"}
    assert "cannot quantize a Doubled, which does not compute as nn.Linear" in caplog.text


@pytest.mark.parametrize("labels", [3, 8])
def test_a_classifier_is_quantized_around_its_head_and_loads_again(tmp_path, input_ids, labels):
    config = tiny_config("llama", False)
    config.num_labels, config.pad_token_id = labels, 0
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    qzo.quantize(model, 4, 32)
    assert type(model.score) is nn.Linear and len(quantized(model)) == 14
    for place, save in (
        (tmp_path / "ours", qzo.save),
        (tmp_path / "theirs", lambda own, folder: own.save_pretrained(folder)),
    ):
        save(model, place)
        assert inspect(place).reason is None
        again = qzo.load(place)
        assert type(again) is type(model) and again.config.num_labels == labels
        assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def test_an_unquantized_classifier_comes_with_its_head(tmp_path, input_ids):
    config = tiny_config("llama", False)
    config.num_labels, config.pad_token_id = 3, 0
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(qzo.load(tmp_path / "plain")(input_ids).logits, model(input_ids).logits)


def test_the_command_takes_names_too(make_model, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "plain")
    place = [str(tmp_path / "plain"), str(tmp_path / "out")]
    assert (
        main(
            [
                "quantize",
                *place,
                "--group-size",
                "32",
                "--skip",
                "mlp.down_proj",
                "o_proj",
                "--only",
                "mlp",
                "self_attn",
            ]
        )
        == 0
    )
    assert {path.rpartition(".")[2] for path in quantized(qzo.load(tmp_path / "out"))} == ALL - {"down_proj", "o_proj"}
    assert main(["quantize", place[0], str(tmp_path / "again"), "--skip", "nothing"]) == 2
    assert "skip: 'nothing' names no layer" in capsys.readouterr().err


def test_a_tied_head_of_codes_has_a_weight_that_is_made_when_it_is_read(make_model, input_ids):
    model = qzo.quantize(make_model(tied=True), 4, 32, embeddings=8)
    head, hidden = model.lm_head, torch.randn(2, 3, 64)
    torch.testing.assert_close(hidden @ head.weight.t(), head(hidden))
    table = model.model.embed_tokens(torch.arange(96))
    assert torch.equal(head.weight, table)
    assert not list(head.parameters()) and head.weight is not head.weight
