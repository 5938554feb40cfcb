"""Mixture of experts: transformers keeps the weights of all experts in two 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qzo.errors import QzoError


class QuantExperts(nn.Module):
    """One quantized layer for each expert and projection, in the place of a module with stacked weights.

    y[t] = Σ_e w[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t])), over the experts e that the router chose for token t.
    Inputs and result are those of the module replaced (e.g. MixtralExperts).
    """

    def __init__(self, gate_up_proj: list[nn.Module], down_proj: list[nn.Module], act_fn: nn.Module) -> None:
        """One layer H -> 2I and one I -> H for each expert."""
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.ModuleList(gate_up_proj), nn.ModuleList(down_proj)
        self.act_fn = act_fn

    @classmethod
    def from_experts(cls, experts: nn.Module, build: Callable[..., nn.Module], first_index: int) -> QuantExperts:
        """Build layers from gate_up_proj [E, 2I, H] and down_proj [E, H, I]; each stack is freed once it is used."""
        layers: dict[str, list[nn.Module]] = {}
        for name in ("gate_up_proj", "down_proj"):
            stack: Tensor = getattr(experts, name).detach()
            layers[name] = [build(first_index + expert, weight, None) for expert, weight in enumerate(stack)]
            first_index += len(stack)
            delattr(experts, name)
            del stack
        return cls(layers["gate_up_proj"], layers["down_proj"], experts.act_fn)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k] expert numbers, [T, k] router weights -> [T, H]."""
        result = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            token, slot = torch.nonzero(top_k_index == expert).unbind(1)
            gate, up = gate_up(hidden_states.index_select(0, token)).chunk(2, dim=-1)
            states = down(self.act_fn(gate) * up) * top_k_weights[token, slot, None]
            result.index_add_(0, token, states.to(result.dtype))
        return result


def looks_like_experts(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts in 3-D parameters."""
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
    return "down_proj" in names or (bool(names) and type(module).__name__.endswith("Experts"))


def check_experts(path: str, module: nn.Module) -> None:
    """Raise QzoError unless the module computes what QuantExperts does."""
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
    )
    if not fits:
        raise QzoError(
            f"{path}: experts of type {type(module).__name__} are not supported; QZO knows gate_up_proj [E, 2I, H], "
            "down_proj [E, H, I] and act_fn, as in Mixtral and Qwen-MoE"
        )
