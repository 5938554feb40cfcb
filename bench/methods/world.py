"""What a method may ask of the world it runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class World(Protocol):
    """Where a method's model lives."""

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The unquantized model of the case in `dtype`, before the method changes it."""

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device it is trained on; called once, when the method has changed what it changes."""

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager:
        """Autocast of this world to bf16, or to fp16."""

    def autocasts(self, dtype: torch.dtype) -> bool:
        """Whether a Trainer that is told so runs its forward under autocast to `dtype` here: on a CPU accelerate leaves
        fp16 out (accelerate/accelerator.py, `native_amp`).
        """

    def recomputing(self) -> AbstractContextManager:
        """What a checkpointed layer's recomputation needs beyond what torch restores by itself."""

    def empty_cache(self) -> None:
        """What torch.cuda.empty_cache() does in this world."""
