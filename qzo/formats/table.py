"""The one place that knows all formats; adopting and releasing walk along it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from qzo.formats.aqlm import library as aqlm
from qzo.formats.awq import library as awq
from qzo.formats.bnb import library as bnb
from qzo.formats.gptq import library as gptq
from qzo.formats.hqq import library as hqq
from qzo.formats.layer import Quantized
from qzo.formats.torchao import library as torchao


class Library(Protocol):
    """What `qzo.adopt` and `qzo.release` ask of the library of a format."""

    @property
    def KINDS(self) -> tuple[type[Quantized], ...]:
        """The layers that it can have back."""

    def adopt(self, module: nn.Module) -> Quantized | None:
        """A layer on the tensors of one of its modules; None for any other module. Raises QzoError."""

    def release(self, layer: Any) -> nn.Module | None:
        """Its module on the layer's tensors, with the scales as they are; None for a layer that it never had.

        Raises QzoError where the library is missing.
        """


LIBRARIES: tuple[Library, ...] = (bnb, hqq, torchao, aqlm, gptq, awq)
