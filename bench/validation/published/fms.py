"""foundation-model-stack/fms-acceleration, scripts/benchmarks: SFTTrainer on packed rows, reentrant checkpointing.

Which of the fused kernels a configuration switches on stands in its file of sample-configurations. Two of them spell
`fast_rsm_layernorm`, which the plugin does not read; their rows were measured with the norm fused all the same: so
they are 0.3 to 0.7 % off by allocated bytes (Mistral), otherwise 3.6 to 5.1 % too high.

What trains is fms-hf-tuning, which gives a tokenizer the special tokens that it lacks, and embedding and head a row for
each (tuning/utils/tokenizer_data_utils.py): what stays allocated after training has these rows, to the byte.
nvidia-smi was read once a second (benchmark.py), a step takes several.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from bench.cases.recipes.recipe import FLASH, Recipe
from bench.validation.frameworks.foak import fast_loss, fast_loss_of_given, fuse, fuse_head_loss
from bench.validation.frameworks.gptq import GROUP_SIZE, to_gptq
from bench.validation.frameworks.mixtral_4 import separate_experts
from bench.validation.frameworks.transformers_4 import (
    keep_presents,
    repeat_keys,
    sixteen_bit_loss,
    use_loss_of,
)
from bench.validation.frameworks.trl import adapters_cast_by_trl
from bench.validation.published.row import DTYPES, Change, Published, Row, checkpointing, flash_model_of, lora
from qzo.errors import QzoError

QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
KBIT = {"use_gradient_checkpointing": True}
PACKED = {"none": None, "nf4": None, "gptq-4bit": 4}
REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
REPEATED_UNTIL = (4, 48)
UNGROUPED = {"TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": None}  # the main branch, by its model card
BIGCODE = "gpt_bigcode"  # its forward makes the cross entropy of 16-bit logits itself, until 4.49
ADDED = (  # pattern in a model's id -> how many special tokens its tokenizer lacks: padding, of Llama 3 unknown too
    (r"llama-3", 2),
    (r"llama-2|mistral|mixtral", 1),
)
TOKENS = re.compile(r"= ([\d.]+)$")
NOISE = 0.01  # of a length that is a quotient of throughputs


def read(row: Row) -> Published:
    """The recipe of a row. Raises QzoError for a base that is not quantized in a way known here."""
    if row["quantization"] not in PACKED:
        raise QzoError(f"training on {row['quantization']} by PEFT is not known")
    source = flash_model_of(row)
    source.config.vocab_size += added_tokens(row["model_id"])
    arguments: dict[str, Any] = {"optim": "adamw_torch"} | checkpointing(row)
    arguments |= REENTRANT if row.get("gradient_checkpointing") else {}
    arguments |= {row["base_dtype"]: True} if row.get("autocast") else {}
    recipe = Recipe(
        row["method"], arguments, lora(row), quantization=QUANTIZATION if row["quantization"] == "nf4" else None,
        kbit=KBIT if row.get("kbit_preparation") or row["quantization"] == "gptq-4bit" else None,
        dtype=DTYPES[row["base_dtype"]], attention=FLASH, batch_size=row["batch_size"], lengths=(tokens_of(row),),
        versions=dict(row.get("versions") or {}),
    )  # fmt: skip
    bits = PACKED[row["quantization"]]
    size = UNGROUPED.get(row["model_id"], GROUP_SIZE)
    loaded = (separate_experts, *([to_gptq(bits, size)] if bits else []))
    changes = tuple(_changes(row, source.config.model_type))
    if source.config.model_type == "mistral" and version_of(row) < REPEATED_UNTIL:
        changes += (repeat_keys,)
    return Published(recipe, source, loaded, changes, alike=keep_presents not in changes, sampled=True)


def added_tokens(model_id: str) -> int:
    """Rows that embedding and head were made longer by."""
    return next((count for pattern, count in ADDED if re.search(pattern, model_id.lower())), 0)


def version_of(row: Row) -> tuple[int, ...]:
    """Of transformers: (major, minor)."""
    return tuple(int(part) for part in (row.get("versions") or {}).get("transformers", "5.0").split(".")[:2])


def tokens_of(row: Row) -> int:
    """The length of a packed row: as stated, unless the quotient of the two throughputs says that the model has fewer
    positions (santacoder has 2,048).
    """
    found = TOKENS.search(row.get("seq_len_from") or "")
    counted = float(found.group(1)) if found else row["seq_len"]
    return row["seq_len"] if abs(counted / row["seq_len"] - 1) < NOISE else round(counted)


def _changes(row: Row, model_type: str) -> list[Change]:
    version = (row.get("versions") or {}).get("transformers", "5")
    fused, quantized = bool(row.get("fused_kernels")), row["quantization"] != "none"
    if model_type == BIGCODE:
        return [use_loss_of(version, fast_loss_of_given if fused else sixteen_bit_loss), keep_presents]
    if not fused:
        return [use_loss_of(version), *([adapters_cast_by_trl] if row.get("kbit_preparation") else [])]
    kernels = fuse(norms=True, rope=True, adapters=quantized)
    dtype = getattr(torch, DTYPES[row["base_dtype"]])
    return [kernels, fuse_head_loss(dtype) if row.get("liger") else use_loss_of(version, fast_loss)]
