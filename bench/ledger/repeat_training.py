"""Identical layers of a training step: two are traced, forward and backward, and the ones between them repeat it.

The two are the first and the last of a kind with neighbours of the same kinds. The first one's forward and the last
one's backward are the templates, since backward comes the other way round; the other halves are traced to be compared.
A layer between them is one node of the graph: its forward and its backward record the template's events again, with
blocks of its own. Nothing is assumed that is not looked at: where a template cannot stand for its layer, or the two
differ, `NotAlike` says that the step has to be traced in full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.ledger.ledger import Block, Event, Ledger

Name = str | tuple[str, int]  # "input", "gradient" of the output, or where a block was born and as which
Events = list[tuple[int, int, str | None, Name]]  # sign, bytes, role as far as it is known, block
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
INPUT, GRADIENT = "input", "gradient"


class NotAlike(Exception):
    """Layers taken for identical are not: trace the step again, each layer for itself."""


@dataclass
class Half:
    """Events of a layer's forward or backward, and the tensor that came out of it."""

    events: Events
    result: tuple[Name, Layout]
    grads: dict[str, tuple[Name, Layout] | None] = field(default_factory=dict)  # of parameters; None: none came new


@dataclass(eq=False)
class Group:
    """Layers of one kind in the order in which they are called; templates are those of the current step."""

    layers: list[nn.Module]
    signature: Any = None
    forward: Half | None = None
    backward: Half | None = None
    input: Block | None = None  # of the layer that `forward` was traced from
    keeps_input: bool | None = None
    repetitions: list[Repetition] = field(default_factory=list)
    outlived: list[Name] = field(default_factory=list)  # what of the first layer died between forward and backward
    outlived_last: list[Name] = field(default_factory=list)  # the same of the last

    def begin(self) -> None:
        """A new forward pass."""
        self.forward = self.backward = self.input = self.keeps_input = None
        self.repetitions, self.outlived = [], []

    def forget(self) -> None:
        """What dies between forward and backward in the first layer is about to die in the last: before it, in all."""
        for repetition in self.repetitions:
            repetition.forget(self.outlived)
        self.repetitions = []


def group_of_layers(model: nn.Module, kind: Any) -> dict[nn.Module, Group]:
    """Layer -> its group, for layers of the outermost nn.ModuleLists that have a group worth repeating.

    `kind(layer)` is hashable and equal for layers that compute alike.
    """
    groups: dict[Any, Group] = {}
    for holder in _outermost(model):
        kinds = [None, *(kind(layer) for layer in holder), None]
        for place, layer in enumerate(holder):
            groups.setdefault((id(holder), *kinds[place : place + 3]), Group([])).layers.append(layer)
    worth = [group for group in groups.values() if len(set(map(id, group.layers))) == len(group.layers) > 2]
    return {layer: group for group in worth for layer in group.layers}


