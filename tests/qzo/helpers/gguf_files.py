"""GGUF files of tiny models, written with the package gguf: one block type for all weights, or one for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")


def tiny(family: str = "llama", tied: bool = True, hidden: int = 64, seed: int = 0) -> PreTrainedModel:
    """Two layers in fp32; 256 of width for K-quants."""
    torch.manual_seed(seed)
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config = kind(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128 if family == "qwen3" else hidden // 4,  # what transformers takes a Qwen3 file to have
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: str | Callable[[str], str] = "F32",
    extra: dict[str, np.ndarray] | None = None,
    layers: int | None = None,
) -> Path:
    """Write a model as a .gguf file, the rows of q and k of a Llama pair by pair, and a tokenizer of 96 words.

    `kind` is the type of every matrix, or tells it for a tensor's name; vectors are F32.
    """
    config, family = model.config, model.config.model_type
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if family == "llama" else {}
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(config.num_hidden_layers if layers is None else layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        part = stored.split(".")[-2]
        if part in heads:
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        add(
            writer,
            stored,
            tensor.numpy(),
            "F32" if tensor.dim() == 1 else kind if isinstance(kind, str) else kind(stored),
        )
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Add a tensor in a type; K-quants, which gguf cannot make, get random blocks with small scales."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array))
    elif kind == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    elif kind in K_QUANTS:
        per_block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
        shape = array.shape[0], array.shape[1] // per_block, n_bytes
        blocks = np.random.default_rng(len(name)).integers(0, 256, shape, dtype=np.uint8)
        small = np.full(shape[:2], 1e-4, np.float16).view(np.uint8).reshape(*shape[:2], 2)
        for first in (n_bytes - 2,) if kind == "Q6_K" else (0, 2):
            blocks[..., first : first + 2] = small
        writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=qtype)
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), qtype), raw_dtype=qtype)


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"w{number}" for number in range(size - 3)), "a", "b", "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def stored_tensors(file: Path) -> dict[str, gguf.ReaderTensor]:
    """Name -> tensor, as the package gguf reads a file."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
