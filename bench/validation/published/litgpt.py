"""Lightning-AI/litgpt: the resource tables (finetune/lora.py, adapter.py, adapter_v2.py) and config_hub.

Everything is in bf16, adapters and states too; there is no autocast and no checkpointing, and the first batch is the
longest. A row without a configuration file is of the tables; config_hub's batches are cut at 512 tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.cases.recipes.recipe import Recipe
from bench.validation.frameworks.bitsandbytes_041 import old_products
from bench.validation.frameworks.litgpt.model import built, only_adapters
from bench.validation.frameworks.litgpt.shape import ADAPTER, ADAPTER_V2, Shape
from bench.validation.measurement import MIB
from bench.validation.published.row import WHOLE, Published, Row, model_of
from qzo.errors import QzoError

PARTS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "query": "query", "value": "value", "o_proj": "projection",
    "dense": "projection", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp", "fc1": "mlp", "fc2": "mlp",
    "lm_head": "head",
}  # fmt: skip
GEMMA = {"gelu": True, "unit_offset": True, "scaled": True}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (  # part of a model's id -> what its Config in lit_gpt says
    ("phi-", {"gated": False, "rms": False, "parallel": True, "shared_norm": True, "bias": True, "head_bias": True}),
    ("stablelm-base", {"gated": False, "rms": False, "parallel": True, "bias": True, "rotated": 0.25}),
    ("llama", {}),
    ("gemma-2-", GEMMA | {"norms_after": True, "softcapping": True}),
    ("gemma", GEMMA),
)
ROTATED = {"phi-1_5": 0.5, "phi-2": 0.4}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZED: dict[str, dict[str, Any] | None] = {
    "none": None, "nf4": NF4, "nf4-dq": NF4 | {"bnb_4bit_use_double_quant": True},
}  # fmt: skip
LATER = 8  # how many times shorter the batches after it are taken to be
STATES = 8  # bytes a parameter: weight, gradient and two moments in bf16
OPTIMIZERS = {"adamw": "adamw_torch", "paged-adamw": "paged_adamw_32bit"}


def read(row: Row) -> Published:
    """The recipe of a row. Raises QzoError for methods and models that are not written down here."""
    if row["measured_mib"].get("out_of_memory"):
        raise QzoError("out of memory is no number of bytes")
    shape = _shape(row)
    whole = row["method"] in WHOLE
    if whole and row["measured_mib"]["peak_allocated"] * MIB < STATES * _parameters(shape):
        raise QzoError("the row has fewer bytes than its weights, gradients and AdamW's moments")
    optimizer = OPTIMIZERS[row["optimizer"].split(" (")[0]]
    accumulated = 2 if whole else 1  # gradients are there when the second micro-batch begins
    recipe = Recipe(
        row["method"], {"optim": optimizer, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0},
        quantization=QUANTIZED[row["quantization"]], batch_size=row["batch_size"], lengths=_lengths(row),
        loop="plain",
    )  # fmt: skip
    changes = () if whole else (only_adapters, old_products)
    return Published(recipe, model_of(row), changes=changes, build=built(shape))


def _lengths(row: Row) -> tuple[int, ...]:
    """The resource tables' first batch holds the longest sample. Any later length of under two thirds of it gives the
    same peak.
    """
    longest, rows = row["seq_len"], row["batch_size"]
    return (longest,) if "config" in row else (longest,) * rows + (longest // LATER,) * 2 * rows


def _parameters(shape: Shape) -> int:
    return sum(parameter.numel() for parameter in built(shape)(torch.bfloat16).parameters())


def _shape(row: Row) -> Shape:
    name = row["model_id"].lower()
    kind = next((options for part, options in KINDS if part in name), None)
    if kind is None:
        raise QzoError(f"LitGPT's model of {row['model_id']} is not written down here")
    sizes = row["architecture"]
    rotated = next((share for part, share in ROTATED.items() if part in name), 1.0)
    prompt = row["method"] if row["method"] in (ADAPTER, ADAPTER_V2) else None
    return Shape(
        sizes["num_layers"], sizes["hidden_size"], sizes["num_attention_heads"], sizes["num_kv_heads"],
        sizes["head_dim"], sizes["intermediate_size"], sizes["vocab_size"],
        prompt=prompt, rank=row["lora_rank"] or 0,
        dropout=row["lora_dropout"] or 0.0,
        lora=tuple(dict.fromkeys(PARTS[target] for target in row["lora_targets"] or ())),
        **{"rotated": rotated} | kind,
    )  # fmt: skip
