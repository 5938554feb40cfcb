"""The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory take as well.

Source: transformers 5.23, training_args.py; keys that version 5 dropped (`warmup_ratio`, `evaluation_strategy`, ...)
are known too. What is left out of a file is left out of the arguments, so that the defaults are those of the installed
version, but for the batch of a device, which is 8.
"""

from __future__ import annotations

from typing import Any

from bench.cases.recipes.files.stated import Stated

BATCH_SIZE = 8
SIGNS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim", "bf16", "fp16",
    "learning_rate", "num_train_epochs", "max_steps", "output_dir", "lr_scheduler_type", "logging_steps", "save_steps",
)  # fmt: skip
SILENT = """
    output_dir overwrite_output_dir do_train do_eval do_predict resume_from_checkpoint seed data_seed run_name project
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
    weight_decay adam_beta1 adam_beta2 adam_epsilon
    tf32 full_determinism average_tokens_across_devices
    logging_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica
    log_on_each_node disable_tqdm report_to include_num_input_tokens_seen include_tokens_per_second
    trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy evaluation_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    per_gpu_eval_batch_size prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics include_inputs_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval
    predict_with_generate generation_max_length generation_num_beams generation_config sortish_sampler
    save_strategy save_steps save_on_each_node save_total_limit save_safetensors save_only_model enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision push_to_hub_token push_to_hub_model_id push_to_hub_organization
    use_cpu no_cuda use_ipex use_mps_device accelerator_config half_precision_backend fp16_backend fp16_opt_level
    jit_mode_eval tpu_num_cores tpu_metrics_debug mp_parameters
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order past_index
    remove_unused_columns label_names length_column_name dispatch_batches split_batches
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    local_rank debug skip_memory_metrics ray_scope torchdynamo torch_compile_backend torch_compile_mode
"""
SHARDED = {
    "deepspeed": "weights, gradients and states are shared by cards or the host; predicted is one card with all",
    "fsdp": "weights, gradients and states are shared by several cards; predicted is one card with all",
    "fsdp_config": "goes with fsdp",
    "parallelism_config": "a model spread over several cards; predicted is one card with all",
}
NOT_SIMULATED = SHARDED | {
    "auto_find_batch_size": "the batch is halved until it fits; predicted is the batch as stated",
    "neftune_noise_alpha": "noise of the size of the embeddings' output",
    "label_smoothing_factor": "a loss from all logits, outside the model",
    "fsdp_transformer_layer_cls_to_wrap": "goes with fsdp",
    "fsdp_min_num_params": "goes with fsdp",
}


def arguments_of(stated: Stated, checkpointing: bool = False, bf16: bool = False) -> tuple[dict[str, Any], int]:
    """TrainingArguments that concern memory, where they differ from their defaults, and the batch of a device.

    `checkpointing` and `bf16` are what holds where nothing is stated.
    """
    stated.silent(SILENT)
    stated.tell(NOT_SIMULATED)
    arguments: dict[str, Any] = {}
    fp16 = stated.flag("fp16")
    if stated.flag("bf16", bf16 and not fp16):
        arguments["bf16"] = True
    if fp16:
        arguments["fp16"] = True
    _checkpointing(stated, arguments, checkpointing)
    accumulation = stated.count("gradient_accumulation_steps", 1)
    if accumulation > 1:
        arguments["gradient_accumulation_steps"] = accumulation
    _optimizer(stated, arguments)
    every = stated.count("torch_empty_cache_steps", 0, least=0)
    if every:
        arguments["torch_empty_cache_steps"] = every
    for switch in ("torch_compile", "use_liger_kernel"):
        if stated.flag(switch):
            arguments[switch] = True
    kernels = stated.mapping("liger_kernel_config")
    if kernels:
        arguments["liger_kernel_config"] = kernels
    by_length = stated.flag("group_by_length")
    sampling = stated.text("train_sampling_strategy", choices=("random", "sequential", "group_by_length"))
    if by_length or sampling not in (None, "random"):
        arguments["train_sampling_strategy"] = "group_by_length" if by_length else sampling
    old = stated.count("per_gpu_train_batch_size", BATCH_SIZE)
    return arguments, stated.count("per_device_train_batch_size", old)


def batch_of(stated: Stated) -> int | None:
    """The batch of a device, where the file has it."""
    key = "per_device_train_batch_size"
    return stated.count(key, BATCH_SIZE) if key in stated else None


def _checkpointing(stated: Stated, arguments: dict[str, Any], default: bool) -> None:
    """Version 5.23 has `activation_checkpointing` as another name of it."""
    default = stated.flag("activation_checkpointing", default)
    if stated.flag("gradient_checkpointing", default):
        arguments["gradient_checkpointing"] = True
    options = stated.mapping("activation_checkpointing_kwargs")
    options = stated.mapping("gradient_checkpointing_kwargs") or options
    if options and "gradient_checkpointing" in arguments:
        arguments["gradient_checkpointing_kwargs"] = options


def _optimizer(stated: Stated, arguments: dict[str, Any]) -> None:
    name = stated.text("optim")
    if stated.flag("adafactor"):
        name = "adafactor"
    if name:
        arguments["optim"] = name
    options = stated.text("optim_args")
    if options:
        arguments["optim_args"] = options
    targets = stated.names("optim_target_modules")
    if targets:
        arguments["optim_target_modules"] = targets
    norm = stated.number("max_grad_norm", 1.0)
    if norm != 1.0:
        arguments["max_grad_norm"] = norm
