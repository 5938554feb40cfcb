"""Calibration text streamed through a model, one decoder layer at a time, for quantizers that need a layer's inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qzo.errors import named
from qzo.kernels.rounding.gptq import Hessian
from qzo.models.walk import weight_of
from qzo.quantizers.trace import Batch, Paths, Stage, Trace, hidden_states, run_model

Replace = Callable[[Paths, Tensor], None]
Run = Callable[[int], Any]
log = logging.getLogger(__name__)


class _Stop(Exception):
    """Ends a forward pass whose remainder is of no interest."""


@torch.no_grad()
def quantize_in_order(model: nn.Module, plan: Trace, batches: Sequence[Batch], replace: Replace) -> None:
    """Call `replace(paths, H)` for each linear layer, in the order of the forward pass.

    H is made of the inputs that the layer gets once all layers before it are replaced. Decoder layers run one by one,
    in fp32, on exactly the arguments that the model gives them; the hidden states between them are kept in the model's
    dtype: they, one layer in fp32 and the Hessians of one stage are the extra memory. What stands outside of a chain
    of layers is run with the whole model, in its own dtype. The model should be in eval mode.
    """
    first = next((n for n, stage in enumerate(plan.stages) if stage.block is not None), len(plan.stages))
    before, rest = plan.stages[:first], plan.stages[first:]

    def run(index: int) -> Any:
        return run_model(model, batches[index])

    _replace_stages(model, before, run, len(batches), replace)
    if rest:
        _replace_layers(model, plan, batches, replace)
    _replace_stages(model, [stage for stage in rest if stage.block is None], run, len(batches), replace)


def _replace_layers(model: nn.Module, plan: Trace, batches: Sequence[Batch], replace: Replace) -> None:
    hidden, arguments = _record(model, plan, batches)
    for number, path in enumerate(plan.layers):
        log.info("layer %d of %d", number + 1, len(plan.layers))
        layer = model.get_submodule(path)
        run = _runner(layer, arguments.pop(0), hidden)
        with _in_fp32(layer):
            stages = [stage for stage in plan.stages if stage.block == number]
            _replace_stages(model, stages, run, len(batches), replace)
            for index in range(len(batches) if arguments else 0):
                hidden[index] = run(index).to(hidden[index].dtype)


def _runner(layer: nn.Module, given: list[_Arguments], hidden: list[Tensor]) -> Run:
    """A function that runs the layer on batch `index` and returns its hidden states."""

    def run(index: int) -> Any:
        output = given[index].call(layer, hidden[index])
        return output[0] if isinstance(output, tuple) else output

    return run


def _replace_stages(model: nn.Module, stages: list[Stage], run: Run, count: int, replace: Replace) -> None:
    for stage in stages:
        hessians = _hessians(model, stage, run, count)
        for paths in stage.groups:
            hessian = hessians.pop(0)
            for layer in paths:
                with named(layer[0]):
                    replace(layer, hessian)
            del hessian


def _hessians(model: nn.Module, stage: Stage, run: Run, count: int) -> list[Tensor]:
    """H of each group of the stage, from forward passes that end when all its layers have been called."""
    hessians, handles, calls = [], [], [0]

    def watch(hessian: Hessian) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hessian.add(args[0])
            calls[0] += 1
            if calls[0] == stage.visits:
                raise _Stop

        return hook

    for group in stage.groups:
        module = model.get_submodule(group[0][0])
        weight = weight_of(module)
        hessians.append(Hessian(weight.shape[1], weight.device))
        handles.append(module.register_forward_pre_hook(watch(hessians[-1])))
    try:
        for index in range(count):
            calls[0] = 0
            with suppress(_Stop):
                run(index)
    finally:
        for handle in handles:
            handle.remove()
    return [hessian.matrix for hessian in hessians]


class _Arguments:
    """What the model gives a decoder layer besides the hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs, self.by_name = args[1:], dict(kwargs), not args
        self.kwargs.pop("hidden_states", None)

    def call(self, layer: nn.Module, hidden: Tensor) -> Any:
        """Run the layer, every floating-point tensor cast to fp32."""
        args, kwargs, hidden = tree_map(_to_fp32, (self.args, self.kwargs, hidden))
        return layer(*args, hidden_states=hidden, **kwargs) if self.by_name else layer(hidden, *args, **kwargs)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _record(model: nn.Module, plan: Trace, batches: Sequence[Batch]) -> tuple[list[Tensor], list[list[_Arguments]]]:
    """Hidden states before the first layer, a tensor for each batch, and each layer's other arguments for each batch.

    The model's own loop over the layers runs, with layers that hand their input on.
    """
    hidden: list[Tensor] = []
    arguments: list[list[_Arguments]] = [[] for _ in plan.layers]

    def recorder(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = hidden_states(args, kwargs)
            assert states is not None  # the trace has seen to that
            arguments[number].append(_Arguments(args, kwargs))
            if number == 0:
                hidden.append(states)
            if number == len(plan.layers) - 1:
                raise _Stop
            return (states, None) if plan.tuples else states

        return forward

    layers = [model.get_submodule(path) for path in plan.layers]
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.forward = recorder(number)
        for batch in batches:
            with suppress(_Stop):
                run_model(model, batch)
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return hidden, arguments


@contextmanager
def _in_fp32(layer: nn.Module) -> Iterator[None]:
    """Hold the layer's floating-point tensors in fp32; those still there afterwards get their own dtype back."""

    def tensors() -> list[tuple[str, Tensor]]:
        named_tensors = [*layer.named_parameters(), *layer.named_buffers()]
        return [(name, tensor) for name, tensor in named_tensors if tensor.is_floating_point()]

    own = {name: tensor.dtype for name, tensor in tensors()}
    for _, tensor in tensors():
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for name, tensor in tensors():
            tensor.data = tensor.data.to(own.get(name, tensor.dtype))
