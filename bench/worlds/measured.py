"""What the two measured worlds share: a model with its weights, on the CPU or moved to the GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases import text, weights
from bench.cases.case import BenchCase
from bench.cases.models import ModelSource, resolve
from bench.cases.pretrained import PreTrainedModel
from bench.cases.recipes.recipe import Recipe
from bench.worlds.batches import steps_of, with_text
from qzo.live.scales import quantized_layers


class MeasuredWorld:
    """Models with weights of their own are loaded into host memory, changed by the method there, and then moved to
    `device`; random weights are drawn on the device.
    """

    def __init__(self, source: ModelSource, attention: str, device: str) -> None:
        self.source = source
        self.implementation = "eager" if attention == "eager" else "sdpa"
        self.device = device
        self.parameters = 0

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        model = weights.load(self.source, dtype, self.implementation, self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        return model

    def place(self, model: nn.Module) -> nn.Module:
        """On the device, its tensors side by side, as a loader would have put them there: a model that was drawn and
        then quantized on the device lies in the gaps of what it replaced, which would stay reserved.
        """
        if self.device == "cuda" and quantized_layers(model):
            model = model.to("cpu")
            torch._C._cuda_clearCublasWorkspaces()  # of products while it was quantized: one keeps its whole segment
            torch.cuda.empty_cache()
        return model.to(self.device)

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager:
        return torch.autocast(self.device, dtype)

    def autocasts(self, dtype: torch.dtype) -> bool:
        return self.device == "cuda" or dtype is not torch.float16

    def recomputing(self) -> AbstractContextManager:
        return nullcontext()

    def empty_cache(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def batches(self, case: BenchCase, recipe: Recipe | None) -> list[text.Batch]:
        """One batch for each step of the case, in host memory."""
        return with_text(steps_of(case, recipe, case.steps), recipe, case, self.source)

    def here(self, batch: text.Batch) -> text.Batch:
        """The batch on the device, where it is when its step begins and no sooner."""
        tensors: dict[str, Any] = {name: tensor.to(self.device) for name, tensor in batch.tensors().items()}
        return replace(batch, further=tuple(map(self.here, batch.further)), **tensors)


def source_of(case: BenchCase) -> ModelSource:
    """The case's model, its weights where they were unpacked if they were."""
    source = resolve(case.model)
    return replace(source, weights=Path(case.weights)) if case.weights else source


def origin_notes(case: BenchCase, batches: list[text.Batch]) -> list[str]:
    """Where weights and text came from, for the record."""
    return [f"weights: {weights.kind(resolve(case.model))}", f"text: {batches[0].kind}"]