def _outermost(module: nn.Module) -> list[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        return [module]
    return [holder for child in module.children() for holder in _outermost(child)]


def run_layer(ledger: Ledger, group: Group, layer: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
    """The layer's output: of `forward`, traced as a template or not, or of a repetition."""
    first, last = layer is group.layers[0], layer is group.layers[-1]
    if first:
        group.begin()
    moved = _only_gradient(args, kwargs)
    if moved is None or _watched_by_others() or _has_hooks(layer):
        return forward(*args, **kwargs)
    signature = _signature(moved, args, kwargs)
    if first:
        group.signature = signature
    elif group.forward is None or signature != group.signature:
        return forward(*args, **kwargs)
    if first or last:
        return Trace(ledger, group, layer).run(forward, moved, args, kwargs)
    if group.keeps_input is None:
        group.keeps_input = group.input is not None and ledger.holds(group.input)
        if group.outlived:
            raise NotAlike
    repetition = Repetition(ledger, group, layer, moved)
    group.repetitions.append(repetition)
    return _Repeated.apply(moved, repetition)


class Trace:
    """Watches one layer's forward, and its backward by hooks on its output and input; keeps no tensor alive."""

    def __init__(self, ledger: Ledger, group: Group, layer: nn.Module) -> None:
        self.ledger, self.group, self.layer = ledger, group, layer
        self.names: dict[int, Name] = {}
        self.alive: dict[Name, Block] = {}
        self.start = 0
        self.had_grad: set[str] = set()
        self.outlived: list[Name] = []  # what died between forward and backward
        if layer is group.layers[0]:
            group.outlived = self.outlived

    def run(self, forward: Any, moved: Tensor, args: tuple, kwargs: dict) -> Any:
        """The layer's output; its events become the group's template, or are compared with it."""
        taken = self._know(moved, INPUT)
        start = len(self.ledger.events)
        output = forward(*args, **kwargs)
        half = self._forward(self._named(self.ledger.events[start:], "forward"), output)
        if self.layer is self.group.layers[0]:
            self.group.forward, self.group.input = half, taken
        elif half != self.group.forward:
            raise NotAlike
        if half is not None:
            for name, block in self.alive.items():
                if name not in (INPUT, half.result[0]):
                    block.died = partial(self._died, name)
            output.register_hook(self._begin)
            moved.register_hook(self._end)
        return output

    def _forward(self, events: Events | None, output: Any) -> Half | None:
        if events is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        name = self.names.get(id(self.ledger.see(output)))
        return None if name is None or name == INPUT else Half(events, (name, _layout(output)))

    def _begin(self, gradient: Tensor) -> None:
        self._know(gradient, GRADIENT)
        self.start = len(self.ledger.events)
        self.had_grad = {name for name, tensor in _trained(self.layer).items() if tensor.grad is not None}

    def _end(self, gradient: Tensor) -> None:
        events = self._named(self.ledger.events[self.start :], "backward")
        result = self.names.get(id(self.ledger.see(gradient)))
        if events is None or result is None:
            raise NotAlike
        half = Half(events, (result, _layout(gradient)), self._grads())
        left = {result, *(grad[0] for grad in half.grads.values() if grad is not None), *self.outlived}
        if any(name not in left and not self._died_as_a_boundary(name) for name in self.alive):
            raise NotAlike  # somebody else has it
        if self.layer is self.group.layers[-1]:
            self.group.backward, self.group.outlived_last = half, self.outlived
        elif half != self.group.backward or self.outlived != self.group.outlived_last:
            raise NotAlike

    def _died(self, name: Name) -> None:
        if torch._C._current_graph_task_id() == -1:
            self.outlived.append(name)
            if self.layer is self.group.layers[-1]:
                self.group.forget()

    def _died_as_a_boundary(self, name: Name) -> bool:
        """Whether it is the layer's input or output, and nobody keeps it."""
        output = self.group.forward and self.group.forward.result[0]
        return name in (INPUT, output) and not self.ledger.holds(self.alive[name])

    def _grads(self) -> dict[str, tuple[Name, Layout] | None]:
        grads: dict[str, tuple[Name, Layout] | None] = {}
        for name, tensor in _trained(self.layer).items():
            if tensor.grad is not None:
                block = self.names.get(id(self.ledger.see(tensor.grad)))
                grads[name] = None if block is None or name in self.had_grad else (block, _layout(tensor.grad))
        return grads

    def _know(self, tensor: Tensor, name: Name) -> Block | None:
        block = self.ledger.see(tensor)
        if block is not None:
            self.names[id(block)] = name
            self.alive[name] = block
        return block

    def _named(self, events: list[Event], where: str) -> Events | None:
        """Events with names of blocks; None where a block goes that was there before. In the first layer's backward,
        which comes last, what all layers used may go (positions): that is left out.
        """
        named: Events = []
        for event in events:
            if event.sign > 0:
                born = where, len(named)
                self.names[id(event.block)] = born
                self.alive[born] = event.block
            elif self.alive.pop(self.names.get(id(event.block), ""), None) is None:
                if where == "backward" and self.layer is self.group.layers[0]:
                    continue
                return None
            name = self.names[id(event.block)]
            named.append((event.sign, event.block.nbytes, event.block.role, name))
        return named


class Repetition:
    """One layer between the two that are traced: the template's events with blocks of its own."""

    def __init__(self, ledger: Ledger, group: Group, layer: nn.Module, moved: Tensor) -> None:
        self.ledger, self.group, self.layer = ledger, group, layer
        self.moved = moved.detach() if group.keeps_input else None
        self.blocks: dict[Name, Block] = {}
        taken = ledger.see(moved)
        if taken is not None:
            self.blocks[INPUT] = taken

    def forward(self) -> Tensor:
        """The output, its events recorded; what backward will release is kept until then."""
        assert self.group.forward is not None
        self._record(self.group.forward.events)
        name, layout = self.group.forward.result
        output = self._tensor(name, layout)
        for left, block in self.blocks.items():
            if left not in (name, INPUT):
                self.ledger.keep(block)
        return output

    def backward(self, gradient: Tensor) -> Tensor:
        """The input's gradient; parameters get theirs."""
        half = self.group.backward
        block = self.ledger.see(gradient)
        if half is None or block is None:
            raise NotAlike
        self.blocks[GRADIENT] = block
        trained = _trained(self.layer)
        if any((trained[name].grad is None) is (grad is None) for name, grad in half.grads.items()):
            raise NotAlike
        self._record(half.events)
        for name, grad in half.grads.items():
            if grad is not None:
                trained[name].grad = self._tensor(*grad)
        result = self._tensor(*half.result)
        self.moved = None
        return result

    def forget(self, names: list[Name]) -> None:
        """These blocks die now."""
        for name in names:
            self.ledger.end(self.blocks.pop(name))

    def _record(self, events: Events) -> None:
        for sign, nbytes, role, name in events:
            if sign > 0:
                self.blocks[name] = self.ledger.allocate(nbytes, role)
                continue
            block = self.blocks.pop(name)
            if block.weak is not None and not self.ledger.holds(block):
                raise NotAlike  # it died before its time
            self.ledger.end(block)

    def _tensor(self, name: Name, layout: Layout) -> Tensor:
        shape, strides, dtype = layout
        with _disable_current_modes():
            tensor = torch.empty_strided(shape, strides, dtype=dtype, device=self.ledger.device)
        self.ledger.disown(self.blocks[name])
        self.ledger.adopt(tensor, self.blocks[name])
        return tensor


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moved: Tensor, repetition: Repetition) -> Tensor:
        ctx.repetition = repetition
        return repetition.forward()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.repetition.backward(gradient), None


def _only_gradient(args: tuple, kwargs: dict) -> Tensor | None:
    """The one tensor among the arguments that needs a gradient."""
    moved = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return moved[0] if len(moved) == 1 else None


def _trained(layer: nn.Module) -> dict[str, Tensor]:
    """What of a layer gets a gradient; scales are buffers."""
    tensors = dict([*layer.named_parameters(), *layer.named_buffers()])
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def _has_hooks(layer: nn.Module) -> bool:
    """Whether gradients set something off. A hook with a true `repeatable`, such as an update whose memory follows from
    the tensor's shape, is traced with its layer, and what it does to a tensor without data need not be done again.
    """
    for tensor in _trained(layer).values():
        hooks = (getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values()
        if tensor._backward_hooks or not all(getattr(hook, "repeatable", False) for hook in hooks):
            return True
    return False


def _watched_by_others() -> bool:
    """Whether this forward is not the plain one: a recomputation, or one whose saved tensors somebody packs."""
    packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return packed or torch._C._current_graph_task_id() != -1


def _layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), tensor.dtype


def _signature(moved: Tensor, args: tuple, kwargs: dict) -> tuple:
    """What a layer's events can depend on among its arguments."""
    leaves: list[Any] = []
    for leaf in tree_leaves((args, kwargs)):
        plain = isinstance(leaf, (int, float, str, bool, type(None)))
        leaves.append((*_layout(leaf), leaf is moved) if isinstance(leaf, Tensor) else leaf if plain else id(leaf))
    return tuple(leaves)
