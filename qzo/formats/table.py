"""The one place that knows all formats: reading, writing, adopting and releasing walk along it.

A new format is a package beside this file, with `files.py` (checkpoints) and `library.py` (modules in memory) as far as
there are any, and a name in the tuples below.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qzo.errors import AGAIN, advised
from qzo.files.rewrite import Write
from qzo.files.settings import Source
from qzo.formats.aqlm import files as aqlm_files
from qzo.formats.aqlm import library as aqlm
from qzo.formats.awq import files as awq_files
from qzo.formats.awq import library as awq
from qzo.formats.bnb import files as bnb_files
from qzo.formats.bnb import library as bnb
from qzo.formats.compressed import files as compressed_files
from qzo.formats.compressed import library as compressed
from qzo.formats.gguf import files as gguf_files
from qzo.formats.gptq import files as gptq_files
from qzo.formats.gptq import library as gptq
from qzo.formats.hqq import files as hqq_files
from qzo.formats.hqq import library as hqq
from qzo.formats.layer import Quantized
from qzo.formats.torchao import files as torchao_files
from qzo.formats.torchao import library as torchao
from qzo.models.inspection import Inspection


class Checkpoint(Protocol):
    """What a format found in a folder, or in a file."""

    @property
    def saved_as(self) -> str | None:
        """Its name for `qzo.checkpoints.save`; None where models are written as the files with other tensors alone."""

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model with quantized layers, everything frozen; unquantized tensors in `dtype`, or that of its config."""

    def inspect(self, name: str) -> Inspection:
        """What it holds, under the name that was asked for; no codes are read."""

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """What writes the weights into a folder with some tensors replaced, which have their names in the model."""


class Files(Protocol):
    """What reading and writing ask of a format."""

    def find(self, source: Source) -> Checkpoint | None:
        """Its checkpoint, where there is one of its kind. Raises QzoError for a damaged one."""


class Saver(Protocol):
    """What writing a new checkpoint asks of a format."""

    @property
    def LAYER(self) -> type[Quantized]:
        """The layers that it holds."""

    @property
    def NAMES(self) -> tuple[str, ...]:
        """What `checkpoint_format` may be, the usual first."""

    def settings(
        self, model: nn.Module, layers: dict[str, Any], name: str, read: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The quantization_config: what was `read`, but for the format; of a new model made of its layers.

        Raises QzoError for layers that it cannot hold together.
        """

    def stored(self, layers: dict[str, Any], name: str) -> dict[str, Tensor]:
        """Tensors that the file has otherwise than the layers, by their names in the model."""


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


FILES: tuple[Files, ...] = (
    *(gguf_files, hqq_files, torchao_files, bnb_files),
    *(gptq_files, awq_files, aqlm_files, compressed_files),
)
SAVERS: tuple[Saver, ...] = (gptq_files, awq_files, aqlm_files)
LIBRARIES: tuple[Library, ...] = (bnb, hqq, torchao, aqlm, gptq, awq, compressed)


def find(source: Source) -> Checkpoint | None:
    """The quantized checkpoint that lies somewhere; None where no format here knows it. Raises QzoError."""
    with advised(AGAIN):
        return next((found for files in FILES if (found := files.find(source)) is not None), None)
