"""`--set` and `--peft-config`: the names of the libraries, each in its place, and what is wrong in one line."""

import json

import pytest

from bench.cases.case import BenchCase
from bench.cases.recipes.peft_config import read_peft_config
from bench.cases.recipes.recipe import differences, parse
from bench.cases.recipes.settings import apply, parse_settings
from bench.cases.recipes.table import LORA, RECIPES
from qzo.errors import QzoError


def changed(method, *settings):
    return apply(parse_settings(settings), {method: RECIPES[method]})[method]


def test_each_option_goes_where_its_library_has_it():
    recipe = changed(
        "qlora", "r=64", "target_modules=q_proj,v_proj", "modules_to_save=lm_head", "optim=paged_adamw_8bit",
        "gradient_accumulation_steps=4", "bnb_4bit_use_double_quant=true", "use_gradient_checkpointing=true",
        "dtype=float16", "lengths=1024x2, 300x1", "autocast_adapter_dtype=false",
    )  # fmt: skip
    assert recipe.peft == {
        "r": 64, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    assert recipe.arguments == {"bf16": True, "optim": "paged_adamw_8bit", "gradient_accumulation_steps": 4}
    assert recipe.quantization["bnb_4bit_use_double_quant"] and recipe.kbit == {"use_gradient_checkpointing": True}
    assert recipe.lengths == (1024, 1024, 300) and recipe.dtype == "float16" and not recipe.autocast_adapter_dtype


def test_a_value_takes_the_place_of_the_methods_own():
    assert changed("lora", "bf16=false").autocast is None
    assert changed("lora", "fp16=true").autocast == "float16"
    assert changed("qlora", "prepare_model_for_kbit_training=false").kbit is None
    assert changed("qlora", "load_in_8bit=true").quantization == {"load_in_8bit": True}
    assert changed("lora", "target_modules=all-linear").peft["target_modules"] == "all-linear"
    assert changed("lora", r"target_modules=.*\.q_proj").peft["target_modules"] == r".*\.q_proj"
    assert changed("lora", "activation_checkpointing=true").checkpointing


def test_settings_change_the_methods_that_they_concern():
    recipes = {name: RECIPES[name] for name in ("ft-bf16", "lora")}
    found = apply(parse_settings(["r=16", "max_grad_norm=0"]), recipes)
    assert found["ft-bf16"].arguments["max_grad_norm"] == 0 and found["ft-bf16"].peft is None
    assert found["lora"].peft["r"] == 16
    assert differences(found["lora"], LORA) == "max_grad_norm=0.0, r=16"


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("lora", "r", "no KEY=VALUE"),
        ("lora", "r=", "has no value"),
        ("lora", "r=0", "whole number from 1 on"),
        ("lora", "r=many", "r='many' must be a whole number"),
        ("lora", "use_dora=3", "must be true or false"),
        ("lora", "lora_dropout=-1", "number from 0 on"),
        ("lora", "use_dorra=true", "did you mean use_dora"),
        ("lora", "load_in_4bit=true", "is for qlora"),
        ("lora", "optim=adamw_8bits", "choose adamw_8bit"),
        ("ft-mixed", "optim=sgd", "does not concern ft-mixed"),
        ("ft-bf16", "r=8", "does not concern ft-bf16; it is for lora"),
        ("lora", "learning_rate=1", "changes no byte"),
        ("lora", "max_length=8", "--seq-len"),
        ("lora", "lengths=1x1", "write [1024, 300]"),
        ("lora", "target_modules=[a", "no YAML"),
        ("lora", "gradient_accumulation_steps=0", "whole number from 1"),
        ("qlora", "bnb_4bit_quant_type=int4", "nf4"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(method, setting, words):
    with pytest.raises(QzoError) as error:
        changed(method, setting)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_adapter_config_is_its_class_and_options(tmp_path):
    path = tmp_path / "adapter_config.json"
    saved = {"peft_type": "IA3", "inference_mode": True, "revision": None}
    path.write_text(json.dumps(saved | {"target_modules": ["k_proj"], "feedforward_modules": []}))
    assert read_peft_config(path) == (
        "IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": [], "task_type": "CAUSAL_LM"}
    )  # fmt: skip
    for text, words in (("{", "no JSON"), ("[]", "no peft_type"), ('{"peft_type": "LORRA"}', "nearest: LORA"),
                        ('{"peft_type": "LORA", "rank": 8}', "LoraConfig has no rank")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(QzoError, match=words):
            read_peft_config(path)
    with pytest.raises(QzoError, match="cannot read"):
        read_peft_config(tmp_path / "none.json")


def test_a_case_with_a_recipe_comes_back_from_json():
    from dataclasses import asdict

    case = BenchCase("opt-125m", "lora", recipe=changed("lora", "r=4", "lengths=[8, 6]"))
    assert BenchCase.from_json(json.loads(json.dumps(asdict(case)))) == case
    assert parse(case.recipe.stated()) == case.recipe
