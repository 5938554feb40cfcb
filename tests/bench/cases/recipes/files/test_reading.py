"""Files as users of TRL, axolotl and LLaMA-Factory publish them, against the same recipe written by hand."""

from pathlib import Path

import pytest

from bench.cases.recipes.files import axolotl, llama_factory, read_recipe, trl
from bench.cases.recipes.files.stated import Stated
from bench.cases.recipes.recipe import Recipe
from qzo.errors import QzoError

HERE = Path(__file__).parent
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}
NOT_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
BY_HAND = {
    "trl_sft.yaml": Recipe(
        "TRL SFT",
        {"bf16": True, **NOT_REENTRANT, "gradient_accumulation_steps": 2, "optim": "paged_adamw_8bit"},
        peft={
            "task_type": "CAUSAL_LM",
            "r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        quantization=NF4,
        attention="flash_attention_2",
        batch_size=4,
        lengths=(2048,),
        packing=True,
        loss="tiled",
        trained_dtype="bfloat16",
    ),
    "axolotl_qlora.yml": Recipe(
        "axolotl",
        {
            "bf16": True,
            **NOT_REENTRANT,
            "optim": "paged_adamw_32bit",
            "gradient_accumulation_steps": 4,
            "use_liger_kernel": True,
            "liger_kernel_config": {
                "rope": False,
                "rms_norm": True,
                "layer_norm": False,
                "swiglu": True,
                "cross_entropy": False,
                "fused_linear_cross_entropy": True,
            },
        },
        peft={
            "task_type": "CAUSAL_LM",
            "r": 32,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": "all-linear",
        },
        quantization=NF4,
        attention="flash_attention_2",
        batch_size=2,
        lengths=(2048,),
        packing=True,
    ),
    "llama_factory_lora.yaml": Recipe(
        "LLaMA-Factory",
        {
            "bf16": True,
            "gradient_accumulation_steps": 8,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        peft={
            "task_type": "CAUSAL_LM",
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0,
            "target_modules": "all-linear",
        },
        batch_size=1,
        lengths=(1008,),  # 1,001 padded to a multiple of 8
        trained_dtype="float32",
    ),
}


def read(tmp_path, text, name="any.yaml"):
    (tmp_path / name).write_text(text)
    return read_recipe(tmp_path / name)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_published_file_is_the_recipe_written_by_hand(name):
    found = read_recipe(HERE / name)
    assert found.recipe == BY_HAND[name]
    assert found.not_understood == ()
    assert found.model.startswith("meta-llama/Llama-3.2-1B")
    assert found.batch_size == BY_HAND[name].batch_size and found.seq_len == BY_HAND[name].lengths[0]


def test_what_is_left_out_has_the_defaults_of_the_tool(tmp_path):
    trl = read(tmp_path, "model_name_or_path: any/model")
    assert trl.recipe.arguments == {"bf16": True, "gradient_checkpointing": True}
    assert (trl.recipe.dtype, trl.recipe.batch_size, trl.recipe.lengths) == ("float32", 8, (1024,))
    assert (trl.seq_len, trl.batch_size, trl.recipe.peft) == (None, None, None)
    plain = read(tmp_path, '{"per_device_train_batch_size": 4, "fp16": true}', "arguments.json")
    assert plain.recipe == Recipe("Trainer", {"fp16": True}, batch_size=4)
    axolotl = read(tmp_path, "base_model: any/model")
    assert axolotl.recipe.arguments == {"bf16": True, "optim": "adamw_torch_fused"}
    assert (axolotl.recipe.dtype, axolotl.recipe.batch_size, axolotl.recipe.lengths) == ("bfloat16", 1, (512,))
    factory = read(tmp_path, "finetuning_type: full\nmodel_name_or_path: any/model\npure_bf16: true").recipe
    assert (factory.peft, factory.trained_dtype, factory.lengths) == (None, None, (2048,))
    assert factory.arguments["gradient_checkpointing_kwargs"] == {"use_reentrant": True}


def test_what_is_not_simulated_is_told_by_name_and_what_is_not_known_is_listed(tmp_path):
    found = read(tmp_path, "base_model: any\ndeepspeed: ds.json\nattn_implementation: flash_attention_2\ncolour: red\n")
    assert [line.split(":")[0] for line in found.not_honoured] == ["deepspeed"]
    assert found.not_understood == ("colour",)
    assert found.notes()[-1] == "not understood: colour" and len(found.notes()) == 3
    off = read(tmp_path, "base_model: any\ndeepspeed:\nfsdp: []\nattn_implementation: flash_attention_2")
    assert off.not_honoured == ()


@pytest.mark.parametrize(
    "text, says",
    [
        ("model: [", "is no YAML"),
        ("- a\n- b", "holds no keys"),
        ("1: 2", "holds no keys"),
        ("colour: red", "no key in it is one of TRL"),
        ("base_model: any\nmicro_batch_size: two", "micro_batch_size='two' is no whole number from 1 to"),
        ("base_model: any\nmicro_batch_size: 0", "micro_batch_size=0 is no whole number"),
        (f"base_model: any\nsequence_len: {10**400}", "sequence_len=1000000000"),
        ("model_name_or_path: any\nbf16: maybe", "bf16='maybe' is no switch"),
        ("model_name_or_path: any\nlora_target_modules: {a: 1}", "is no list of names"),
        ("model_name_or_path: any\ndtype: float8", "dtype='float8' is unknown; choose float32"),
        ("model_name_or_path: any\nload_in_4bit: true\nload_in_8bit: true", "choose one"),
        ("stage: dpo", "stage='dpo' is another kind of training"),
        ("finetuning_type: freeze", "choose lora or full"),
        ("base_model: any\nrl: dpo", "rl='dpo' is another kind of training"),
        ("a: " * 3000, "is no YAML"),
        ("a: " + "[" * 500, "is no YAML"),
        ("#" * 2**21, "a recipe has at most"),
    ],
)
def test_a_file_that_says_nothing_usable_is_one_line(tmp_path, text, says):
    with pytest.raises(QzoError, match=r"any\.yaml") as error:
        read(tmp_path, text)
    assert says in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path):
    with pytest.raises(QzoError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QzoError, match="cannot be read"):
        read_recipe(tmp_path / "binary.yaml")
    with pytest.raises(QzoError, match="is no JSON"):
        read(tmp_path, "{", "any.json")


@pytest.mark.parametrize("tool, name", zip((trl, axolotl, llama_factory), BY_HAND, strict=True))
def test_a_value_of_a_wrong_type_is_refused_in_one_line_or_its_key_is_not_read(tool, name):
    keys = [line.split(":")[0] for line in (HERE / name).read_text().splitlines() if line[:1].isalpha()]
    for key in keys:
        for value in (-1, "x" * 300, [[]], {"a": {}}, 10**30):
            try:
                recipe, *_ = tool.recipe(Stated({tool.SIGNS[0]: "lora", key: value}, Path(name)))
            except QzoError as error:
                assert "\n" not in str(error) and len(str(error)) < 400
            else:
                assert isinstance(recipe, Recipe)
