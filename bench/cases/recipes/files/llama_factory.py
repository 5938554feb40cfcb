"""LLaMA-Factory's configuration files.

Source: LLaMA-Factory 0.9.6, hparams/{model,finetuning,data,training}_args.py, model/{loader,patcher,adapter}.py and
model/model_utils. There LoRA of rank 8 on all linear layers is the default, and checkpointing, reentrant, is on unless
`disable_gradient_checkpointing`; the model keeps its checkpoint's dtype, and all that is trained is made fp32 unless
`pure_bf16`; NF4 quantizes the scales too; PEFT's preparation is not called; rows are cut at 2,048 tokens and padded
to a multiple of 8. Everything else is TrainingArguments'.
"""

from __future__ import annotations

from typing import Any

from bench.cases.recipes.files import trainer
from bench.cases.recipes.files.stated import Stated
from bench.cases.recipes.recipe import Recipe

VERSION = "LLaMA-Factory 0.9.6"
MULTIPLE = 8  # tokens, to which rows are padded
SIGNS = (
    "finetuning_type", "stage", "cutoff_len", "template", "lora_rank", "lora_target", "quantization_bit", "flash_attn",
    "pure_bf16", "neat_packing", "upcast_layernorm", "disable_gradient_checkpointing", "enable_liger_kernel",
)  # fmt: skip
SILENT = """
    adapter_folder cache_dir use_fast_tokenizer split_special_tokens model_revision low_cpu_mem_usage trust_remote_code
    infer_* offload_folder use_kv_cache hf_hub_token ms_hub_token om_hub_token print_param_status export_* vllm_*
    sglang_* image_* video_* crop_to_patches use_audio_in_video audio_sampling_rate rope_scaling use_cache
    template dataset eval_dataset dataset_dir media_dir train_on_prompt mask_history streaming buffer_size mix_strategy
    interleave_probs overwrite_cache preprocessing_* max_samples eval_num_beams ignore_pad_token_for_loss val_size
    eval_on_each_dataset tool_format default_system enable_thinking preserve_thinking tokenized_path
    data_shared_file_system loraplus_* create_new_adapter pissa_iter pissa_convert
    oft_* module_dropout freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
    pref_* dpo_* kto_* simpo_* ppo_* ld_alpha galore_* apollo_* badam_* freeze_vision_tower freeze_multi_modal_projector
    freeze_language_model compute_accuracy disable_shuffling early_stopping_steps plot_loss swanlab_* use_swanlab
    include_effective_tokens_per_second do_sample temperature top_p top_k num_beams max_length max_new_tokens
    repetition_penalty length_penalty skip_special_tokens ray_* resources_per_worker placement_strategy
    master_addr master_port profiler_* enable_torch_profiler profile_modules init_special_tokens
    gradient_checkpointing gradient_checkpointing_kwargs
"""
REFUSED = dict.fromkeys(
    ("ref_model", "reward_model", "use_asft_loss", "use_galore", "use_apollo", "use_badam", "use_llama_pro",
     "mixture_of_depths", "use_mca", "use_megatron_bridge", "use_hyper_parallel", "use_kt"),
    "is another kind of training than one that is simulated",
) | dict.fromkeys(("model_class", "train_dataset"), "is a key of LLaMA-Factory's v1 trainer; give a file of the main "
                  "one, with model_name_or_path")  # fmt: skip
NOT_SIMULATED = {
    "use_unsloth": "Unsloth's own layers; predicted are transformers'",
    "use_unsloth_gc": "checkpoints that wait in the host's memory; predicted are they on the card",
    "upcast_lmhead_output": "logits made fp32 once more",
    "upcast_layernorm": "norms in fp32; predicted are they in the model's dtype",
    "use_adam_mini": "an optimizer with fewer states; predicted is `optim`",
    "use_muon": "an optimizer of its own; predicted is `optim`",
    "shift_attn": "attention within groups; predicted is all",
    "moe_aux_loss_coef": "the loss of a mixture's router",
    "resize_vocab": "a larger vocabulary; predicted is the model's own",
    "add_tokens": "a larger vocabulary; predicted is the model's own",
    "add_special_tokens": "a larger vocabulary; predicted is the model's own",
    "new_special_tokens_config": "a larger vocabulary; predicted is the model's own",
    "use_dft_loss": "a loss of its own; predicted is cross entropy",
    "use_eaft_loss": "a loss of its own; predicted is cross entropy",
    "pissa_init": "adapters that begin as a decomposition of the weights; predicted are steps, not that",
    "adapter_name_or_path": "adapters that are there already; predicted are new ones",
    "fp8": "products in 8 bits; predicted is bf16",
    "use_v1_kernels": "kernels of its own; predicted are transformers' layers",
}
FLASH = "flash_attention_2"
ATTENTIONS = {"auto": "sdpa", "disabled": "eager", "sdpa": "sdpa", "fa2": FLASH, "fa3": FLASH}


