"""The architectures whose GGUF files are understood: the config of each, and how its tensors lie in the file.

A config is made from the file's metadata alone, key by key, as llama.cpp reads them; a key that is left over and may
matter is an error (see `metadata`), so that a file either computes what llama.cpp computes or is refused. What a file
does not name at all is what transformers takes for the family.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.formats.gguf.header import GgufHeader
from qzo.formats.gguf.metadata.keys import Metadata, tokens_of
from qzo.formats.gguf.metadata.rope import Turning, rope_parameters
from qzo.quiet import quiet_libraries

Factors = dict[str, list[float]]
Options = dict[str, Any]
QKV_BIAS = tuple(f"attn_{part}.bias" for part in ("q", "k", "v"))
ATTENTION_BIAS = (*QKV_BIAS, "attn_output.bias")
MLP_BIAS = tuple(f"ffn_{part}.bias" for part in ("gate", "up", "down"))


@dataclass(frozen=True)
class Family:
    """An architecture.

    Args:
        options: metadata and factors of the rotary positions -> model_type and options of the config of transformers.
        paired: whether the rows of q and k are stored pair by pair.
        shift: what is added to the weights of norms in the file.
        biases: of linear layers that a file may have or not; the model has all of them, 0 where the file has none.
        tokenizer: what transformers' AutoTokenizer takes for the model, by its name there.
    """

    options: Callable[[Metadata, Factors], tuple[str, Options]]
    paired: bool = False
    shift: float = 0.0
    biases: tuple[str, ...] = ()
    tokenizer: str = "TokenizersBackend"


def model_config(meta: Metadata, factors: Factors) -> Any:
    """The config of a file of a known family. Raises QzoError for a key that matters and is not understood."""
    from transformers import CONFIG_MAPPING

    kind, options = FAMILIES[meta.architecture].options(meta, factors)
    meta.check_all_read()
    try:
        with quiet_libraries():
            config = CONFIG_MAPPING[kind](**options)
    except Exception as error:  # as qzo.load: transformers raises many kinds
        raise QzoError(f"{meta.path} has no config that transformers can use: {one_line(error)}") from error
    config._name_or_path = str(meta.path)
    return config


def _sizes(meta: Metadata) -> Options:
    """What every family has; of `head_dim`, what the file says or its tensors imply."""
    hidden, heads = meta.whole("embedding_length"), meta.whole("attention.head_count")
    rows = _rows(meta.header, "blk.0.attn_q.weight")
    implied = rows // heads if rows % heads == 0 else 0
    dims = meta.whole("attention.key_length", None) or implied or hidden // heads
    if not 1 <= dims <= 2**16 or heads > hidden:
        raise QzoError(f"{meta.path}: its config says {heads} heads of a width of {hidden}; convert it again")
    for name in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        meta.must_be(name, dims, "the length of a key")
    vocabulary = meta.whole("vocab_size", None) or _rows(meta.header, "token_embd.weight") or 1
    tokens = tokens_of(meta.header)
    if (tokens["pad_token_id"] or 0) >= vocabulary:
        tokens["pad_token_id"] = None
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": meta.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.whole("attention.head_count_kv", heads),
        "head_dim": dims,
        "max_position_embeddings": meta.whole("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in meta.header.tensors,
        **tokens,
    }


def _rows(header: GgufHeader, name: str) -> int:
    """Rows of a tensor; 0 where there is none."""
    info = header.tensors.get(name)
    return info.shape[0] if info is not None and info.shape else 0


def _with_biases(meta: Metadata, option: str, names: tuple[str, ...]) -> Options:
    """An option that gives the model all biases, where the file has one of them."""
    return {option: any(name.endswith(names) for name in meta.header.tensors)}


def _turned(meta: Metadata, options: Options, factors: Factors, names_all: bool = True, base: float = 1e4) -> Options:
    """The rotary positions of a model whose heads are turned as a whole."""
    dims = options["head_dim"]
    for name in ("rope.dimension_count", "rope.dimension_count_swa"):
        meta.must_be(name, dims, "the length of a head")
    return _rope(meta, options, factors, dims, names_all, base)


def _rope(meta: Metadata, options: Options, factors: Factors, dims: int, names_all: bool, base: float) -> Options:
    for name, values in factors.items():
        if len(values) != dims // 2 or not all(0 < value < math.inf for value in values):
            raise QzoError(f"{meta.path}: {name} has {len(values)} factors; need {dims // 2} positive numbers")
    theta = meta.number("rope.freq_base", base) or base
    turning = Turning(theta, dims, options["max_position_embeddings"], factors, names_all)
    return rope_parameters(meta, turning)


def _scaled(meta: Metadata, options: Options) -> None:
    """A scale of q·k other than that of the length of a head has no place in the config."""
    meta.must_be("attention.scale", options["head_dim"] ** -0.5, "that of the length of a head")


def _llama(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    """Llama; with experts Mixtral, with a sliding window Mistral, which differ in nothing else."""
    options = _sizes(meta) | {"intermediate_size": meta.whole("feed_forward_length")}
    experts = bool(meta.number("expert_count", 0))
    options["rope_parameters"] = _turned(meta, options, factors, base=1e6 if experts else 1e4)
    _scaled(meta, options)
    window = _one_window(meta, options)
    if experts:
        options |= {"num_local_experts": meta.whole("expert_count"), "sliding_window": window}
        return "mixtral", options | {"num_experts_per_tok": _experts_used(meta)}
    meta.number("expert_used_count", 0)
    if window is not None:
        return "mistral", options | {"sliding_window": window}
    biases = _with_biases(meta, "attention_bias", ATTENTION_BIAS) | _with_biases(meta, "mlp_bias", MLP_BIAS)
    return "llama", options | biases


def _qwen2(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    options = _sizes(meta) | {"intermediate_size": meta.whole("feed_forward_length")}
    options["rope_parameters"] = _turned(meta, options, factors)
    _scaled(meta, options)
    return "qwen2", options | _windows(meta, options, None)


def _qwen3(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    options = _qwen2(meta, factors)[1]
    return "qwen3", options | _with_biases(meta, "attention_bias", ATTENTION_BIAS)


def _qwen3moe(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    """Router weights are normed over the experts chosen, as llama.cpp does whatever the file says."""
    options = _sizes(meta) | {
        "intermediate_size": meta.whole("feed_forward_length", None) or meta.whole("expert_feed_forward_length"),
        "moe_intermediate_size": meta.whole("expert_feed_forward_length"),
        "num_experts": meta.whole("expert_count"),
        "num_experts_per_tok": _experts_used(meta),
        "norm_topk_prob": bool(meta.get("expert_weights_norm", True)),
    }
    _check_gating(meta)
    options["rope_parameters"] = _turned(meta, options, factors)
    _scaled(meta, options)
    window = _one_window(meta, options)
    options |= {"use_sliding_window": window is not None, "sliding_window": window}
    return "qwen3_moe", options | _with_biases(meta, "attention_bias", ATTENTION_BIAS)


def _qwen2moe(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    """Qwen1.5-MoE and Qwen2-MoE: an expert more that every token goes to, by a gate of its own.

    Sizes that a file does not name, and router weights that are not normed, as llama.cpp takes them.
    """
    used, width = _experts_used(meta), meta.whole("feed_forward_length")
    options = _sizes(meta) | {
        "intermediate_size": width,
        "moe_intermediate_size": meta.whole("expert_feed_forward_length", None) or width // used,
        "shared_expert_intermediate_size": meta.whole("expert_shared_feed_forward_length", None) or width,
        "num_experts": meta.whole("expert_count"),
        "num_experts_per_tok": used,
        "norm_topk_prob": False,
    }
    if meta.get("expert_weights_norm", False):
        raise meta.refused("expert_weights_norm", "and only router weights as they are, are known here")
    _check_gating(meta)
    options["rope_parameters"] = _turned(meta, options, factors)
    _scaled(meta, options)
    if _one_window(meta, options) is not None:
        raise meta.refused("attention.sliding_window", "which no file of this architecture has")
    return "qwen2_moe", options | _with_biases(meta, "qkv_bias", QKV_BIAS)


def _check_gating(meta: Metadata) -> None:
    if meta.get("expert_gating_func", 1) not in (0, 1):
        raise meta.refused("expert_gating_func", "and only 1, softmax, is known here")


def _experts_used(meta: Metadata) -> int:
    """The experts of a token."""
    used, count = meta.whole("expert_used_count"), meta.whole("expert_count")
    if used > count:
        raise meta.refused("expert_used_count", f"and there are {count}")
    return used


def _phi3(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    """Part of a head may be turned; of kinds of scaling the model knows longrope alone."""
    options = _sizes(meta) | {"intermediate_size": meta.whole("feed_forward_length")}
    head = options["hidden_size"] // options["num_attention_heads"]  # from which the model takes it
    if "attention.key_length" in meta.values and meta.whole("attention.key_length") != head:
        raise meta.refused("attention.key_length", f"and only {head}, an equal share of the width, is known here")
    dims = meta.whole("rope.dimension_count", head)
    if dims > head or dims % 2:
        raise meta.refused("rope.dimension_count", f"which is no part of a head of {head}")
    options |= {"head_dim": head, "sliding_window": _one_window(meta, options)}
    rope = _rope(meta, options, factors, dims, False, 1e4)
    share = dims / head if int(head * (dims / head)) == dims else math.nextafter(dims / head, 1.0)
    original = rope.get("original_max_position_embeddings", options["max_position_embeddings"])
    options |= {
        "rope_parameters": rope | {"partial_rotary_factor": share},
        "original_max_position_embeddings": original,
    }
    _scaled(meta, options)
    del options["head_dim"]
    return "phi3", options


def _gemma(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    options = _sizes(meta) | {"intermediate_size": meta.whole("feed_forward_length")}
    meta.must_be("embedding_scale", options["hidden_size"] ** 0.5, "the root of the width")
    options["rope_parameters"] = _turned(meta, options, factors)
    _scaled(meta, options)
    return "gemma", options | _with_biases(meta, "attention_bias", ATTENTION_BIAS)


def _gemma2(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    options = _gemma_sizes(meta, largest=46)
    options["rope_parameters"] = _turned(meta, options, factors)
    options |= {
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0) or None,
    }
    return "gemma2", options | _windows(meta, options, 2, 4096)


def _gemma3(meta: Metadata, factors: Factors) -> tuple[str, Options]:
    """Layers with a window turn by a base of their own, and never by what the others are scaled with."""
    options = _gemma_sizes(meta, largest=62)
    full = _turned(meta, options, factors, base=1e6)
    local = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base_swa", 1e4) or 1e4}
    options |= {
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "final_logit_softcapping": meta.number("final_logit_softcapping", 0.0) or None,
    }
    return "gemma3_text", options | _windows(meta, options, 6, 4096)


def _gemma_sizes(meta: Metadata, largest: int) -> Options:
    """Sizes of Gemma 2 and 3.

    Their converter writes no scale of q·k: it is that of 256 in every published model (the length of their heads, by
    which llama.cpp goes) but the largest, where it is that of an equal share of the width.
    """
    options = _sizes(meta) | {"intermediate_size": meta.whole("feed_forward_length")}
    meta.must_be("embedding_scale", options["hidden_size"] ** 0.5, "the root of the width")
    width = options["hidden_size"] // options["num_attention_heads"]
    usual = width if options["num_hidden_layers"] == largest else 256
    given = meta.number("attention.scale", 0.0)
    scalar = given**-2 if given else usual
    options["query_pre_attn_scalar"] = round(scalar) if abs(scalar - round(scalar)) < 1e-4 * scalar else scalar
    return options | _with_biases(meta, "attention_bias", ATTENTION_BIAS)


def _one_window(meta: Metadata, options: Options) -> int | None:
    """The window of every layer; None where there is none, or one that no text is longer than."""
    window = _window(meta, options, 0)
    pattern = _pattern(meta)
    if window is None or pattern is None or pattern == 0:
        return window
    if isinstance(pattern, list) and all(pattern):
        return window
    raise meta.refused("attention.sliding_window_pattern", "and the model has one window for all its layers")


def _windows(meta: Metadata, options: Options, period: int | None, usual: int = 0) -> Options:
    """Window and kind of every layer, of which the last one of each `period` sees the whole text."""
    window, layers = _window(meta, options, usual), options["num_hidden_layers"]
    pattern = _pattern(meta)
    pattern = period if pattern is None else pattern
    pattern = 1 if meta.values.get("attention.sliding_window") == 0 and pattern else pattern
    if window is not None and pattern is None:
        raise meta.refused("attention.sliding_window", "and the file does not tell of which layers")
    if isinstance(pattern, list) and len(pattern) != layers:
        raise meta.refused("attention.sliding_window_pattern", f"which is not one for each of {layers} layers")
    if not isinstance(pattern, list):
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)] if pattern is not None else []
    if window is None and period is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = ["sliding_attention" if local else "full_attention" for local in pattern]
    return {"sliding_window": window or options["max_position_embeddings"], "layer_types": kinds} | (
        {"use_sliding_window": True} if period is None else {}
    )


def _pattern(meta: Metadata) -> Any:
    """A period, or whether each layer has the window; None where the file says neither. Raises QzoError."""
    name = "attention.sliding_window_pattern"
    pattern = meta.listed(name)
    period = isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 0
    if name in meta.values and not period and not isinstance(pattern, list):
        raise meta.refused(name, "which is neither a period nor a list")
    return pattern


def _window(meta: Metadata, options: Options, usual: int) -> int | None:
    window = usual
    if meta.get("attention.sliding_window", usual) != 0:
        window = meta.whole("attention.sliding_window", usual)
    return window if 0 < window < options["max_position_embeddings"] else None


_QWEN, _GEMMA = "Qwen2Tokenizer", "GemmaTokenizer"
FAMILIES = {
    "llama": Family(_llama, paired=True, biases=(*ATTENTION_BIAS, *MLP_BIAS)),  # Mistral and Mixtral too
    "qwen2": Family(_qwen2, tokenizer=_QWEN),
    "qwen2moe": Family(_qwen2moe, biases=QKV_BIAS, tokenizer=_QWEN),
    "qwen3": Family(_qwen3, biases=ATTENTION_BIAS, tokenizer=_QWEN),
    "qwen3moe": Family(_qwen3moe, biases=ATTENTION_BIAS, tokenizer=_QWEN),
    "gemma": Family(_gemma, shift=1.0, biases=ATTENTION_BIAS, tokenizer=_GEMMA),
    "gemma2": Family(_gemma2, shift=1.0, biases=ATTENTION_BIAS, tokenizer=_GEMMA),
    "gemma3": Family(_gemma3, shift=1.0, biases=ATTENTION_BIAS, tokenizer=_GEMMA),
    "phi3": Family(_phi3),
}
