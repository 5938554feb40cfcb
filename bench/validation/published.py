"""Rows that others published, as recipes: what a row states about its step, in the words of `bench.cases.recipe`.

A row says who ran the step by the repository that it is from (`source`), or by `framework`. What a recipe cannot say is
an error that tells what: the row is counted as not predicted, and never predicted as something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.cases.recipe import Recipe
from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

Row = Mapping[str, Any]
RENAMED = {"BONE": "MISS"}  # by PEFT, in version 0.18
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WHOLE = ("full-finetuning", "full", "ft-bf16")
QUANTIZED = {"none": None, "nf4": {}, "nf4-dq": {"bnb_4bit_use_double_quant": True}}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KBIT = {"use_gradient_checkpointing": True}
# PEFT's comparison on MetaMathQA sorts rows within buckets, longest first. It does not print how long the longest batch
# is; by LoRA of rank 32 it has 689 tokens, where rows are cut at 768.
LONGEST = {768: 689}
AROUND = (64, 640)  # tokens of the batch before the longest, which ends a bucket, and of the one after it


def is_published(row: Row) -> bool:
    """Whether a row has to be read as a recipe: it comes with what the archive of the T4 does not have."""
    return "source" in row or "framework" in row


def recipe_of(row: Row) -> Recipe:
    """The recipe of a row. Raises QzoError for what no recipe says."""
    repository = (row.get("source") or {}).get("repo")
    read = READERS.get(row.get("framework") or repository)
    if read is None:
        raise QzoError(f"how {row.get('framework') or repository or 'it'} runs a step is not known here")
    return read(row)


def _peft_comparison(row: Row) -> Recipe:
    """huggingface/peft, method_comparison/MetaMathQA: a loop of its own, without autocast, the cache kept on."""
    with quiet_libraries():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    config = dict(row["peft_config"])
    kind = config.pop("peft_type", None)
    kind = RENAMED.get(kind, kind)
    if kind == "OFT" and config.get("r"):
        config.setdefault("oft_block_size", 0)  # the one follows from the other
    if kind is not None and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise QzoError(f"the PEFT method {kind} is not in the installed version of PEFT")
    if kind == "OFT" and str(row.get("versions", {}).get("peft")).startswith("0.15"):
        raise QzoError("OFT is another computation since PEFT 0.16")
    longest = LONGEST.get(row["max_seq_len"])
    if longest is None:
        raise QzoError(f"the longest batch of rows cut at {row['max_seq_len']} tokens is not known")
    if row["optimizer"] != "adamw":
        raise QzoError(f"the optimizer {row['optimizer']} is not known")
    size = row["batch_size"]
    arguments = {"optim": "adamw_torch", "torch_empty_cache_steps": 1} | _checkpointing(row)
    return Recipe(
        row["experiment"], arguments, config | {"task_type": "CAUSAL_LM"} if kind else None,
        PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__ if kind else "", dtype=DTYPES[row["base_dtype"]], batch_size=size,
        lengths=(AROUND[0],) * size + (longest,) * size + (AROUND[1],) * size, loop="plain",
        use_cache=row["use_cache"], masked=True,
    )  # fmt: skip


def _trainer(row: Row) -> Recipe:
    """The Trainer of transformers, or trl's on top of it, on rows of one length."""
    if row.get("fused_kernels") or row.get("liger"):
        raise QzoError(f"the kernels of {row.get('framework_config') or 'Liger'} are not known")
    if row["quantization"] not in QUANTIZED:
        raise QzoError(f"training on {row['quantization']} by PEFT is not known")
    quantization = QUANTIZED[row["quantization"]]
    autocast = {row["base_dtype"]: True} if row.get("autocast") and row["base_dtype"] != "fp32" else {}
    return Recipe(
        row["method"], {"optim": "adamw_torch"} | autocast | _checkpointing(row), _lora(row),
        quantization=None if quantization is None else NF4 | quantization,
        kbit=KBIT if row.get("kbit_preparation") else None, dtype=DTYPES[row["base_dtype"]],
        batch_size=row["batch_size"], lengths=(row["seq_len"],),
    )  # fmt: skip


def _lora(row: Row) -> dict[str, Any] | None:
    if row["method"] in WHOLE:
        return None
    options = {"r": row["lora_rank"], "lora_alpha": row["lora_rank"], "target_modules": row["lora_targets"]}
    return options | {"lora_dropout": row.get("lora_dropout") or 0.0, "task_type": "CAUSAL_LM"}


def _checkpointing(row: Row) -> dict[str, Any]:
    return {"gradient_checkpointing": True} if row.get("gradient_checkpointing") else {}


READERS: dict[str | None, Callable[[Row], Recipe]] = {
    "huggingface/peft": _peft_comparison,
    "foundation-model-stack/fms-acceleration": _trainer,
}
