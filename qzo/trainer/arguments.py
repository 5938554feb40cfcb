"""TrainingArguments: which a zeroth-order Trainer honours, which make no difference, and which it cannot honour."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from qzo.errors import QzoError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED = _names(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps gradient_accumulation_steps label_smoothing_factor tf32 use_cache
    torch_empty_cache_steps logging_strategy logging_steps logging_first_step logging_nan_inf_filter
    include_num_input_tokens_seen log_level disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only
    eval_on_start eval_do_concat_batches eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy length_column_name debug skip_memory_metrics torch_compile torch_compile_backend
    torch_compile_mode
    """
)
IRRELEVANT = _names(  # to a single process, or read by scripts and not by Trainer
    """
    average_tokens_across_devices log_on_each_node log_level_replica save_on_each_node eval_use_gather_object
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    local_rank do_train do_eval do_predict resume_from_checkpoint
    """
)
BETTER = 'QZO has rules of its own; give qzo_options={"momentum": 0.9} or {"betas": (0.9, 0.999), "adam_eps": 1e-8}'
ADAM = ("adamw_torch", "adamw_torch_fused")  # the defaults of transformers' versions
SHARDED = "zeroth-order steps need a single process with the whole model; leave it out, and start one process"
CAST = "it casts the live scales for an evaluation and does not cast them back; load the model with that dtype"
NO_ACTIVATIONS = "it changes nothing: no activations are kept for a backward pass"

REFUSED = {  # the result would be another than what is asked for: name -> why, and what to do
    "weight_decay": "scales that decay shrink the quantized weights, and the steps of QZO have no decay; leave it out",
    "optim": f"{BETTER}, or give optimizers=(qzo.QZO(...), None)",
    "optim_args": BETTER,
    "optim_target_modules": "give optimizers=(qzo.QZO(...), None) with the scales that are to be trained",
    "adam_beta1": BETTER,
    "adam_beta2": BETTER,
    "adam_epsilon": BETTER,
    "neftune_noise_alpha": "both evaluations of a step must see the same function, without noise; leave it out",
    "fp16": "scales gradients, and there are none; leave it out and load a float16 model",
    "fp16_full_eval": CAST,
    "bf16_full_eval": CAST,
    "use_liger_kernel": "its fused loss computes gradients in the forward pass, for nothing; leave it out",
    "liger_kernel_config": "Liger's kernels are made for a backward pass; leave it out",
    "auto_find_batch_size": "it begins anew after steps that were taken already; choose a batch size that fits",
    "enable_jit_checkpoint": "QZOTrainer saves a checkpoint on SIGTERM by itself; leave it out",
    "deepspeed": SHARDED,
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "parallelism_config": SHARDED,
}
WARNED = {  # the result is the same, or there is another word for it
    "max_grad_norm": 'there is no gradient to clip; the bound of d is qzo_options={"clip_threshold": 100.0}',
    "bf16": "autocast does not reach the quantized layers, which compute in the model's dtype; load it in bfloat16",
    "activation_checkpointing": NO_ACTIVATIONS,
    "activation_checkpointing_kwargs": NO_ACTIVATIONS,
    "gradient_checkpointing": NO_ACTIVATIONS,
    "gradient_checkpointing_kwargs": NO_ACTIVATIONS,
}
OFF: dict[str, tuple[Any, ...]] = {  # values that ask for nothing
    "weight_decay": (0.0,),
    "optim": ADAM,
    "adam_beta1": (0.9,),
    "adam_beta2": (0.999,),
    "adam_epsilon": (1e-8,),
    "max_grad_norm": (1.0, 0.0, None),
}
NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def check_arguments(arguments: Any) -> None:
    """Go through the fields of some TrainingArguments that differ from their defaults.

    Raises QzoError for the first one in REFUSED, and warns once of those in WARNED. Fields that a later version of
    transformers adds are left alone. What a child of TrainingArguments (TRL's configurations) declares as its own
    default, or leaves open and fills in, was not asked for either.
    """
    base = _defaults(next(kind for kind in type(arguments).__mro__ if kind.__name__ == "TrainingArguments"))
    declared = _defaults(type(arguments))
    asked = [name for name in (*REFUSED, *WARNED) if name in declared and _asks(arguments, name, base, declared)]
    for name in asked:
        if name in REFUSED:
            link = "" if name == "fp16" else "cannot be honoured: "
            raise QzoError(f"{name}={_shown(getattr(arguments, name))} {link}{REFUSED[name]}")
    for name in asked:
        if not (name.startswith("gradient_checkpointing") and name.replace("gradient", "activation") in asked):
            message = f"{name}={_shown(getattr(arguments, name))}: {WARNED[name]}"
            warnings.warn(message, stacklevel=2)


def check_autocast(arguments: Any, model: Any) -> None:
    """Raise QzoError for autocast that no layer can follow: to bfloat16 of a float16 model, on a CPU."""
    halves = any(tensor.dtype == torch.float16 for tensor in model.parameters())
    if arguments.bf16 and halves and arguments.device.type == "cpu":
        raise QzoError(
            "bf16=True: autocast on a CPU does not take the float16 tensors of this model; leave it out, or load the "
            "model with dtype=torch.bfloat16"
        )


def check_optimizer(given: dict[str, Any], qzo_options: dict[str, Any]) -> None:
    """Raise QzoError where what was given to the Trainer itself makes no optimizer, or would be passed over."""
    if given.get("optimizer_cls_and_kwargs") is not None:
        raise QzoError("optimizer_cls_and_kwargs is for gradients; give optimizers=(qzo.QZO(...), None) or qzo_options")
    optimizer = (given.get("optimizers") or (None,))[0]
    if optimizer is not None and qzo_options:
        raise QzoError(
            f"qzo_options={qzo_options} beside an optimizer: they are for the one that is made where none is given; "
            f"give them to the {type(optimizer).__name__} itself"
        )


def check_reference(given: dict[str, Any]) -> None:
    """Raise QzoError where TRL would make the reference of a preference loss itself: not from the codes qzo reads."""
    precomputed = getattr(given.get("args"), "precompute_ref_log_probs", False)
    if given.get("ref_model") is None and not precomputed:
        raise QzoError(
            "ref_model=None: TRL would load the reference by transformers, which does not read the model as qzo does; "
            "give ref_model=qzo.load(...) of the same model, or precompute_ref_log_probs=True"
        )


def _asks(arguments: Any, name: str, base: dict[str, Any], declared: dict[str, Any]) -> bool:
    """Whether a value is neither "off" nor what its class makes of a field that nobody set."""
    value = _plain(getattr(arguments, name))
    if value in OFF.get(name, NOTHING) or (name == "fsdp_config" and not arguments.fsdp):
        return False
    alias = name.replace("activation", "gradient")  # of an older name, which TRL's configurations still set
    name = alias if declared.get(alias) != base.get(alias) else name
    own, original = declared[name], base.get(name)
    return own == original or not (own is None or value == _plain(own))


def _defaults(kind: type) -> dict[str, Any]:
    """Field -> default as it is declared; None for a factory."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(kind)
    }


def _plain(value: Any) -> Any:
    """A member of an enumeration as its value."""
    return getattr(value, "value", value)


def _shown(value: Any) -> str:
    return repr(_plain(value))
