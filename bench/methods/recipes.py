"""A recipe as a model, an optimizer and steps: what the Trainer of transformers does, on tensors with data or without.

PEFT adds its own adapters, `bench.methods.optimizers.made` makes the optimizer, and `bench.methods.steps` the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.cases.case import BenchCase
from bench.cases.recipes.recipe import Recipe, differences
from bench.cases.recipes.table import RECIPES, WHOLE
from bench.cases.text import Batch
from bench.methods.activations.checkpointing import check_checkpointing, checkpoint_options, enable_checkpointing
from bench.methods.activations.compiled import MOST
from bench.methods.liger.layers import apply_liger
from bench.methods.losses.choice import replace_loss
from bench.methods.optimizers.made import name_of, optimizer_of
from bench.methods.prepared import Enter, Prepared
from bench.methods.quantized.int8 import to_int8
from bench.methods.quantized.nf4 import BLOCK_SIZE, to_nf4
from bench.methods.steps import step_of
from bench.methods.targets import adapter_targets
from bench.methods.world import World
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Method = Callable[[BenchCase, World], Prepared]
BY_TRAINER = "run by the Trainer, with a mask and gradients clipped; without options the method is a bare loop"
CLEARED = (0, 20)  # PEFT, from which on its preparation empties the cache (auto_clear_cache)


def recipe_method(
    recipe: Recipe, make_optimizer: Callable[[Recipe, nn.Module], torch.optim.Optimizer] = optimizer_of
) -> Method:
    """The method of the bench that trains by `recipe`, with the batch size, lengths and checkpointing of its case.

    `make_optimizer` makes one that is handed to the Trainer, where its arguments cannot name it.
    """

    def prepare(case: BenchCase, world: World) -> Prepared:
        settled = of_case(recipe, case)
        base = loaded(settled, world)
        model = world.place(with_adapters(settled, base, world)).train()
        optimizer = make_optimizer(settled, model)
        step = step_of(settled, model, optimizer, world)

        def bench_step(batch: Batch, enter: Enter) -> float:
            return float(step([part.tensors() for part in batch.parts()], enter))

        dtype = f"{settled.autocast}-autocast" if step.autocast else settled.dtype
        name = name_of(optimizer, settled)
        prepared = Prepared(model, optimizer, bench_step, dtype, name, quantized(settled), recipe=settled)
        if case.recipe is not None and case.method in RECIPES:
            prepared.notes.append(f"other than in the table: {differences(case.recipe, RECIPES[case.method])}")
            prepared.notes += [BY_TRAINER] if case.method in WHOLE and settled.loop == "trainer" else []
        if settled.quantization and any(parameter.dim() == 3 for parameter in base.parameters()):
            fp32 = ", and PEFT turns them into fp32" if settled.kbit is not None else ""
            prepared.notes.append(f"bitsandbytes leaves stacked MoE experts unquantized{fp32}")
        prepared.notes += [MOST] if settled.arguments.get("torch_compile") else []
        return prepared

    return prepare


def or_recipe(method: Method) -> Method:
    """The method, or the recipe of a case that has one."""

    @wraps(method)
    def prepare(case: BenchCase, world: World) -> Prepared:
        return (method if case.recipe is None else recipe_method(case.recipe))(case, world)

    return prepare


def of_case(recipe: Recipe, case: BenchCase) -> Recipe:
    """The recipe with what the case says of it: batch, length, and checkpointing where it is asked for."""
    changes: dict[str, Any] = {"batch_size": case.batch_size}
    if len(set(recipe.lengths)) == 1:
        changes["lengths"] = (case.seq_len,)
    if case.gradient_checkpointing:
        changes["arguments"] = recipe.arguments | {"gradient_checkpointing": True}
        if recipe.kbit is not None:
            changes["kbit"] = recipe.kbit | {"use_gradient_checkpointing": True}
    return replace(recipe, **changes)


def loaded(recipe: Recipe, world: World) -> PreTrainedModel:
    """The model as `from_pretrained` leaves it, quantized where the recipe says so."""
    model = world.model(getattr(torch, recipe.dtype))
    model.config.use_cache = recipe.use_cache
    asked = recipe.quantization or {}
    if asked.get("load_in_8bit"):
        return to_int8(model)
    if not asked.get("load_in_4bit"):
        return model
    computed = asked.get("bnb_4bit_compute_dtype")
    return to_nf4(model, bool(asked.get("bnb_4bit_use_double_quant")), getattr(torch, computed) if computed else None)


def with_adapters(recipe: Recipe, model: PreTrainedModel, world: World) -> nn.Module:
    """Prepared for low-bit training, with adapters, kernels and a loss of its own, as far as the recipe says so."""
    with quiet_libraries():
        import peft
    by_trainer = bool(recipe.arguments.get("gradient_checkpointing"))
    result: Any = model
    if recipe.kbit is not None:
        again: dict[str, Any] = {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {}} | recipe.kbit
        if again["use_gradient_checkpointing"]:
            check_checkpointing(model)
        options = again | {"gradient_checkpointing_kwargs": checkpoint_options(world)}
        result = peft.prepare_model_for_kbit_training(model, **options)
        if _clears(recipe, peft.__version__) and model.device.type == "meta":  # with data PEFT has done so
            world.empty_cache()
        if again["use_gradient_checkpointing"]:  # by PEFT's own default reentrant, as is torch's
            enable_checkpointing(model, world, {"use_reentrant": True} | (again["gradient_checkpointing_kwargs"] or {}))
    if recipe.peft is None:
        model.requires_grad_(True)
    else:
        if by_trainer and recipe.kbit is None:
            result.enable_input_require_grads()
        with torch.device(model.device):
            result = peft.get_peft_model(
                result, _peft_config(recipe, model), autocast_adapter_dtype=recipe.autocast_adapter_dtype
            )
        if not recipe.autocast_adapter_dtype:
            _cast_without_data(result)
    if by_trainer:
        enable_checkpointing(model, world, recipe.arguments.get("gradient_checkpointing_kwargs") or {})
    if recipe.trained_dtype is not None:
        _cast_trained(recipe, result, getattr(torch, recipe.trained_dtype))
    apply_liger(recipe, result)
    replace_loss(recipe, result, world)
    return result.train()


def _clears(recipe: Recipe, installed: str) -> bool:
    """Whether PEFT's preparation empties the cache when all is cast (peft/utils/other.py)."""
    version = recipe.versions.get("peft", installed)
    recent = tuple(int(part) for part in version.split(".")[:2]) >= CLEARED
    return recent and bool((recipe.kbit or {}).get("auto_clear_cache", True))


