"""axolotl's configuration files.

Source: axolotl 0.18.0, utils/schemas/{config,training,peft,model}.py, loaders/{model,adapter}.py, core/builders. There
`bf16: auto` is true on cards that have it and the model is loaded in that dtype; checkpointing is off and, where it is
on, not reentrant; QLoRA quantizes the scales too; what PEFT's preparation makes fp32 is converted back to the model's
dtype before the first step; packed rows are one row of micro_batch_size x sequence_len tokens; `activation_offloading`
takes the place of checkpointing where there are adapters, and wraps each layer in a checkpoint where there are none.
"""

from __future__ import annotations

from typing import Any

from bench.cases.recipes.files.stated import Stated
from bench.cases.recipes.files.trainer import SHARDED
from bench.cases.recipes.recipe import Recipe

VERSION = "axolotl 0.18.0"
SIGNS = ("base_model",)
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}  # names that TrainingArguments has too, of the same class
SILENT = """
    base_model_config model_type tokenizer_* processor_* trust_remote_code strict plugins special_tokens tokens
    added_tokens_overrides chat_template* eot_tokens default_system_message is_*_derived_model revision_of_model
    datasets test_datasets pretraining_dataset dataset_* shuffle_* skip_prepare_dataset num_dataset_shards_to_save
    dataprep_group_size push_dataset_to_hub hf_use_auth_token val_set_size train_on_inputs excess_length_strategy
    min_sample_len max_prompt_len eval_* evals_per_epoch evaluation_strategy do_* bench_* preprocess_iterable
    sample_packing_* multipack_real_batches pretrain_multipack_* pretraining_sample_concatenation streaming*
    curriculum_sampling remove_unused_columns dataloader_* accelerator_config
    output_dir hub_* save_* saves_per_epoch logging_steps load_best_model_at_end metric_for_best_model greater_is_better
    early_stopping_patience loss_watchdog_* resume_from_checkpoint auto_resume_from_checkpoints max_steps num_epochs
    learning_rate embedding_lr* lr_* loraplus_* cosine_* warmup_* weight_decay adam_* torchdistx_path eta_min
    wandb_* use_wandb mlflow_* use_mlflow hf_mlflow_* comet_* use_comet swanlab_* use_swanlab trackio_* use_trackio
    use_tensorboard otel_* use_otel_metrics gradio_* profiler_* include_tkps include_tokens_per_second
    generate_samples num_generation_samples generation_* debug seed tf32 device device_map low_cpu_mem_usage
    gc_steps gc_collect_steps ddp* local_rank world_size use_ray ray_* resources_per_worker
    merge_lora merge_method lora_model_dir lora_fan_in_fan_out lora_alpha_pattern peft_init_lora_weights
    mean_resizing_embeddings fix_untrained_tokens total_num_tokens total_supervised_tokens axolotl_config_path
    torch_compile_* experimental_skip_move_to_device gpu_memory_limit max_memory batch_size rope_scaling
    embeddings_skip_upcast eval_sequence_len eval_batch_size neat_packing trainer_cls
"""
REFUSED = {
    "rl": "is another kind of training than the supervised one that is simulated",
    "reward_model": "is another kind of training than the supervised one that is simulated",
    "process_reward_model": "is another kind of training than the supervised one that is simulated",
    "diffusion": "is another kind of training than the supervised one that is simulated",
    "ebft": "is another kind of training than the supervised one that is simulated",
    "relora": "merges adapters as it trains, which is not simulated",
    "lisa_n_layers": "trains some layers at a time, which is not simulated",
    "unfrozen_parameters": "trains a part of the weights, which is not simulated; leave it out for all",
    "qat": "rounds weights as it trains, which is not simulated",
    "gptq": "needs a GPTQ checkpoint, which a recipe does not simulate; use load_in_4bit",
    "quantize_moe_experts": "quantizes experts one by one, which is not simulated",
}
NOT_SIMULATED = SHARDED | {
    "fsdp_version": "goes with fsdp",
    "fsdp_final_state_dict_type": "goes with fsdp",
    "deepcompile": "goes with deepspeed",
    "dp_shard_size": "a model spread over several cards",
    "dp_replicate_size": "several cards",
    "context_parallel_size": "a row spread over several cards",
    "sequence_parallel_degree": "a row spread over several cards",
    "tensor_parallel_size": "a model spread over several cards",
    "expert_parallel_size": "a model spread over several cards",
    "chunked_cross_entropy": "logits made fp32 chunk by chunk; predicted are whole logits",
    "chunked_cross_entropy_num_chunks": "goes with chunked_cross_entropy",
    "cut_cross_entropy": "a loss without logits; predicted are whole logits",
    "flash_attn_cross_entropy": "a fused loss; predicted is PyTorch's",
    "flash_attn_fuse_mlp": "fused layers; predicted are transformers' own",
    "flash_attn_rms_norm": "fused layers; predicted are transformers' own",
    "lora_mlp_kernel": "fused adapters; predicted are PEFT's own",
    "lora_qkv_kernel": "fused adapters; predicted are PEFT's own",
    "lora_o_kernel": "fused adapters; predicted are PEFT's own",
    "lora_embedding_kernel": "fused adapters; predicted are PEFT's own",
    "tiled_mlp": "layers computed tile by tile; predicted are transformers' own",
    "tiled_mlp_num_shards": "goes with tiled_mlp",
    "use_kernels": "kernels of the hub; predicted are transformers' own layers",
    "experts_implementation": "kernels for experts; predicted are transformers' own",
    "selective_checkpointing": "some results of a layer are kept; predicted is none or all",
    "layer_offloading": "layers wait in the host's memory; predicted are all on the card",
    "fp8": "products in 8 bits; predicted is bf16",
    "neftune_noise_alpha": "noise of the size of the embeddings' output",
    "auto_find_batch_size": "the batch is halved until it fits; predicted is the batch as stated",
    "resize_token_embeddings_to_32x": "a larger vocabulary; predicted is the model's own",
    "shrink_embeddings": "a smaller vocabulary; predicted is the model's own",
    "lora_target_parameters": "adapters on parameters that are no layers",
    "bnb_config_kwargs": "further arguments of BitsAndBytesConfig",
    "peft": "LoftQ's initialization",
    "fp32_norms": "norms in fp32; predicted are they in the model's dtype",
    "use_onebitllms": "layers of 1.58 bits; predicted are the model's own",
    "model_quantization_config": "a quantization other than bitsandbytes'",
    "pad_to_multiple_of": "rows padded to a multiple; predicted are their own lengths",
    "batch_flattening": "a batch in one row; predicted are rows",
}
ATTENTION_SWITCHES = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
LIGER = {
    "liger_rope": "rope",
    "liger_rms_norm": "rms_norm",
    "liger_layer_norm": "layer_norm",
    "liger_glu_activation": "swiglu",
    "liger_swiglu": "swiglu",
    "liger_cross_entropy": "cross_entropy",
    "liger_fused_linear_cross_entropy": "fused_linear_cross_entropy",
}


