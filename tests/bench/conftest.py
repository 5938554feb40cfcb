"""A small architecture that several tests of the bench run."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's config.json without weights: 2 layers, 128 wide, 1,000 tokens, 512 positions."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000,
        max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return path
