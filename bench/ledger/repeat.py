"""Identical layers of a forward without gradients, traced once: the others repeat the first one's events.

A forward with gradients, and its backward, is the business of `repeat_training`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.ledger.ledger import Block, Event, Ledger
from bench.ledger.repeat_training import Group, group_of_layers, run_layer

PLAIN = (int, float, str, bool, type(None))
NUMBER = ("layer_idx", "layer_id", "layer_number", "block_idx")  # of a layer, among its likes


@contextmanager
def repeated_layers(ledger: Ledger, model: nn.Module) -> Iterator[None]:
    """Within the context, layers of the same kind called with inputs of the same kind are run once.

    A layer is a child of an nn.ModuleList. Its events may be repeated if all it leaves behind is its output, one new
    tensor, and nothing older dies in it.

    Raises (from a step within): NotAlike: layers of a training step differ; trace it again without this context.
    """
    templates: dict[Any, Template] = {}
    groups = group_of_layers(model, _kind)
    layers = [layer for holder in model.modules() if isinstance(holder, nn.ModuleList) for layer in holder]
    for layer in layers:
        layer.forward = _traced_once(ledger, layer, layer.forward, templates, groups.get(layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Template:
    """The events of one layer, and which of its blocks became the output."""

    def __init__(self, events: list[Event], output: Tensor, born: Block) -> None:
        self.events, self.born = events, born
        self.shape, self.stride, self.dtype = output.shape, output.stride(), output.dtype

    def repeat(self, ledger: Ledger) -> Tensor:
        """Record the events again with blocks of their own; return a new output."""
        blocks: dict[int, Block] = {}
        for event in self.events:
            if event.sign > 0:
                blocks[id(event.block)] = ledger.allocate(event.block.nbytes, event.block.role)
            else:
                ledger.release(blocks[id(event.block)])
        with _disable_current_modes():
            output = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=ledger.device)
        ledger.adopt(output, blocks[id(self.born)])
        return output


def _traced_once(
    ledger: Ledger, layer: nn.Module, forward: Any, templates: dict[Any, Template], group: Group | None
) -> Any:
    kind = _kind(layer)

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*args, **kwargs) if group is None else run_layer(ledger, group, layer, forward, args, kwargs)
        key = (kind, _hooked(layer), _signature(args), _signature(kwargs))
        if key in templates:
            return templates[key].repeat(ledger)
        start = len(ledger.events)
        output = forward(*args, **kwargs)
        template = _template(ledger, ledger.events[start:], output)
        if template is not None:
            templates[key] = template
        return output

    return run


def _template(ledger: Ledger, events: list[Event], output: Any) -> Template | None:
    """The template of a finished layer, or None if it cannot be repeated."""
    alive: dict[int, Block] = {}
    for event in events:
        if event.sign > 0:
            alive[id(event.block)] = event.block
        elif alive.pop(id(event.block), None) is None:
            return None
    born = ledger.see(output) if isinstance(output, Tensor) else None
    if born is None or list(alive.values()) != [born]:
        return None
    return Template(events, output, born)


def _kind(layer: nn.Module) -> Any:
    """All that tells layers apart: shapes, and what their modules are told in numbers and words but which one they are
    (Gemma 3n has layers that keep keys and values for later ones).
    """
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors)
    told = tuple(
        (type(module), tuple(item for item in vars(module).items() if type(item[1]) in PLAIN and item[0] not in NUMBER))
        for module in layer.modules()
    )
    return told, shapes


def _hooked(layer: nn.Module) -> tuple[int, ...]:
    """Which of its modules have hooks in this call: the last layer may compute less than its likes (qzo's loss)."""
    return tuple(number for number, module in enumerate(layer.modules()) if module._forward_pre_hooks)


def _signature(arguments: Any) -> tuple:
    leaves = (tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(arguments))
    return tuple(leaf if isinstance(leaf, (tuple, int, float, str, bool, type(None))) else id(leaf) for leaf in leaves)
