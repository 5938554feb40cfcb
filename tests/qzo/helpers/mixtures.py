"""Tiny mixtures of experts of each family, and the names under which they are published."""

import re

import torch
from tiny_models import VOCABULARY
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": False},
}
MIXTURES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16},
    ),
    "deepseek": (
        DeepseekV3Config,
        {
            **{
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 2,
                "moe_intermediate_size": 64,
            },
            **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
            **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
        },
    ),
}

FAMILIES = MIXTURES | {
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek 2": (
        DeepseekV2Config,
        {
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "q_lora_rank": None},
            **{"topk_method": "group_limited_greedy", "n_shared_experts": 1, "moe_intermediate_size": 64},
            **{"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32},
            **{"first_k_dense_replace": 1, "num_key_value_heads": 4},
        },
    ),
    "granite": (GraniteMoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),  # stacks by its authors
}


def tiny(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def published(name):
    """As Mixtral was published; other mixtures have their experts under the names of `publish`."""
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    name = re.sub(r"experts\.(\d+)\.(\w+)\.", lambda found: f"experts.{found[1]}.{parts[found[2]]}.", name)
    return name.replace(".mlp.", ".block_sparse_moe.")


def small_ones_left(path):
    left = path.endswith(("lm_head", "gate", "shared_expert_gate", "router")) or "kv_a_proj" in path
    return None if left else {"seed": len(path)}  # every layer's columns in an order of its own
