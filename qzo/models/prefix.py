"""What lies below the first trained layer gives the same output at every evaluation of a step: it is computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.models.towers import of_text


class SharedPrefix:
    """A loss whose decoder layers 0 ... first - 1 run once for all evaluations on one batch; to the bit the same.

    Where layers 15 to 29 of 30 are trained, a step of two evaluations saves a quarter of its work, one of many nearly
    half. Called once more with the very object it was called with last, it takes the layers' output from then; with any
    other batch it begins anew. The loss may run the model several times, always the same number. Outside of a call the
    model computes as ever. The first time, the loss is also computed in full: where the two differ (layers that hand on
    more than their output), nothing is shared from then on.

    Args:
        model: a transformers decoder; its lower layers get a `forward` of their own.
        loss: batch -> scalar, of `model` without dropout.
        first: number of the first decoder layer that is trained; nothing below it may change between two calls.

    Extra memory: the output of one layer, twice. Raises QzoError for a model without numbered layers.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], first: int) -> None:
        self.loss, self.shares = loss, True
        self._checked = self._inside = False
        self._batch: Any = None
        self._kept: list[tuple[Tensor, Any]] = []  # of each forward pass within a call
        self._pass = 0
        layers = decoder_layers(model)[:first]
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, layer.forward, number == len(layers) - 1)

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """The loss of the model as it stands."""
        if batch is not self._batch:
            self._batch, self._kept = batch, []
        if not self.shares:
            return self.loss(batch)
        reused, self._inside, self._pass = bool(self._kept), True, 0
        try:
            value = self.loss(batch)
        finally:
            self._inside = False
        if reused and not self._checked:
            self._checked = True
            whole = self.loss(batch)
            self.shares = torch.equal(value, whole)
            return whole
        return value

    def _forward(self, forward: Callable[..., Any], is_last: bool, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward: the kept output, or what the layer computes."""
        if self._inside and self._pass < len(self._kept):
            kept, rest = self._kept[self._pass]
            self._pass += is_last
            out = kept.clone() if is_last else hidden  # a layer above might write into what it is given
            return out if rest is None else (out, *rest)
        out = forward(hidden, *args, **kwargs)
        if self._inside and is_last:
            self._kept.append((out, None) if isinstance(out, Tensor) else (out[0], out[1:]))
            self._pass += 1
        return out


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules in the text part's first list: others, of experts, are inside of them. Raises QzoError without "
    "one."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = next(iter(of_text(model, lists).values()), None)
    if found is None:
        raise QzoError(f"{type(model).__name__} has no numbered layers; leave --layers out (layers= in Python)")
    return list(found)
