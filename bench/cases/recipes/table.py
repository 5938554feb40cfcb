"""The first-order methods of the table as recipes: what `--set` and `--peft-config` change."""

from __future__ import annotations

from dataclasses import replace

from bench.cases.recipes.recipe import Recipe

PEFT = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}  # on query and value projections, as in the paper
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OPTIM = "adamw_torch_fused"
# What the Trainer does on a GPU that has bf16, and with it TRL, axolotl and LLaMA-Factory: autocast, fused AdamW.
BF16 = {"bf16": True, "optim": OPTIM}
LORA = Recipe("lora", BF16, PEFT)
QLORA = Recipe("qlora", BF16, PEFT, quantization=NF4, kbit={"use_gradient_checkpointing": False})
# As TRL's SFTTrainer has it: no turn of embeddings, head and norms to fp32, and adapters in bf16 as in QLoRA's paper.
QLORA_LEAN = Recipe(
    "qlora-lean", {"bf16": True, "optim": "paged_adamw_8bit", "gradient_checkpointing": True}, PEFT,
    quantization=NF4 | {"bnb_4bit_use_double_quant": True}, trained_dtype="bfloat16",
)  # fmt: skip
DORA = Recipe("dora", BF16, PEFT | {"use_dora": True})
LORA_FA = Recipe("lora-fa", {"bf16": True, "optim": "lora_fa"}, PEFT)
PREFIX = Recipe("prefix", BF16, {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}, "PrefixTuningConfig")

# Full fine-tuning is in the table as a convention, bytes a parameter, and runs in a bare loop; a recipe of it that says
# more is run by the Trainer.
WHOLE = {
    "ft-bf16": Recipe("ft-bf16", {"optim": OPTIM}),
    "ft-mixed": Recipe("ft-mixed", {"optim": "adamw_mixed"}),
    "ft-amp": Recipe("ft-amp", BF16, dtype="float32"),
    "ft-sgd": Recipe("ft-sgd", {"optim": "sgd"}),
}
ADAPTED = (LORA, LORA_FA, DORA, PREFIX, QLORA, QLORA_LEAN)
RECIPES: dict[str, Recipe] = WHOLE | {recipe.name: recipe for recipe in ADAPTED}
OWN_OPTIMIZERS = ("adamw_mixed", "lora_fa")  # by which a method is what it is, and which the Trainer does not have

# These two in a bare loop without autocast, which is what they were until records told their recipe.
BARE = {recipe.name: replace(recipe, arguments={"optim": OPTIM}, loop="bare") for recipe in (LORA, QLORA)}
