"""A recipe as a model, an optimizer and steps: what the Trainer of transformers does, on tensors with data or without.

PEFT adds its own adapters, and `bench.methods.optimizers.made` makes the optimizer. What stands here is the order of
things in a step: transformers/trainer.py, `training_step`, and accelerate, which puts the forward of the model under
autocast and turns its outputs into fp32 (`convert_outputs_to_fp32`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.cases.case import BenchCase
from bench.cases.recipes.recipe import Recipe, differences
from bench.cases.recipes.table import RECIPES
from bench.cases.text import Batch
from bench.methods.checkpointing import check_checkpointing, checkpoint_options, enable_checkpointing
from bench.methods.compiled import MOST
from bench.methods.liger.layers import apply_liger
from bench.methods.losses.choice import replace_loss
from bench.methods.offloading import offloading_of
from bench.methods.optimizers.made import name_of, optimizer_of
from bench.methods.prepared import Enter, Prepared
from bench.methods.quantized.int8 import to_int8
from bench.methods.quantized.nf4 import BLOCK_SIZE, to_nf4
from bench.methods.targets import adapter_targets
from bench.methods.world import World
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MicroBatch = dict[str, Tensor]
Method = Callable[[BenchCase, World], Prepared]
Autocast = Callable[[], AbstractContextManager]


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
        autocast = partial(world.autocast, getattr(torch, settled.autocast)) if settled.autocast else None
        step = STEP_OF[settled.loop](model, optimizer, autocast, settled.arguments.get("max_grad_norm", 1.0))
        if settled.activation_offloading:
            step.around = offloading_of(model)

        def bench_step(batch: Batch, enter: Enter) -> float:
            return float(step([part.tensors() for part in batch.parts()], enter))

        dtype = f"{settled.autocast}-autocast" if settled.autocast else settled.dtype
        name = name_of(optimizer, settled)
        prepared = Prepared(model, optimizer, bench_step, dtype, name, quantized(settled), recipe=settled)
        if case.recipe is not None and case.method in RECIPES:
            prepared.notes.append(f"other than in the table: {differences(case.recipe, RECIPES[case.method])}")
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


class RecipeStep:
    """Optimizer steps of a prepared recipe, as the Trainer runs them.

    Args:
        model: with its adapters, in training mode.
        optimizer: over all that is trained.
        autocast: what the model's forward runs under.
        max_grad_norm: norm to which gradients are clipped; with 0 the Trainer takes the norm all the same.

    `around` is the context of each micro-batch's forward and backward.
    """

    around: AbstractContextManager = nullcontext()

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: Autocast | None, max_grad_norm: float = 1.0
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast
        self.max_grad_norm = max_grad_norm or float("inf")
        self.counts = _takes_counts(model)

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        """One step: forward and backward of each batch, clipping, update, gradients dropped. The last batch's loss."""
        enter("forward")
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in micro_batches)
        for number, batch in enumerate(micro_batches):
            if number:
                enter("forward")
            with self.around:
                loss = self._loss(batch, items, len(micro_batches))
                enter("backward")
                loss.backward()
            loss = loss.detach()
        enter("step")
        self._clip()
        self.optimizer.step()
        self.model.zero_grad()
        return loss

    def _loss(self, batch: MicroBatch, items: Any, accumulated: int) -> Tensor:
        """The outputs die with this call, as with `Trainer.compute_loss`."""
        counts = {"num_items_in_batch": items} if self.counts else {}
        with self.autocast() if self.autocast else nullcontext():
            output = self.model(**batch, **counts)
        if self.autocast:
            output = {name: item.float() for name, item in output.items() if isinstance(item, Tensor)}
        loss: Tensor = output["loss"]
        return loss if self.counts else loss / accumulated

    @torch.no_grad()
    def _clip(self) -> None:
        """torch.nn.utils.clip_grad_norm_; on tensors without data as it runs on a GPU."""
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not grads:  # each was used and dropped within backward
            return
        if not grads[0].is_meta:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            return
        norm = torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(grads, 2.0)]), 2.0)
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))


class PlainStep(RecipeStep):
    """The same by a loop of one's own, as PEFT's comparison of methods has it (method_comparison/MetaMathQA): its name
    `outputs` is bound anew only when the next forward returns, and gradients are dropped before that forward.
    """

    outputs: Any = None

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        enter("forward")
        self.optimizer.zero_grad()
        for number, batch in enumerate(micro_batches):
            if number:
                enter("forward")
            with self.autocast() if self.autocast else nullcontext():
                self.outputs = self.model(**batch)
            enter("backward")
            self.outputs.loss.backward()
        enter("step")
        self._clip()
        self.optimizer.step()
        loss: Tensor = self.outputs.loss.detach()
        return loss


class BareStep(RecipeStep):
    """Forward, backward and update, and nothing else."""

    def __call__(self, micro_batches: Sequence[MicroBatch], enter: Enter = lambda phase: None) -> Tensor:
        for batch in micro_batches:
            enter("forward")
            with self.autocast() if self.autocast else nullcontext():
                loss = self.model(**batch).loss
            enter("backward")
            loss.backward()
        enter("step")
        self.optimizer.step()
        self.optimizer.zero_grad()
        detached: Tensor = loss.detach()
        return detached


STEP_OF = {"trainer": RecipeStep, "plain": PlainStep, "bare": BareStep}


def _takes_counts(model: nn.Module) -> bool:
    """Whether the model divides its loss by a number of labels it is told (`Trainer.model_accepts_loss_kwargs`)."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    return any(
        item.kind is inspect.Parameter.VAR_KEYWORD for item in inspect.signature(base.forward).parameters.values()
    )


def loaded(recipe: Recipe, world: World) -> PreTrainedModel:
    """The model as `from_pretrained` leaves it, quantized where the recipe says so."""
    model = world.model(getattr(torch, recipe.dtype))
    model.config.use_cache = recipe.use_cache
    asked = recipe.quantization or {}
    if asked.get("load_in_8bit"):
        return to_int8(model)
    return to_nf4(model, bool(asked.get("bnb_4bit_use_double_quant"))) if asked.get("load_in_4bit") else model


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