def _cast_without_data(model: nn.Module) -> None:
    """Adapters in the dtype of the weight that they are beside, which PEFT leaves out where there is no data
    (peft/tuners/tuners_utils.py, `_move_adapter_to_device_of_base_layer`).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(weight, Tensor) and weight.is_meta and weight.is_floating_point():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(weight.dtype)


def _cast_trained(recipe: Recipe, model: nn.Module, dtype: torch.dtype) -> None:
    """One after another. DoRA's magnitudes are never lowered (TRL 1.16, trainer/sft_trainer.py)."""
    for name, parameter in model.named_parameters():
        lowered = "lora_magnitude_vector" in name and dtype is not torch.float32
        if parameter.requires_grad and not lowered:
            parameter.data = parameter.data.to(dtype)


def _peft_config(recipe: Recipe, model: PreTrainedModel) -> Any:
    import peft

    options = dict(recipe.peft or {})
    kind = getattr(peft, recipe.peft_class)
    if recipe.peft_class == "LoraConfig" and "target_modules" not in options:
        options["target_modules"] = adapter_targets(model)
    return kind(**options)


def quantized(recipe: Recipe) -> dict[str, Any] | None:
    """What a record tells of the base model's format."""
    asked = recipe.quantization or {}
    if asked.get("load_in_8bit"):
        return {"format": "int8", "bits": 8, "group_size": None}
    return {"format": "nf4", "bits": 4, "group_size": BLOCK_SIZE} if asked.get("load_in_4bit") else None