def recipe(stated: Stated) -> tuple[Recipe, str | None, int | None, int | None]:
    """The recipe, the model, and length and batch where they are stated."""
    stated.silent(SILENT)
    stated.refuse(REFUSED)
    stated.tell(NOT_SIMULATED)
    arguments, dtype = _precision(stated)
    peft = _peft(stated)
    offloading = _checkpointing(stated, arguments, adapters=peft is not None)
    _optimizer(stated, arguments)
    _liger(stated, arguments)
    attention = _attention(stated)
    if peft is None and attention in ("sdpa", "eager"):
        stated.not_honoured.append(
            f"attn_implementation: beside {attention} and without adapters axolotl keeps embeddings, head and norms in "
            f"fp32; predicted are they in {dtype}"
        )
    stated.flag("pad_to_sequence_len")  # rows are as long as they can be
    length, batch = stated.count("sequence_len", 512), stated.count("micro_batch_size", 1)
    found = Recipe(
        "axolotl", arguments, peft=peft, quantization=_quantization(stated, dtype), dtype=dtype, attention=attention,
        batch_size=batch, lengths=(length,), packing=stated.flag("sample_packing"), activation_offloading=offloading,
        autocast_adapter_dtype=stated.flag("peft_autocast_adapter_dtype", True),
    )  # fmt: skip
    model = stated.text("base_model")
    return found, model, length if "sequence_len" in stated else None, batch if "micro_batch_size" in stated else None


def _precision(stated: Stated) -> tuple[dict[str, Any], str]:
    """Autocast and the dtype of the model. On a card without bf16 `auto` is fp16; here it is taken to have it."""
    automatic = stated.value("bf16")
    fp16, whole16 = stated.flag("fp16"), stated.flag("float16")
    if automatic in ("auto", "full"):
        bf16 = not fp16
    else:
        bf16 = stated.flag("bf16", not fp16 and not whole16 and not stated.flag("float32"))
    whole = stated.flag("bfloat16")
    if bf16 or whole:
        return ({} if automatic == "full" else {"bf16": True}), "bfloat16"
    dtype = "float16" if fp16 or whole16 or stated.flag("load_in_8bit") else "float32"
    return ({"fp16": True} if fp16 else {}), dtype


