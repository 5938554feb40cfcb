"""Architectures that transformers alone reads from GGUF files: what it leaves unread there, and whether that matters.

Its readers take a few keys of each architecture, and skip the others and every tensor that has no name in the model.
Here the config that it makes is held against each key of the file, and the file's tensors against the names it knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qzo.errors import QzoError
from qzo.files.budget import at_most
from qzo.files.folder import one_line
from qzo.formats.gguf.finite import check_file
from qzo.formats.gguf.header import GgufHeader
from qzo.formats.gguf.metadata.keys import Metadata
from qzo.formats.gguf.source import check_blocks
from qzo.quiet import quiet_libraries

READ = {  # by functions that name their keys in code
    "qwen35": ("full_attention_interval", "nextn_predict_layers", "rope.dimension_sections", "ssm."),
    "qwen35moe": ("full_attention_interval", "nextn_predict_layers", "rope.dimension_sections", "ssm."),
    "lfm2": ("attention.head_count_kv", "shortconv.l_cache"),
}
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
SAME = {  # key -> what the config calls it
    "context_length": (),  # how long a text may be moves no logit
    "feed_forward_length": (),  # the tensors have it in their shapes
    "expert_feed_forward_length": (),
    "expert_shared_feed_forward_length": (),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_epsilon": EPSILONS,
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "logit_scale": ("logit_scale",),
    "vocab_size": ("vocab_size",),
}


def check_foreign(path: Path, header: GgufHeader) -> None:
    """Raise QzoError where transformers would load another model than the one in the file, or none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _asking_transformers(path):
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    check_blocks(path, header)
    stored = sum(math.prod(info.shape) for info in header.tensors.values())
    with _asking_transformers(path), torch.device("meta"), at_most(stored, len(header.tensors)):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    implied = sum(parameter.numel() for parameter in model.parameters())
    if implied > 2 * stored:  # it would take all memory before the first tensor is found not to fit
        raise QzoError(f"{path}: its metadata imply {implied:,} weights, but it holds {stored:,}; convert it again")
    meta = Metadata(path, header)
    read = _read(meta.architecture)
    groups = tuple(name for name in read if name.endswith("."))
    meta.check_all_read(lambda name, value: name in read or name.startswith(groups) or _agrees(config, name, value))
    known = _tensors(model, meta.architecture)
    unknown = sorted(header.tensors.keys() - known) if known is not None else []
    if unknown:
        raise QzoError(
            f"{path} has {unknown[0]}, for which {type(model).__name__} has no place, and without which it would "
            "compute something else; take the model's safetensors files"
        )
    check_file(path, header)


@contextmanager
def _asking_transformers(path: Path) -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except Exception as error:  # as qzo.load: transformers raises many kinds
        remedy = "take the model's safetensors files"
        raise QzoError(f"{path} has no config that transformers can use: {one_line(error)}; {remedy}") from error


def _read(architecture: str) -> tuple[str, ...]:
    """The keys that transformers reads, or with a dot at the end, how they begin."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    name = {"gpt-oss": "gpt_oss", "qwen2moe": "qwen2_moe", "minimax-m2": "minimax_m2"}.get(architecture, architecture)
    mapping: dict[str, Any] = GGUF_CONFIG_MAPPING
    mapped = tuple(key for key, value in mapping.get(name, {}).items() if value is not None)
    return mapped + READ.get(architecture, ())


def _agrees(config: Any, name: str, value: Any) -> bool:
    """Whether the config says the same as a key."""
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    if name in SAME:
        wanted: list[Any] = [getattr(config, attribute, None) for attribute in SAME[name]]
        absent = all(one is None for one in wanted)
        return (absent and (not wanted or value == 0)) or any(_same(one, value) for one in wanted)
    if name in ("attention.key_length", "attention.value_length"):
        return _same(width, value)
    if name == "rope.dimension_count":
        return width is not None and _same(int(width * share), value)
    if name == "rope.freq_base":
        return _same(rope.get("rope_theta"), value)
    if name == "rope.scaling.type":
        return value == "none" or str(rope.get("rope_type")) == value
    if name == "rope.scaling.factor":
        return _same(rope.get("factor", 1.0), value)
    if name == "rope.scaling.original_context_length":
        return rope.get("rope_type", "default") == "default" or _same(rope["original_max_position_embeddings"], value)
    return False


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, list):
        return len(set(other)) == 1 and _same(one, other[0])
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return math.isclose(one, other, rel_tol=1e-4) if numbers else one is not None and one == other


def _tensors(model: Any, architecture: str) -> set[str] | None:
    """Names of the tensors that transformers puts into the model; None where its loading tells of what is left."""
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.integrations.gguf import is_gguf_arch_supported

    if is_gguf_arch_supported(architecture):
        return None
    kind = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)
    found = set(legacy.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict())))
    tied = {"output.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    return found | tied | {f"{name}.weight" for name in found}  # a stack of experts is no ".weight" in the model
