"""Mixture of experts: transformers keeps the weights of all experts in two 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qzo.errors import QzoError


class QuantExperts(nn.Module):
    """One quantized layer for each expert and projection, in the place of a module with stacked weights.

    y[t] = Σ_e w[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t])), over the experts e that the router chose for token t.
    Inputs and result are those of the module replaced (e.g. MixtralExperts). gate and up are one layer `gate_up_proj`
    H -> 2I, as transformers stacks them, or two layers `gate_proj` and `up_proj` H -> I, as checkpoints have them.
    """

    def __init__(self, layers: dict[str, list[nn.Module]], act_fn: nn.Module) -> None:
        """Name -> a layer for each expert, in the order of their numbers."""
        super().__init__()
        for name, own in layers.items():
            setattr(self, name, nn.ModuleList(own))
        self.act_fn = act_fn

    @classmethod
    def from_experts(
        cls, experts: nn.Module, build: Callable[..., nn.Module], first_index: int, apart: bool = False
    ) -> QuantExperts:
        """Build layers from gate_up_proj [E, 2I, H] and down_proj [E, H, I]; each stack is freed once it is used.

        `apart` gives gate and up a layer each. The numbers that `build` gets are in the order of `layer_names`.
        """
        layers: dict[str, list[nn.Module]] = {}
        for name in ("gate_up_proj", "down_proj"):
            stack: Tensor = getattr(experts, name).detach()
            parts = {name: stack}
            if apart and name == "gate_up_proj":
                gate, up = stack.chunk(2, dim=1)
                parts = {"gate_proj": gate, "up_proj": up}
            for part, weights in parts.items():
                layers[part] = [build(first_index + expert, weight, None) for expert, weight in enumerate(weights)]
                first_index += len(weights)
            delattr(experts, name)
            del stack, parts, weights
        return cls(layers, experts.act_fn)  # type: ignore[arg-type]

    def layers(self) -> list[list[nn.Module]]:
        """The lists of layers, those of gates first."""
        return [list(part) for part in self.children() if isinstance(part, nn.ModuleList)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k] expert numbers, [T, k] router weights -> [T, H]."""
        result = torch.zeros_like(hidden_states)
        for expert, (*first, down) in enumerate(zip(*self.layers(), strict=True)):
            token, slot = torch.nonzero(top_k_index == expert).unbind(1)
            inputs = hidden_states.index_select(0, token)
            gate, up = (layer(inputs) for layer in first) if len(first) == 2 else first[0](inputs).chunk(2, dim=-1)
            states = down(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            result.index_add_(0, token, states.to(result.dtype))
        return result


def layer_names(module: nn.Module, apart: bool) -> list[str]:
    """Names of the layers that `QuantExperts.from_experts` makes of stacked weights, such as "down_proj.3"."""
    names = []
    for name in ("gate_up_proj", "down_proj"):
        stack = getattr(module, name, None)
        parts = ("gate_proj", "up_proj") if apart and name == "gate_up_proj" else (name,)
        count = len(stack) if isinstance(stack, Tensor) and stack.ndim else 0
        names += [f"{part}.{expert}" for part in parts for expert in range(count)]
    return names


def looks_like_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts in 3-D parameters."""
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return "down_proj" in names or (bool(names) and type(module).__name__.endswith("Experts"))


def check_experts(path: str, module: nn.Module, remedy: str | None = None) -> None:
    """Raise QzoError unless the module computes what QuantExperts does; without a remedy for who quantizes."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    names = {name for name, _ in module.named_parameters(recurse=False)}
    fits = (
        names == {"gate_up_proj", "down_proj"}
        and isinstance(gate_up, Tensor)
        and isinstance(down, Tensor)
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        and hasattr(module, "act_fn")
        and not getattr(module, "is_transposed", False)
        and getattr(module, "is_concatenated", True)
        and _is_plain(module)
    )
    if not fits:
        raise QzoError(
            f"{path}: experts of type {type(module).__name__} are not supported; QZO knows gate_up_proj [E, 2I, H], "
            "down_proj [E, H, I] and act_fn, as in Mixtral and Qwen-MoE; "
            + (remedy or f'leave them in 16 bits with skip=["{path}"]')
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether experts of transformers multiply act(gate) by up and do no more; others are taken at their word."""
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None:
        return not type(module).__module__.startswith("transformers.")
    is_usual = gate.__module__ == "transformers.integrations.moe"
    return is_usual and getattr(module, "has_gate", True) and not getattr(module, "has_post_expert_norm", False)
