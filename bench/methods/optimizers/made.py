"""The optimizer that the Trainer makes of its arguments: the library's own class, also on tensors without data."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from bench.cases.messages import one_line
from bench.cases.recipes.recipe import AUTOCAST, Recipe
from bench.methods.optimizers import galore
from bench.methods.optimizers.adamw import MixedAdamW, make_state_without_data
from bench.methods.optimizers.host_states import host_states_of
from bench.methods.optimizers.low_bit_states import KINDS, LowBitStates
from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

ELSEWHERE = ("torch_compile", "use_liger_kernel", "liger_kernel_config")  # arguments that no optimizer depends on
OWN = {"adamw_mixed": MixedAdamW}  # what the Trainer does not have


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The class that the Trainer takes for these arguments, with its options and its two groups of parameters.

    On parameters without data it does what torch would choose on a GPU. Raises QzoError for an optimizer that is
    unknown or needs a package that is not there.
    """
    if recipe.optimizer_offload is not None:
        return host_states_of(recipe, model)
    if recipe.arguments.get("optim") in galore.NAMES:
        return galore.galore_of(recipe, model)
    try:
        return _made(recipe, model)
    except (
        ImportError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # of the libraries, for what was asked of them
        name = recipe.arguments.get("optim")
        raise QzoError(
            f"optim={name!r} cannot be simulated here: {one_line(error)}; choose another, such as adamw_torch_fused"
        ) from error


def _made(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    with quiet_libraries():
        from transformers import Trainer, TrainingArguments
    if recipe.arguments.get("optim") in OWN:
        return OWN[recipe.arguments["optim"]](parameter for parameter in model.parameters() if parameter.requires_grad)
    arguments = TrainingArguments("unused", use_cpu=True, report_to=[], **_without_devices(recipe.arguments))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if (name in decayed) is wanted]}
        for wanted in (True, False)
    ]
    without_data = any(parameter.is_meta for _, parameter in trained)
    if kind.__module__.startswith("bitsandbytes"):
        return _low_bit(kind, options, groups, model)
    if without_data and "foreach" in inspect.signature(kind).parameters and not options.get("fused"):
        options["foreach"] = True
    if kind.__module__.startswith("torchao"):
        if without_data and kind.__name__ in KINDS:
            return LowBitStates(groups, KINDS[kind.__name__])
        if any(isinstance(parameter, FakeTensor) for _, parameter in trained):
            raise QzoError(
                f"{arguments.optim} compiles its step, which takes numbers that a simulated CPU lacks; choose a GPU"
            )
    optimizer = kind(groups, **options)
    if options.get("fused"):
        optimizer.register_step_pre_hook(make_state_without_data)
    return optimizer


def name_of(optimizer: torch.optim.Optimizer, recipe: Recipe) -> str:
    """As tables show it: torch's AdamW with the dtype of its moments, any other by the Trainer's name for it."""
    trained = next(parameter for group in optimizer.param_groups for parameter in group["params"])
    if recipe.optimizer_offload is not None:
        return f"adamw, {recipe.optimizer_offload} on the host"
    if isinstance(optimizer, MixedAdamW):
        return "adamw-fp32"
    if type(optimizer) is torch.optim.AdamW:
        return "adamw-fp32" if trained.dtype is torch.float32 else "adamw-bf16"
    return str(recipe.arguments.get("optim", type(optimizer).__name__.lower()))


def _without_devices(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that TrainingArguments checks against the machine at hand are not what the optimizer depends on."""
    return {name: value for name, value in arguments.items() if name not in (*AUTOCAST, *ELSEWHERE)}


def _low_bit(kind: Any, options: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> Any:
    """An optimizer of bitsandbytes, on a GPU without its kernels, which allocate nothing there. Paged states lie in
    managed memory, which PyTorch's allocator knows nothing of. Embeddings keep fp32 states, as the Trainer asks for.
    """

    class OnGpu(kind):
        def update_step(self, *arguments: Any) -> None:
            """What the kernels do is done in place."""

        def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            paged = self.is_paged and p.numel() >= 1e5
            return torch.zeros(p.shape, dtype=dtype, device="cpu" if paged else p.device)

    if any(parameter.is_meta for group in groups for parameter in group["params"]):
        kind = OnGpu
    with _disable_current_modes():  # a table of the 256 numbers is worked out, which takes numbers
        optimizer = kind(groups, **options)
    return _with_fp32_embeddings(optimizer, options, model)


def _with_fp32_embeddings(optimizer: Any, options: dict[str, Any], model: nn.Module) -> Any:
    if options.get("optim_bits") == 8:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                optimizer.mng.register_module_override(module, "weight", {"optim_bits": 32})
        optimizer.mng.register_parameters(model.parameters())
    return optimizer
