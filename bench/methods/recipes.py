"""A recipe as a model, an optimizer and steps on tensors without data: what the Trainer of transformers does on a GPU.

The optimizer is the class that the Trainer would take, with the Trainer's own arguments and groups of parameters; PEFT
adds its own adapters. What stands here is the order of things in a step: transformers/trainer.py, `training_step`, and
accelerate, which puts the model's forward under autocast and turns its outputs into fp32 (`convert_outputs_to_fp32`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.cases.recipe import Recipe
from bench.methods.int8 import to_int8
from bench.methods.nf4 import to_nf4
from bench.methods.prepared import checkpoint_options
from bench.methods.world import World
from qzo.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MicroBatch = dict[str, Tensor]


class RecipeStep:
    """Optimizer steps of a prepared recipe, as the Trainer runs them.

    Args:
        model: with its adapters, in training mode.
        optimizer: over all that is trained.
        autocast: what the model's forward runs under.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, autocast: Callable[[], AbstractContextManager] | None
    ) -> None:
        self.model, self.optimizer, self.autocast = model, optimizer, autocast

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> None:
        """One step: forward and backward of each batch, clipping, update, gradients dropped."""
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in micro_batches)
        for batch in micro_batches:
            self._loss(batch, items).backward()
        self._clip()
        self.optimizer.step()
        self.model.zero_grad()

    def _loss(self, batch: MicroBatch, items: Any) -> Tensor:
        """The outputs die with this call, as with `Trainer.compute_loss`."""
        with self.autocast() if self.autocast else nullcontext():
            output = self.model(**batch, num_items_in_batch=items)
        if self.autocast:
            output = {name: item.float() for name, item in output.items() if isinstance(item, Tensor)}
        return output["loss"]

    @torch.no_grad()
    def _clip(self) -> None:
        """torch.nn.utils.clip_grad_norm_ as on a GPU; with max_grad_norm=0 the Trainer takes the norm all the same."""
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([norm.float() for norm in torch._foreach_norm(grads, 2.0)]), 2.0)
        torch._foreach_mul_(grads, (1.0 / (norm + 1e-6)).clamp(max=1.0))


class PlainStep(RecipeStep):
    """The same by a loop of one's own, as PEFT's comparison of methods has it (method_comparison/MetaMathQA): its name
    `outputs` is bound anew only when the next forward returns, and gradients are dropped before that forward.
    """

    outputs: Any = None

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.optimizer.zero_grad()
        for batch in micro_batches:
            with self.autocast() if self.autocast else nullcontext():
                self.outputs = self.model(**batch)
            self.outputs.loss.backward()
        self._clip()
        self.optimizer.step()


STEP_OF = {"trainer": RecipeStep, "plain": PlainStep}


def loaded(recipe: Recipe, world: World) -> PreTrainedModel:
    """The model as `from_pretrained` leaves it, quantized where the recipe says so."""
    model = world.model(getattr(torch, recipe.dtype))
    model.config.use_cache = recipe.use_cache
    asked = recipe.quantization or {}
    if asked.get("load_in_8bit"):
        return to_int8(model)
    return to_nf4(model, bool(asked.get("bnb_4bit_use_double_quant"))) if asked.get("load_in_4bit") else model


def with_adapters(recipe: Recipe, model: PreTrainedModel, world: World) -> nn.Module:
    """Prepared for low-bit training and with adapters, as far as the recipe says so."""
    checkpointing = bool(recipe.arguments.get("gradient_checkpointing"))
    with quiet_libraries():
        import peft
    result: Any = model
    if recipe.kbit is not None:
        options = {"use_gradient_checkpointing": True} | recipe.kbit
        result = peft.prepare_model_for_kbit_training(
            model, **options, gradient_checkpointing_kwargs=checkpoint_options(world)
        )
    if recipe.peft is not None:
        if checkpointing and recipe.kbit is None:
            result.enable_input_require_grads()
        with torch.device(model.device):
            result = peft.get_peft_model(result, getattr(peft, recipe.peft_class)(**recipe.peft))
    if checkpointing:
        model.gradient_checkpointing_enable(checkpoint_options(world))
    return result.train()


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that the Trainer makes of these arguments, on parameters without data."""
    with quiet_libraries():
        from transformers import Trainer, TrainingArguments
    arguments = TrainingArguments("unused", use_cpu=True, report_to=[], **_without_devices(recipe.arguments))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if (name in decayed) is wanted]}
        for wanted in (True, False)
    ]
    if kind.__module__.startswith("bitsandbytes"):
        return _low_bit(kind, options, groups, model)
    if kind is torch.optim.AdamW and not options.get("fused"):
        options["foreach"] = True  # torch's choice for parameters on a GPU
    optimizer = kind(groups, **options)
    if options.get("fused"):
        from bench.methods.adamw import _make_meta_state

        optimizer.register_step_pre_hook(_make_meta_state)
    return optimizer


def _without_devices(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that TrainingArguments checks against the machine at hand are not what the optimizer depends on."""
    return {name: value for name, value in arguments.items() if name not in AUTOCAST}


def _low_bit(kind: Any, options: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> Any:
    """An optimizer of bitsandbytes without its kernels, which allocate nothing. Paged states lie in managed memory,
    which PyTorch's allocator knows nothing of. Embeddings keep fp32 states, as the Trainer asks for.
    """

    class LowBit(kind):
        def update_step(self, *arguments: Any) -> None:
            """What the kernels do is done in place."""

        def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            paged = self.is_paged and p.numel() >= 1e5
            return torch.zeros(p.shape, dtype=dtype, device="cpu" if paged else p.device)

    optimizer = LowBit(groups, **options)
    optimizer.is_paged = optimizer.is_paged
    if options.get("optim_bits") == 8:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
        optimizer.mng.register_parameters(model.parameters())
    return optimizer
