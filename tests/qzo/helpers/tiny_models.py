"""Configurations of tiny models, and unquantized checkpoints of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

VOCABULARY = 96


def write_plain(family: str, folder: Path) -> Path:
    """An unquantized fp32 checkpoint of a tiny model whose weights and biases matter, and which has no kinks."""
    torch.manual_seed(0)
    config = tiny_config(family, tied=False)
    setattr(config, "init_std" if family == "opt" else "initializer_range", 0.1)
    if family == "opt":
        config.activation_function = "gelu"  # central differences must not meet the kink of ReLU
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def tiny_config(family: str, tied: bool) -> PreTrainedConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    common = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": tied}
    if family == "llama":
        return LlamaConfig(intermediate_size=160, **heads, **common)
    if family == "mixtral":
        return MixtralConfig(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **heads, **common)
    if family == "opt":
        return OPTConfig(ffn_dim=96, num_attention_heads=4, word_embed_proj_dim=64, dropout=0.0, **common)
    assert family == "gpt2"
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
    )
