"""GGUF files of tiny models, written with the package gguf: one block type for all weights, or one for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optional import gguf
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
SCALES_AT = {  # of the fp16 numbers in a block of a type that gguf cannot make
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ1_S": (0,)},
    **{"IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)},
}


NAMES = {"gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama"}  # in files
NAMES |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
}
Meta = Callable[[Any], object]  # of a gguf.GGUFWriter


def tiny(family: str = "llama", tied: bool = True, hidden: int = 64, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Two layers in fp32; 256 of width for K-quants. With options of the config, norms and biases are random too."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128 if family == "qwen3" else hidden // 4,  # what transformers takes a Qwen3 file to have
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "pad_token_id": None,
    }
    if family == "phi3":
        del sizes["head_dim"]
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes | options), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters() if options else ():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.0 if name.endswith("bias") else 1.0, 0.2)
    return model


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: str | Callable[[str], str] = "F32",
    extra: dict[str, np.ndarray] | None = None,
    layers: int | None = None,
    meta: Meta | None = None,
    without: str | None = None,
) -> Path:
    """Write a model as a .gguf file, as llama.cpp's converter does, and a tokenizer of 96 words.

    The rows of q and k of a Llama stand pair by pair, the norms of a Gemma are stored + 1, and gate and up of experts
    apart. `kind` is the type of every matrix, or tells it for a tensor's name; vectors are F32. `meta` adds metadata.
    Tensors whose names end with `without` are left out.
    """
    config, family = model.config, model.config.model_type
    architecture = NAMES.get(family, family)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers if layers is None else layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if family.startswith(("qwen3", "gemma")):
        writer.add_key_length(config.head_dim)
    if family.endswith("moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if family in ("qwen2_moe", "qwen3_moe", "mixtral"):
        writer.add_expert_count(config.num_experts if family == "qwen2_moe" else config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size)
    if meta is not None:
        meta(writer)
    for stored, tensor in stored_as(model).items():
        if without is not None and stored.endswith(without):
            continue
        plain = "F32" if tensor.dim() == 1 or "gate_inp" in stored else None
        add(writer, stored, tensor.numpy(), plain or (kind if isinstance(kind, str) else kind(stored)))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored_as(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Name in the file -> tensor as it lies there, before it is quantized."""
    config, family = model.config, NAMES.get(model.config.model_type, model.config.model_type)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if family == "llama" else {}
    stored = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".experts." in name:
            stacks = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[name.split(".")[-1]]
            for stack, part in zip(stacks, tensor.chunk(len(stacks), 1), strict=True):
                stored[f"blk.{name.split('.')[2]}.ffn_{stack}_exps.weight"] = part
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        part = found.split(".")[-2]
        if part in heads:
            tensor = tensor.unflatten(0, (heads[part], 2, -1)).transpose(1, 2).flatten(0, 2)
        tensor = tensor[0].clone() if len(tensor) == 1 else tensor
        stored[found] = tensor + 1 if family.startswith("gemma") and name.endswith("norm.weight") else tensor
    return {name: tensor.contiguous() for name, tensor in stored.items()}


def as_stored(model: PreTrainedModel, file: Path) -> PreTrainedModel:
    """The model with the weights that a file of it holds, by the package gguf: what loading the file must compute."""
    wanted, found = stored_as(model), stored_tensors(file)
    with torch.no_grad():
        for name, tensor in found.items():
            if name in wanted:
                values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted[name].shape)
                wanted[name].copy_(torch.from_numpy(values.copy()))
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    _read_back(model, wanted, heads)
    return model


def _read_back(model: PreTrainedModel, stored: dict[str, torch.Tensor], heads: dict[str, int]) -> None:
    """The reverse of `stored_as`: each tensor of the model is written into, whatever was a copy on the way."""
    family = NAMES.get(model.config.model_type, model.config.model_type)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        layer = name.split(".")[2] if ".experts." in name else ""
        if "gate_up_proj" in name and layer:
            value = torch.cat([stored[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up")], 1)
        elif layer:
            value = stored[f"blk.{layer}.ffn_down_exps.weight"]
        elif name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        else:
            value = stored[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        part = name.split(".")[-2]
        if family == "llama" and part in heads:
            value = value.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        tensor.copy_(value - 1 if family.startswith("gemma") and name.endswith("norm.weight") else value)


def add(writer: Any, name: str, array: np.ndarray, kind: str) -> None:
    """Add a tensor in a type; those that gguf cannot make get random blocks with small scales."""
    qtype = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array))
    elif kind == "F16":
        writer.add_tensor(name, array.astype(np.float16))
    elif kind in SCALES_AT:
        per_block, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
        shape = *array.shape[:-1], array.shape[-1] // per_block, n_bytes
        blocks = np.random.default_rng(len(name)).integers(0, 256, shape, dtype=np.uint8)
        small = np.full(shape[:-1], 1e-4, np.float16).view(np.uint8).reshape(*shape[:-1], 2)
        for first in SCALES_AT[kind]:
            blocks[..., first : first + 2] = small
        writer.add_tensor(name, blocks.reshape(*array.shape[:-1], -1), raw_dtype=qtype)
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(array), qtype), raw_dtype=qtype)


def add_tokenizer(writer: Any, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"w{number}" for number in range(size - 3)), "a", "b", "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def stored_tensors(file: Path) -> dict[str, Any]:
    """Name -> tensor, as the package gguf reads a file."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
