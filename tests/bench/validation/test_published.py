"""Rows of others, read as recipes."""

import pytest

from bench.validation.compare import compare_row
from bench.validation.published import AROUND, LONGEST, recipe_of
from qzo.errors import QzoError

SIZES = {
    "hidden_size": 128, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "intermediate_size": 256,
    "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
COMPARED = {
    "source": {"repo": "huggingface/peft"}, "experiment": "lora/rank32", "model_id": "meta-llama/Llama-9-tiny",
    "gpu": "NVIDIA L40S", "architecture": SIZES, "base_dtype": "bf16", "batch_size": 4, "max_seq_len": 768,
    "use_cache": True, "optimizer": "adamw", "gradient_checkpointing": False,
    "peft_config": {"peft_type": "LORA", "r": 32, "target_modules": ["q_proj", "v_proj"]},
    "measured_mib": {"peak_reserved": 300.0},
}  # fmt: skip
TRAINED = {
    "source": {"repo": "foundation-model-stack/fms-acceleration"}, "model_id": "mistralai/Mistral-9-tiny",
    "gpu": "NVIDIA A100 80GB", "architecture": SIZES, "method": "qlora", "base_dtype": "bf16", "quantization": "nf4-dq",
    "kbit_preparation": True, "autocast": True, "batch_size": 2, "seq_len": 64, "lora_rank": 16, "lora_dropout": 0.1,
    "lora_targets": ["q_proj", "v_proj"], "gradient_checkpointing": True, "optimizer": "adamw (torch, foreach)",
    "measured_mib": {"peak_allocated": 100.0},
}  # fmt: skip


def test_a_row_of_pefts_comparison_is_a_loop_of_its_own_on_the_longest_batch():
    recipe = recipe_of(COMPARED)
    assert (recipe.loop, recipe.use_cache, recipe.masked, recipe.peft_class) == ("plain", True, True, "LoraConfig")
    assert recipe.lengths == (AROUND[0],) * 4 + (LONGEST[768],) * 4 + (AROUND[1],) * 4
    assert recipe_of(COMPARED | {"peft_config": {}}).peft is None  # all weights


def test_a_method_that_pefts_versions_name_or_compute_otherwise_is_told_apart():
    assert recipe_of(COMPARED | {"peft_config": {"peft_type": "BONE", "r": 8}}).peft_class == "MissConfig"
    turned = COMPARED | {"peft_config": {"peft_type": "OFT", "r": 32}}
    assert recipe_of(turned).peft["oft_block_size"] == 0
    with pytest.raises(QzoError, match=r"another computation since PEFT 0\.16"):
        recipe_of(turned | {"versions": {"peft": "0.15.2.dev0"}})


def test_a_row_of_the_trainer_says_autocast_preparation_and_quantization():
    recipe = recipe_of(TRAINED)
    assert recipe.arguments == {"optim": "adamw_torch", "bf16": True, "gradient_checkpointing": True}
    assert recipe.quantization["bnb_4bit_use_double_quant"] and recipe.kbit is not None
    assert recipe.peft["lora_dropout"] == 0.1 and recipe.lengths == (64,)
    assert recipe_of(TRAINED | {"method": "full-finetuning", "quantization": "none"}).peft is None


@pytest.mark.parametrize("row", [COMPARED, TRAINED], ids=["peft", "trainer"])
def test_such_rows_are_predicted(row):
    result = compare_row(row)
    assert result["status"] == "ok" and result["error_percent"]


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (COMPARED, {"optimizer": "lora-fa"}, "the optimizer lora-fa is not known"),
        (COMPARED, {"max_seq_len": 512}, "longest batch of rows cut at 512 tokens"),
        (COMPARED, {"peft_config": {"peft_type": "NEW"}}, "the PEFT method NEW is not in the installed version"),
        (TRAINED, {"fused_kernels": True, "framework_config": "foak"}, "the kernels of foak"),
        (TRAINED, {"quantization": "gptq-4bit"}, "training on gptq-4bit"),
        (TRAINED, {"framework": "litgpt"}, "how litgpt runs a step"),
    ],
)
def test_what_no_recipe_says_is_told_and_not_predicted_as_something_else(row, change, reason):
    with pytest.raises(QzoError, match=reason):
        recipe_of(row | change)
    assert compare_row(row | change)["status"] == "error"
