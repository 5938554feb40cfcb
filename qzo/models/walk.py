"""Which layers of a model are quantized, and how they are replaced one by one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from qzo.errors import QzoError, named
from qzo.models.experts import QuantExperts, check_experts, layer_names, looks_like_experts

EQUAL = ("transformers.models.falcon.modeling_falcon.FalconLinear",)  # classes with a forward of their own
READ_BY_OTHERS = ("torch.nn.modules.linear.NonDynamicallyQuantizableLinear",)  # nn.MultiheadAttention takes its weight
Build = Callable[[int, Tensor, Tensor | None], nn.Module]


class LinearShape(NamedTuple):
    """Sizes of one linear map."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Site:
    """A module to replace, every path it stands at, and of experts whether gate and up become layers of their own."""

    paths: tuple[str, ...]
    module: nn.Module
    apart: bool = False

    def names(self) -> list[str]:
        """Paths of the layers that `replace_sites` puts there, in its order: one, or two or three for each expert."""
        if not looks_like_experts(self.module):
            return [self.paths[0]]
        return [f"{self.paths[0]}.{name}" for name in layer_names(self.module, self.apart)]

    def for_layers(self, paths: Container[str]) -> Site:
        """The site with gate and up apart where that gives layers of these paths."""
        return replace(self, apart=looks_like_experts(self.module) and f"{self.paths[0]}.gate_proj.0" in paths)

    def shapes(self) -> Iterator[tuple[str, LinearShape]]:
        """Name and shape of the linear maps inside: one, or two for a mixture of experts."""
        if isinstance(self.module, nn.Linear) or is_conv1d(self.module):
            rows, columns = weight_of(self.module).shape
            yield self.paths[0], LinearShape(columns, rows)
            return
        for name in ("gate_up_proj", "down_proj"):
            _, rows, columns = getattr(self.module, name).shape
            yield f"{self.paths[0]}.{name}", LinearShape(columns, rows)


def find_sites(model: nn.Module) -> list[Site]:
    """Every nn.Linear but the heads, every transformers `Conv1D`, every module of stacked experts.

    Raises QzoError where there is none, and for layers of these kinds that are already quantized or of an unknown make.
    """
    sites = candidates(model)
    for path, module in ((site.paths[0], site.module) for site in sites):
        if looks_like_experts(module):
            check_experts(path, module)
        elif isinstance(module, nn.Linear) and not computes_as_linear(module):
            raise QzoError(f"{path}: cannot quantize a {type(module).__name__}; start from plain nn.Linear layers")
    return sites


def candidates(model: nn.Module) -> list[Site]:
    """As `find_sites`, with subclasses of nn.Linear that compute something else, and experts of whatever make."""
    heads = set(map(id, output_heads(model)))
    sites = [site for site in every_site(model) if id(site.module) not in heads]
    for path, module in ((site.paths[0], site.module) for site in sites):
        if isinstance(module, nn.Linear) and not weight_of(module).is_floating_point():
            raise QzoError(f"{path}: cannot quantize a {type(module).__name__}; start from plain nn.Linear layers")
        if not path:
            raise QzoError(f"a {type(module).__name__} cannot be replaced in place; pass the module that holds it")
    if not sites:
        raise QzoError(f"{type(model).__name__} has no layer to quantize; pass a model with unquantized linear layers")
    return sites


def every_site(model: nn.Module) -> list[Site]:
    """Every linear layer, of whatever class, and every module of stacked experts, of whatever make; the head too."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module) or looks_like_experts(module):
            found.setdefault(id(module), ([], module))[0].append(path)
    return [Site(tuple(paths), module) for paths, module in found.values()]


def replace_sites(model: nn.Module, sites: list[Site], build: Build) -> None:
    """Put `build(index, weight [N, K], bias)` in the place of each site, in order; every old weight is freed at once.

    `sites` is emptied on the way, since it would keep the old modules alive. A QzoError of `build` gets the layer's
    name in front.
    """
    count = 0
    while sites:
        site = sites.pop(0)
        module = site.module
        with named(site.paths[0]):
            if looks_like_experts(module):
                new: nn.Module = QuantExperts.from_experts(module, build, count, site.apart)
            else:
                new = build(count, weight_of(module), module.bias)  # type: ignore[arg-type]
        count += sum(map(len, new.layers())) if isinstance(new, QuantExperts) else 1
        put(model, site.paths, new)


def put(model: nn.Module, paths: tuple[str, ...], new: nn.Module) -> None:
    """Put a module, in the mode of the old one, at every path of it."""
    new.train(model.get_submodule(paths[0]).training)
    for path in paths:
        model.set_submodule(path, new)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits, where the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()


def output_heads(model: nn.Module) -> list[nn.Module]:
    """What stands behind the base model: the module that computes the logits, the linear layers of a classifier."""
    head = output_head(model)
    found = [] if head is None else [head]
    base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    if isinstance(base, nn.Module) and base is not model:
        inside = set(map(id, base.modules()))
        found += [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    return found


def left_plain(model: nn.Module) -> list[str]:
    """Paths of the linear layers and experts without codes, but for heads."""
    heads = set(map(id, output_heads(model)))
    return [path for site in every_site(model) if id(site.module) not in heads for path in site.paths[:1]]


def computes_as_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + bias: an nn.Linear, or a subclass with its forward or one known to be equal."""
    kind = type(module)
    if not isinstance(module, nn.Linear) or _full_name(kind) in READ_BY_OTHERS:
        return False
    return kind.forward is nn.Linear.forward or _full_name(kind) in EQUAL


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def freeze(model: nn.Module) -> nn.Module:
    """Turn off the gradients of every parameter; returns the model."""
    return model.requires_grad_(False)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer with weight [K, N]; told by name, so as not to import it."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def weight_of(module: nn.Module) -> Tensor:
    """Weight of an nn.Linear or Conv1D as [N, K], a view."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.t() if is_conv1d(module) else weight
