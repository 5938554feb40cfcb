"""QwenLM/Qwen (finetune.py) and modelscope/ms-swift (Benchmark.md): the Trainer on the first Qwen and other models.

The first Qwen's own modeling file is not in transformers. Its layers are Qwen2's with queries, keys and values in one
product, and its loss is the cross entropy of 16-bit logits, which autocast turns into fp32.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

from bench.cases.recipes.recipe import FLASH, Recipe
from bench.validation.frameworks.gptq import to_gptq
from bench.validation.frameworks.transformers_4 import sixteen_bit_loss, use_loss_of
from bench.validation.published.row import (
    DTYPES,
    WHOLE,
    Change,
    Published,
    Row,
    checkpointing,
    flash_model_of,
    lora,
    model_of,
)
from qzo.errors import QzoError

# Its names -> Qwen2's. `c_proj` is the last product of the attention and of the MLP alike.
NAMES = {
    "c_attn": ["q_proj", "k_proj", "v_proj"], "c_proj": ["o_proj", "down_proj"], "w1": ["up_proj"],
    "w2": ["gate_proj"], "wte": ["embed_tokens"],
}  # fmt: skip
EAGER = "eager"
ALL_LINEAR = ["all linear"]
PACKED = {"none": None, "gptq-4bit": 4, "gptq-8bit": 8}
VERSION = "4.36"  # of transformers when both were measured: the end of 2023
KBIT = {"use_gradient_checkpointing": True}
# Tokens of a sample of ms-swift's benchmark, by its page; a log-normal distribution of that mean and deviation.
MEAN, DEVIATION = 3234, 2548
DRAWN = 8  # lengths: the middles of as many equal shares of what is not longer than allowed


def read_qwen(row: Row) -> Published:
    """A row of Qwen's README: batches padded to the full length. Raises QzoError for DeepSpeed's full fine-tuning."""
    if row["method"] in WHOLE:
        raise QzoError("which stage of DeepSpeed ran full fine-tuning is not told")
    return _trainer(row, (row["seq_len"],), {"gradient_accumulation_steps": 1})


def read_swift(row: Row) -> Published:
    """A row of ms-swift's page: batches of random lengths, the longest as long as allowed."""
    lengths = drawn_lengths(row["seq_len"], row["batch_size"])
    steps = {"gradient_accumulation_steps": len(lengths) // row["batch_size"] // 3}
    return _trainer(row, lengths, steps)


def drawn_lengths(longest: int, batch_size: int) -> tuple[int, ...]:
    """Shares of the distribution below `longest`, and `longest` itself, for nine batches."""
    variance = math.log(1 + (DEVIATION / MEAN) ** 2)
    normal = NormalDist(math.log(MEAN) - variance / 2, math.sqrt(variance))
    below = normal.cdf(math.log(longest))
    found = [round(math.exp(normal.inv_cdf(below * (share + 0.5) / DRAWN))) for share in range(DRAWN)]
    return tuple(length for length in [*found, longest] for _ in range(batch_size))


def _trainer(row: Row, lengths: tuple[int, ...], more: dict[str, Any]) -> Published:
    if row["quantization"] not in PACKED:
        raise QzoError(f"training on {row['quantization']} by PEFT is not known")
    eager = row.get("attention") == EAGER
    source, bits = model_of(row) if eager else flash_model_of(row), PACKED[row["quantization"]]
    arguments = {"optim": "adamw_torch", row["base_dtype"]: True} | checkpointing(row) | more
    arguments |= {"gradient_checkpointing_kwargs": {"use_reentrant": True}} if row.get("gradient_checkpointing") else {}
    recipe = Recipe(
        row["method"], arguments, _adapters(row), kbit=KBIT if bits else None, dtype=DTYPES[row["base_dtype"]],
        attention=EAGER if eager else FLASH, batch_size=row["batch_size"], lengths=lengths,
    )  # fmt: skip
    qwen = "qwen" in row["model_id"].lower()
    changes: tuple[Change, ...] = (use_loss_of(VERSION, sixteen_bit_loss) if qwen else use_loss_of(VERSION),)
    return Published(recipe, source, (to_gptq(bits),) if bits else (), changes)


def _adapters(row: Row) -> dict[str, Any] | None:
    options = lora(row)
    if options is None:
        return None
    targets = row["lora_targets"]
    options["target_modules"] = "all-linear" if targets == ALL_LINEAR else _named(targets)
    saved = row.get("modules_to_save")
    return options | ({"modules_to_save": _named(saved)} if saved else {})


def _named(names: list[str]) -> list[str]:
    return [ours for name in names for ours in NAMES.get(name, [name])]
