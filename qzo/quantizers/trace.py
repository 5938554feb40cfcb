"""The order in which a model calls its linear layers, found in one forward pass on one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qzo.errors import QzoError
from qzo.models.experts import QuantExperts
from qzo.models.walk import Site

Batch = Tensor | Mapping[str, Any]
Paths = tuple[str, ...]


@dataclass
class Stage:
    """Linear layers whose inputs do not depend on one another, and the block they stand in.

    `groups` holds the layers that read the same tensor together; `visits` is how often a forward pass calls the first
    layer of each group, in sum. `block` is the number of the decoder layer, None outside of them.
    """

    block: int | None
    groups: list[list[Paths]] = field(default_factory=list)
    visits: int = 0


@dataclass
class Trace:
    """Stages in the order of the forward pass, the paths of the decoder layers, and whether these return tuples.

    `layers` is empty where the model has no chain of layers, each fed with what the one before it returned.
    """

    stages: list[Stage]
    layers: list[str]
    tuples: bool


def run_model(model: nn.Module, batch: Batch) -> Any:
    """One forward pass without a key-value cache; a mapping gives keyword arguments, of which `labels` is left out."""
    device = next(model.parameters()).device
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a multimodal model
    options = {"use_cache": False} if hasattr(text, "use_cache") else {}
    if isinstance(batch, Tensor):
        return model(batch.to(device), **options)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs), **options)


@torch.no_grad()
def trace(model: nn.Module, sites: list[Site], batch: Batch) -> Trace:
    """Run the first sequence of `batch` and note which layer is called when. Raises QzoError for one that never is."""
    layers = _chain_candidates(model, sites)
    watch = _Watch(sites, layers)
    hooks = watch.hooks(model)
    try:
        run_model(model, tree_map(lambda value: value[:1] if isinstance(value, Tensor) else value, batch))
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        if id(site.module) not in watch.visits:
            raise QzoError(
                f"{site.paths[0]}: the model never calls this layer on the calibration text; give more text, or leave "
                "the layer out by skip (--skip)"
            )
    if not watch.is_chain():
        layers = []
    return Trace(watch.stages(model, layers), layers, watch.tuples)


def _chain_candidates(model: nn.Module, sites: list[Site]) -> list[str]:
    """Paths of the members of the one outermost ModuleList that holds sites."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = {
        min((path for path in lists if site.paths[0].startswith(f"{path}.")), key=len, default=None) for site in sites
    } - {None}
    if len(outer) != 1:
        return []
    (path,) = outer
    return [f"{path}.{index}" for index in range(len(model.get_submodule(str(path))))]  # type: ignore[arg-type]


class _Watch:
    """Hooks that note calls; inputs are kept alive, so that an id stays the id of one tensor."""

    def __init__(self, sites: list[Site], layers: list[str]) -> None:
        self.sites, self.layers = {id(site.module): site for site in sites}, layers
        self.visits: dict[int, list[Tensor]] = {}  # site -> its inputs, in the order of the first calls
        self.calls: list[tuple[str, Tensor | None, Tensor | None]] = []  # layer, hidden states in and out
        self.tuples = False

    def hooks(self, model: nn.Module) -> list[Any]:
        handles = [site.module.register_forward_pre_hook(self._visit) for site in self.sites.values()]
        for path in self.layers:
            hook = self._leave(path)
            handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        return handles

    def _visit(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.visits.setdefault(id(module), []).append(args[0])

    def _leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.tuples = isinstance(output, tuple)
            self.calls.append((path, hidden_states(args, kwargs), output[0] if self.tuples else output))

        return hook

    def is_chain(self) -> bool:
        """Whether each layer is called once, in order, on what the layer before it returned."""
        if [path for path, _, _ in self.calls] != self.layers or not self.calls or self.calls[0][1] is None:
            return False
        return all(after[1] is before[2] for before, after in zip(self.calls, self.calls[1:], strict=False))

    def stages(self, model: nn.Module, layers: list[str]) -> list[Stage]:
        """Sites in the order of their first calls; neighbours with one input, and like experts, share a stage."""
        experts = {
            id(layer): id(stack)
            for module in model.modules()
            if isinstance(module, QuantExperts)
            for stack in module.layers()
            for layer in stack
        }
        stages: dict[tuple[int | None, int], Stage] = {}
        for module, inputs in self.visits.items():
            paths = self.sites[module].paths
            block = next((n for n, layer in enumerate(layers) if paths[0].startswith(f"{layer}.")), None)
            key = (block, experts.get(module, id(inputs[0])))
            if key in stages and module not in experts:
                stages[key].groups[0].append(paths)
                continue
            stage = stages.setdefault(key, Stage(block))
            stage.groups.append([paths])
            stage.visits += len(inputs)
        return list(stages.values())


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a decoder layer is called on: its first argument, or `hidden_states`."""
    value = args[0] if args else kwargs.get("hidden_states")
    return value if isinstance(value, Tensor) else None
