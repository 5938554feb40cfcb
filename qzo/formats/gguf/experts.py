"""Mixture of experts on the packed blocks of a GGUF file, which has gate and up apart, each stacked over experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzo.formats.gguf.codes import BlockType
from qzo.formats.gguf.layer import GgufLinear


class GgufExperts(nn.Module):
    """Three layers for each expert, in the place of a module with stacked weights.

    y[t] = Σ_e w[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t])), over the experts e that the router chose for token t.
    The layers are views of the stacks: no block is copied.
    """

    def __init__(self, stacks: dict[str, list[nn.Module]], act_fn: nn.Module) -> None:
        """Layers "gate" and "up" H -> I and "down" I -> H, one for each expert."""
        super().__init__()
        self.gate_proj = nn.ModuleList(stacks["gate"])
        self.up_proj = nn.ModuleList(stacks["up"])
        self.down_proj = nn.ModuleList(stacks["down"])
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k] expert numbers, [T, k] router weights -> [T, H]."""
        result = torch.zeros_like(hidden_states)
        for expert, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)):
            token, slot = torch.nonzero(top_k_index == expert).unbind(1)
            if len(token):
                rows = hidden_states.index_select(0, token)
                states = down(self.act_fn(gate(rows)) * up(rows)) * top_k_weights[token, slot, None]
                result.index_add_(0, token, states.to(result.dtype))
        return result


def expert_layers(stack: Tensor, kind: BlockType | None) -> list[nn.Module]:
    """A frozen layer for each expert, on blocks uint8 [E, N, B, n_bytes] or plain weights [E, N, K]."""
    if kind is not None:
        return [GgufLinear(blocks, kind) for blocks in stack]
    layers: list[nn.Module] = []
    for weight in stack:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    return layers
