"""PEQA (arXiv 2305.14152): codes stay, scales are trained by backpropagation; as plain PyTorch does it, and leanly.

Scales are fp32, as whatever AdamW moves by 1e-5 of itself must be. The model is else that of `qzo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qzo
from bench.cases.case import BenchCase
from bench.cases.group_sizes import default_group_size
from bench.cases.text import Batch
from bench.methods.activations.checkpointing import enable_checkpointing
from bench.methods.optimizers.adamw import fused_adamw
from bench.methods.optimizers.factored import FactoredRms
from bench.methods.prepared import Enter, Prepared, first_order_step
from bench.methods.world import World
from qzo.formats.gptq.codes import unpack
from qzo.formats.gptq.layer import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LR = 1e-5
RELATIVE_LR = 1e-3  # of a scale
LAST_TWO = 2  # positions whose logits are computed: the last token is predicted from the one before it


def peqa(case: BenchCase, world: World) -> Prepared:
    """The scales of qzo's 4-bit model by backprop and AdamW: autograd keeps codes and weight of every layer."""
    model = _quantized(case, world)
    _with_whole_weights(model)
    if case.gradient_checkpointing:
        enable_checkpointing(model, world, {})
    placed, scales = _placed(model, world)
    optimizer = fused_adamw(scales, lr=LR)
    return _prepared(placed, optimizer, first_order_step(placed, optimizer), "adamw-fp32")


def peqa_lean(case: BenchCase, world: World) -> Prepared:
    """The same scales with all that saves memory: layers and weights made again in backward, updates fused into it."""
    model = _quantized(case, world)
    enable_checkpointing(model, world, {})
    placed, scales = _placed(model, world)
    optimizer = FactoredRms(scales, lr=RELATIVE_LR)
    optimizer.fuse_into_backward()

    def step(batch: Batch, enter: Enter) -> float:
        enter("forward")
        output: Any = placed(input_ids=batch.input_ids, logits_to_keep=LAST_TWO, use_cache=False)
        loss = F.cross_entropy(output.logits[:, -2].float(), batch.labels[:, -1])
        del output
        enter("backward")
        loss.backward()
        enter("step")  # there is nothing left to do
        return float(loss.detach())

    prepared = _prepared(placed, optimizer, step, "factored-fp32")
    prepared.notes.append("layers recomputed, scales updated in backward, logits of the last label alone, as in qzo")
    return prepared


class WholeWeight(nn.Module):
    """y = x W + bias with W = (codes - zero) * scales, all of it at once, under autograd.

    Kept for backward: codes in int8, W in the dtype of x, and x.
    """

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = x @ self.weight(x.dtype)
        return y if self.layer.bias is None else y + self.layer.bias

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Wᵀ [K, N], differentiable in the scales [K / g, N]."""
        layer = self.layer
        assert layer.zero is not None  # symmetric, as `qzo.quantize` makes them
        codes = unpack(layer.qweight, layer.n_bits).sub_(layer.zero).to(torch.int8)
        grouped = codes.unflatten(0, (len(layer.scales), -1)) * layer.scales[:, None]
        return grouped.to(dtype).flatten(0, 1)


def _quantized(case: BenchCase, world: World) -> PreTrainedModel:
    """As `qzo`, with fp32 scales."""
    model = world.model(torch.bfloat16)
    qzo.quantize(model, n_bits=4, group_size=case.group_size or default_group_size(model))
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scales = module.scales.float()
    return model


def _with_whole_weights(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QuantLinear):
                setattr(parent, name, WholeWeight(child))


def _placed(model: PreTrainedModel, world: World) -> tuple[Any, list[Tensor]]:
    """The model on its device, in training mode, and its scales, which from now on require a gradient."""
    placed = world.place(model).train()
    return placed, [scales.requires_grad_() for scales in qzo.scales(placed).values()]


def _prepared(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any, name: str) -> Prepared:
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    about = {"format": "gptq", "bits": 4, "group_size": layer.group_size}
    return Prepared(model, optimizer, step, "bfloat16", name, about)
