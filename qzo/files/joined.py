"""Stored tensors that are one in the model, such as the weights of all experts: joined, and taken apart again."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qzo.errors import AGAIN, QzoError


@dataclass(frozen=True)
class Joined:
    """What is joined into one tensor of the model.

    Args:
        sources: stored name -> pattern of `converter` that it fits, in the order in which they are joined.
        converter: of transformers.
    """

    sources: dict[str, str]
    converter: Any

    def join(self, name: str, tensors: dict[str, Tensor], model: Any) -> Tensor:
        """The tensor of this name, of those with the names of `sources`. Raises QzoError where they do not fit."""
        converter = deepcopy(self.converter)
        for source, pattern in self.sources.items():
            converter.add_tensor(name, source, pattern, tensors[source])
        try:
            made: dict[str, Any] = converter.convert(name, model=model, config=model.config)
        except Exception as error:  # of whatever operation
            raise QzoError(f"the {len(tensors)} tensors that make up {name} do not fit together; {AGAIN}") from error
        value = made.get(name, next(iter(made.values())))
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def split(self, name: str, tensor: Tensor, model: Any) -> dict[str, Tensor]:
        """The tensors with the names of `sources`, mostly views, that `join` makes this one of, to the bit.

        Raises QzoError where its operations cannot be undone. Extra memory: a copy of the tensor, to prove it.
        """
        patterns = list(self.converter.source_patterns)
        sources = sorted(self.sources, key=lambda source: patterns.index(self.sources[source]))  # stable
        try:
            reverse = self.converter.reverse_transform()
            about = {"source_patterns": reverse.source_patterns, "target_patterns": reverse.target_patterns}
            about |= {"full_layer_name": name, "model": model, "config": model.config, "missing_keys": None}
            made: dict[str, Any] = {reverse.source_patterns[0]: [tensor.detach()]}
            for operation in reverse.operations:
                made = operation.convert(made, **about)
            values = [value[0] if isinstance(value, list) else value for value in made.values()]
            parts = dict(zip(sources, values, strict=True))
            is_same = torch.equal(self.join(name, parts, model), tensor)
        except Exception as error:  # as in join
            raise QzoError(self._refusal(name)) from error
        if not is_same:
            raise QzoError(self._refusal(name))
        return parts

    def _refusal(self, name: str) -> str:
        return (
            f"{name} is {len(self.sources)} tensors in the files, and what transformers makes it of them with cannot "
            "be undone; train the scales alone"
        )