def _checkpointing(stated: Stated, arguments: dict[str, Any], adapters: bool) -> bool:
    """Sets the arguments, and returns whether activations are offloaded."""
    switch, how = stated.value("gradient_checkpointing"), stated.value("activation_offloading")
    options = stated.mapping("gradient_checkpointing_kwargs")
    named = switch in ("offload", "offload_disk")
    offloading = named or (how if isinstance(how, str) else stated.flag("activation_offloading"))
    if offloading in ("legacy", "disk", "hidden_states") or switch == "offload_disk":
        stated.not_honoured.append(f"activation_offloading: {how or switch}; predicted is `true`")
    checkpointing = True if named else stated.flag("gradient_checkpointing")
    if checkpointing and not (offloading and adapters):
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = options or {"use_reentrant": False}
    return bool(offloading)


def _optimizer(stated: Stated, arguments: dict[str, Any]) -> None:
    name = stated.text("optimizer", "adamw_torch_fused") or ""
    arguments["optim"] = OPTIMIZERS.get(name, name)
    options = stated.value("optim_args")
    if options:
        pairs = options.items() if isinstance(options, dict) else ()
        arguments["optim_args"] = ",".join(f"{key}={value}" for key, value in pairs) or str(options)
    targets = stated.names("optim_target_modules")
    if targets:
        arguments["optim_target_modules"] = "all-linear" if targets == "all_linear" else targets
    norm = stated.number("max_grad_norm", 1.0)
    if norm != 1.0:
        arguments["max_grad_norm"] = norm
    micro = stated.count("micro_batch_size", 1)
    accumulation = stated.count("gradient_accumulation_steps", max(1, stated.count("batch_size", micro) // micro))
    if accumulation > 1:
        arguments["gradient_accumulation_steps"] = accumulation
    every = stated.count("torch_empty_cache_steps", 0, least=0)
    if every:
        arguments["torch_empty_cache_steps"] = every
    if stated.value("torch_compile") == "auto" or stated.flag("torch_compile"):
        arguments["torch_compile"] = True
    if stated.flag("group_by_length"):
        arguments["train_sampling_strategy"] = "group_by_length"


def _liger(stated: Stated, arguments: dict[str, Any]) -> None:
    """What is not switched on is off, other than with TrainingArguments' `use_liger_kernel`."""
    kernels = dict.fromkeys(LIGER.values(), False)
    for key, name in LIGER.items():
        kernels[name] |= stated.flag(key)
    if any(kernels.values()):
        arguments["use_liger_kernel"] = True
        arguments["liger_kernel_config"] = kernels


def _attention(stated: Stated) -> str:
    chosen = [name for switch, name in ATTENTION_SWITCHES.items() if stated.flag(switch)]
    name = stated.text("attn_implementation", chosen[0] if chosen else "sdpa") or "sdpa"
    if name not in ("sdpa", "eager") and "flash" not in name:
        stated.not_honoured.append(f"attn_implementation: {name}; predicted is flash_attention_2")
    stated.tell(dict.fromkeys(("xformers_attention", "flex_attention", "sage_attention", "flash_optimum"),
                              "an attention of its own; predicted is sdpa"))  # fmt: skip
    return name if name in ("sdpa", "eager") else "flash_attention_2"


def _quantization(stated: Stated, dtype: str) -> dict[str, Any] | None:
    adapter = stated.text("adapter")
    four, eight = stated.flag("load_in_4bit"), stated.flag("load_in_8bit")
    if adapter == "qlora" and four:
        return {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }  # fmt: skip
    return {"load_in_8bit": True} if adapter == "lora" and eight else None


def _peft(stated: Stated) -> dict[str, Any] | None:
    """LoraConfig as loaders/adapter.py makes it."""
    optional = {
        "modules_to_save": stated.names("lora_modules_to_save"),
        "exclude_modules": stated.names("lora_exclude_modules"),
        "rank_pattern": stated.mapping("lora_rank_pattern"),
        "layers_to_transform": stated.value("peft_layers_to_transform"),
        "layers_pattern": stated.names("peft_layers_pattern"),
        "layer_replication": stated.value("peft_layer_replication"),
        "trainable_token_indices": stated.value("peft_trainable_token_indices"),
        "use_dora": stated.flag("peft_use_dora"),
        "use_rslora": stated.flag("peft_use_rslora"),
    }
    everything = stated.flag("lora_target_linear")
    targets = stated.names("lora_target_modules")
    found = {
        "task_type": "CAUSAL_LM",
        "r": stated.count("lora_r", 8),
        "lora_alpha": stated.number("lora_alpha", 8),
        "lora_dropout": stated.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if everything else targets,
    }
    adapter = stated.text("adapter", choices=("lora", "qlora"))
    if adapter is None:
        return None
    return found | {name: value for name, value in optional.items() if value}
