"""What a model of LitGPT is (lit_gpt/config.py), and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass

ADAPTER, ADAPTER_V2 = "adapter", "adapter-v2"


@dataclass(frozen=True)
class Shape:
    """What a model is: `lora` are those of query, key, value, projection, mlp and head that are adapted; `prompt` is
    ADAPTER or ADAPTER_V2 where a prompt in the attention is trained instead.
    """

    layers: int
    width: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    vocabulary: int
    gated: bool = True  # LLaMAMLP
    gelu: bool = False  # of a gated MLP: GemmaMLP
    rms: bool = True
    unit_offset: bool = False  # of RMSNorm's weight
    norms_after: bool = False  # also after attention and MLP
    softcapping: bool = False  # of attention scores, which no kernel of SDPA does
    scaled: bool = False  # embeddings
    parallel: bool = False
    shared_norm: bool = False
    bias: bool = False
    head_bias: bool = False
    rotated: float = 1.0
    rank: int = 0
    dropout: float = 0.0
    lora: tuple[str, ...] = ()
    prompt: str | None = None