def recipe(stated: Stated) -> tuple[Recipe, str | None, int | None, int | None]:
    """The recipe, the model, and length and batch where they are stated."""
    stated.silent(SILENT)
    stated.refuse(REFUSED)
    stated.tell(NOT_SIMULATED)
    stage = stated.text("stage", "sft")
    if stage not in ("sft", "pt"):
        raise stated.wrong("stage", "is another kind of training than those simulated; choose sft or pt")
    arguments, batch_size = trainer.arguments_of(stated)
    for key in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # the model's own switch decides
        arguments.pop(key, None)
    reentrant = stated.flag("use_reentrant_gc", True)
    if not stated.flag("disable_gradient_checkpointing"):
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    if stated.flag("enable_liger_kernel"):
        arguments["use_liger_kernel"] = True
    attention = ATTENTIONS[stated.text("flash_attn", "auto", ATTENTIONS) or "auto"]
    length, apart = _length(stated, pretraining=stage == "pt")
    found = Recipe(
        "LLaMA-Factory", arguments, peft=_peft(stated), quantization=_quantization(stated, arguments),
        attention=attention, batch_size=batch_size, lengths=(length,), masked=apart,
        trained_dtype=None if stated.flag("pure_bf16") else "float32",
    )  # fmt: skip
    stated.not_honoured.append("model_name_or_path: has the dtype of its checkpoint; predicted is bfloat16")
    cutoff = length if "cutoff_len" in stated else None
    return found, stated.text("model_name_or_path"), cutoff, trainer.batch_of(stated)


def _length(stated: Stated, pretraining: bool) -> tuple[int, bool]:
    """The longest row, and whether attention is told where samples begin in it (`neat_packing`)."""
    apart = stated.flag("neat_packing")
    packed = stated.flag("packing", pretraining) or apart
    length = stated.count("cutoff_len", 2048)
    return (length if packed else -(-length // MULTIPLE) * MULTIPLE), apart


def _peft(stated: Stated) -> dict[str, Any] | None:
    kind = stated.text("finetuning_type", "lora")
    rank = stated.count("lora_rank", 8)
    targets = stated.names("lora_target")
    named = [targets] if isinstance(targets, str) else targets
    found: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": stated.number("lora_alpha", 2 * rank),
        "lora_dropout": stated.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if targets in (None, "all") else named,
    }
    further = stated.names("additional_target")
    if further:
        found["modules_to_save"] = [further] if isinstance(further, str) else further
    for switch in ("use_rslora", "use_dora"):
        if stated.flag(switch):
            found[switch] = True
    if kind not in ("lora", "full"):
        raise stated.wrong("finetuning_type", "is not simulated; choose lora or full")
    return found if kind == "lora" else None


def _quantization(stated: Stated, arguments: dict[str, Any]) -> dict[str, Any] | None:
    bits = stated.count("quantization_bit", 16)
    kind = stated.text("quantization_type", "nf4", ("nf4", "fp4"))
    nested = stated.flag("double_quantization", True)
    method = stated.text("quantization_method", "bnb")
    stated.text("quantization_device_map")
    if bits == 16:
        return None
    if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        raise stated.wrong("quantization_bit", f"by {method} is not simulated; choose 4 or 8 by bnb")
    if bits == 8:
        return {"load_in_8bit": True}
    double = {"bnb_4bit_use_double_quant": True} if nested else {}
    dtype = "float16" if "fp16" in arguments else "bfloat16"
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": dtype} | double
