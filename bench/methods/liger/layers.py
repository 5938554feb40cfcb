"""Which layers of a model Liger replaces, by family.

Source: Liger 0.8.2, transformers/monkey_patch.py, `apply_liger_kernel_to_*` with a model that is there already, as the
Trainer calls it. Mixtures and models of images are left out.
"""

from __future__ import annotations

import inspect
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from bench.methods.liger.kernels import GatedProduct, RmsNorm, Rotary
from qzo.errors import QzoError


class Family(NamedTuple):
    """What Liger does to an architecture.

    Attributes:
        gate: of the feed-forward layer: "silu" or "gelu" of two layers, or "fused", silu of the halves of one.
        offset: added to a norm's weight. in_place: whether a norm's gradients take the place of its output's;
            last_in_place: the same of the norm behind all layers. heads: whether q_norm and k_norm are replaced too.
        rotary: whether rotary embeddings are, unless a recipe says otherwise.
    """

    gate: str = "silu"
    offset: float = 0.0
    in_place: bool = True
    last_in_place: bool = True
    heads: bool = False
    rotary: bool = True


PLAIN = Family()
AFTER = Family(in_place=False)  # norms behind a sum need their output's gradient once more
FAMILIES = {
    "llama": PLAIN,
    "mistral": PLAIN,
    "ministral": PLAIN,
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "smollm3": PLAIN,
    "phi3": Family("fused"),
    "gemma": Family("gelu", 1.0),
    "gemma2": Family("gelu", 1.0, False, False),
    "gemma3_text": Family("gelu", 1.0, False, False, heads=True),
    "olmo2": AFTER,
    "olmo3": AFTER,
    "glm4": Family("fused", 0.0, False, False, rotary=False),
    "exaone4": Family("silu", 0.0, False, False, heads=True),
}


def family_of(model: nn.Module) -> Family:
    """Raises QzoError for an architecture whose kernels are not simulated."""
    kind = model.config.get_text_config().model_type  # type: ignore[union-attr,operator]
    if kind not in FAMILIES:
        raise QzoError(
            f"use_liger_kernel: Liger's kernels for {kind} are not simulated; leave it out, or choose one of "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def apply_liger(recipe: Recipe, model: nn.Module) -> None:
    """Replace the layers that the recipe's `use_liger_kernel` and `liger_kernel_config` replace, adapters kept."""
    if not recipe.arguments.get("use_liger_kernel"):
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    family = family_of(base)
    chosen = recipe.arguments.get("liger_kernel_config") or {}
    decoder = base.base_model
    for name, module in decoder.named_modules():
        kind, of_heads = type(module).__name__, name.endswith(("q_norm", "k_norm"))
        if kind.endswith("RMSNorm") and chosen.get("rms_norm", True) and (family.heads or not of_heads):
            _replace_norm(module, family, family.in_place if "layers." in name else family.last_in_place)
        elif kind.endswith("MLP") and chosen.get("swiglu", chosen.get("geglu", True)):
            _replace_gate(module, family)
        elif kind.endswith("Attention") and chosen.get("rope", family.rotary):
            _replace_rotary(module)


def _replace_norm(norm: Any, family: Family, in_place: bool) -> None:
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return RmsNorm.apply(hidden_states, self.weight, eps, family.offset, in_place)

    norm.forward = MethodType(forward, norm)


def _replace_gate(layer: Any, family: Family) -> None:
    def gated(self: Any, hidden_state: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_state), self.up_proj(hidden_state)
        return self.down_proj(GatedProduct.apply(gate, up, family.gate == "gelu"))

    def fused(self: Any, hidden_state: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_state).chunk(2, dim=-1)
        return self.down_proj(GatedProduct.apply(gate, up, False))

    layer.forward = MethodType(fused if family.gate == "fused" else gated, layer)


def _replace_rotary(attention: Any) -> None:
    """The attention's own forward, in which the name of the function means ours."""
    own = inspect.unwrap(type(attention).forward)
    names = own.__globals__ | {"apply_rotary_pos_emb": _rotary}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    attention.forward = MethodType(forward, attention)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return Rotary.apply(q, k, cos, sin)
