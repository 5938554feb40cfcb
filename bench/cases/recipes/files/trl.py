"""TRL's supervised fine-tuning: what `trl sft --config FILE` takes, or TrainingArguments alone.

Source: TRL 1.16.0, trainer/{base_config,sft_config,model_config,sft_trainer}.py and scripts/{sft,utils}.py. There bf16
autocast and checkpointing are on, the model is in fp32 unless `dtype` says otherwise, rows are cut at 1,024 tokens, the
loss goes over tiles of 4,096 tokens and 32,768 words, never over all logits, and adapters on a quantized model are
bf16. `loss_type: chunked_nll` is read as TRL 1.10 computed it, 256 tokens at a time; in 1.16 it is `nll`.

A file whose keys are all TrainingArguments' own has their defaults and the whole logits.
"""

from __future__ import annotations

from typing import Any

from bench.cases.recipes.files import trainer
from bench.cases.recipes.files.stated import DTYPES, Stated
from bench.cases.recipes.recipe import Recipe

VERSION = "TRL 1.16.0 or transformers' TrainingArguments"
CHUNK = 256  # tokens, of `chunked_nll`
MAX_LENGTH = 1024
OWN = (
    "model_name_or_path", "use_peft", "lora_r", "lora_alpha", "max_length", "max_seq_length", "packing", "dataset_name",
    "load_in_4bit", "load_in_8bit", "attn_implementation", "loss_type", "activation_offloading", "padding_free",
    "dtype", "torch_dtype",
)  # fmt: skip
SIGNS = OWN + trainer.SIGNS
SILENT = """
    model_revision trust_remote_code chat_template_path chat_template dataset_text_field dataset_kwargs dataset_num_proc
    eos_token pad_token truncation_mode shuffle_dataset eval_packing completion_only_loss assistant_only_loss
    dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming ignore_bias_buffers datasets
    streaming test_split_size use_cache dataset_mixer dataset_mixture dataset_splits preprocessing_num_workers env
    dataset_batch_size num_of_sequences chars_per_token lora_task_type tokenizer_name_or_path hub_token
    bnb_4bit_quant_storage
"""
NOT_SIMULATED = {
    "router_aux_loss_coef": "the loss of a mixture's router",
    "pad_to_multiple_of": "rows padded to a multiple; predicted are their own lengths",
    "lora_target_parameters": "adapters on parameters that are no layers",
    "model_init_kwargs": "further arguments of from_pretrained",
}


def recipe(stated: Stated) -> tuple[Recipe, str | None, int | None, int | None]:
    """The recipe, the model, and length and batch where they are stated."""
    if not any(key in stated for key in OWN):
        arguments, batch_size = trainer.arguments_of(stated)
        found = Recipe("Trainer", arguments, batch_size=batch_size, use_cache=stated.flag("use_cache"))
        return found, None, None, trainer.batch_of(stated)
    stated.silent(SILENT)
    stated.tell(NOT_SIMULATED)
    arguments, batch_size = trainer.arguments_of(stated, checkpointing=True, bf16=True)
    if "use_liger_kernel" in arguments:  # the loss is TRL's own
        kernels = arguments.get("liger_kernel_config", {})
        arguments["liger_kernel_config"] = kernels | {"fused_linear_cross_entropy": False}
    dtype = _dtype(stated)
    quantization = _quantization(stated, dtype)
    peft = _peft(stated)
    length = stated.count("max_length", stated.count("max_seq_length", MAX_LENGTH))
    bins = stated.text("packing_strategy", "bfd", ("bfd", "bfd_split", "bfd-requeue", "wrapped"))
    packed = stated.flag("packing")
    found = Recipe(
        "TRL SFT", arguments, peft=peft, quantization=quantization, dtype=dtype, attention=_attention(stated),
        batch_size=batch_size, lengths=(length,), packing=stated.flag("padding_free") or (packed and bins != "wrapped"),
        activation_offloading=stated.flag("activation_offloading"), **_loss(stated),
        trained_dtype="bfloat16" if peft and quantization else None,
    )  # fmt: skip
    stated_length = length if "max_length" in stated or "max_seq_length" in stated else None
    return found, stated.text("model_name_or_path"), stated_length, trainer.batch_of(stated)


def _loss(stated: Stated) -> dict[str, Any]:
    kind = stated.text("loss_type", "nll", ("nll", "dft", "chunked_nll"))
    return {"loss": "chunked", "loss_chunk": CHUNK} if kind == "chunked_nll" else {"loss": "tiled"}


def _dtype(stated: Stated) -> str:
    """`auto` is the checkpoint's own, which the file does not have."""
    older = stated.text("torch_dtype", "float32", ("auto", *DTYPES))
    dtype = stated.text("dtype", older, ("auto", *DTYPES)) or "float32"
    if dtype == "auto":
        stated.not_honoured.append("dtype: auto is the checkpoint's; predicted is bfloat16")
        return "bfloat16"
    return dtype


def _attention(stated: Stated) -> str:
    name = stated.text("attn_implementation", "sdpa") or "sdpa"
    flash = stated.flag("use_flash_attention_2") or "flash" in name  # kernels-community/flash-attn2 and its sisters
    return "flash_attention_2" if flash else (name if name == "eager" else "sdpa")


def _quantization(stated: Stated, dtype: str) -> dict[str, Any] | None:
    kind = stated.text("bnb_4bit_quant_type", "nf4", ("nf4", "fp4"))
    nested = stated.flag("use_bnb_nested_quant")
    four, eight = stated.flag("load_in_4bit"), stated.flag("load_in_8bit")
    if four and eight:
        raise stated.wrong("load_in_8bit", "cannot stand beside load_in_4bit; choose one")
    if four:
        double = {"bnb_4bit_use_double_quant": True} if nested else {}
        return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype} | double
    return {"load_in_8bit": True} if eight else None


def _peft(stated: Stated) -> dict[str, Any] | None:
    """LoraConfig as `get_peft_config` makes it."""
    targets = stated.names("lora_target_modules")
    if isinstance(targets, list) and len(targets) == 1:
        targets = targets[0] if targets[0] == "all-linear" else targets
    found: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": stated.count("lora_r", 16),
        "lora_alpha": stated.number("lora_alpha", 32),
        "lora_dropout": stated.number("lora_dropout", 0.05),
        "target_modules": targets,
    }
    optional = {
        "modules_to_save": stated.names("lora_modules_to_save"),
        "use_rslora": stated.flag("use_rslora"),
        "use_dora": stated.flag("use_dora"),
    }
    if not stated.flag("use_peft"):
        return None
    return found | {name: value for name, value in optional.items() if value}
