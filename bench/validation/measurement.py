"""Measurement files, and the measurements in them that were made by others: checked and turned into bytes.

A file has one JSON object a line: a record of our own (`bench.validation.recorded`), or a row of others, whose keys are
those of `fitcheck-llm`'s archive: what was trained (model_id, architecture, method, base_dtype, attention,
batch_size, seq_len, lora_rank, lora_targets, gradient_checkpointing, optimizer, gpu), and `measured_mib`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import catalog, gpus, models
from bench.cases.pretrained import AutoConfig
from bench.records.record import validate_record
from bench.validation.recorded import is_record
from qzo.errors import QzoError

MIB = 1 << 20
METRICS = {  # ours -> key of `measured_mib`
    "allocated": "peak_allocated",
    "reserved": "peak_reserved",
    "process": "process",
    "forward": "peak_forward",
    "backward": "peak_backward",
    "step": "peak_optimizer",
}
ARCHITECTURE = {  # key of a row's `architecture` -> config field of Llama-like models
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}
FAMILIES = {  # part of a model's id -> model_type, for models that are not in the catalog; the first match counts
    "qwen3": "qwen3",
    "qwen": "qwen2",
    "ministral": "ministral",
    "mistral": "mistral",
    "gemma-3": "gemma3_text",
    "gemma-2": "gemma2",
    "gemma": "gemma",
    "phi-3": "phi3",
    "phi-4": "phi3",
    "phi": "phi",
    "olmo-2": "olmo2",
    "olmo": "olmo",
    "stablelm": "stablelm",
    "granite": "granite",
    "starcoder2": "starcoder2",
    "smollm3": "smollm3",
    "llama": "llama",
    "smollm": "llama",
    "yi-": "llama",
}
ATTENTIONS = {"eager": "eager", "sdpa-efficient": "efficient", "sdpa-flash": "flash"}
DTYPES = ("fp16", "bf16")
METHODS = ("lora", "qlora")  # those that the archive has; bench/validation/predict.py tells how they were run


@dataclass(frozen=True)
class Measurement:
    """One row. `measured` holds bytes by the names of `METRICS`, as far as the row has them."""

    source: models.ModelSource
    gpu: gpus.Gpu
    method: str
    dtype: str
    attention: str
    batch_size: int
    seq_len: int
    rank: int
    targets: tuple[str, ...]
    gradient_checkpointing: bool
    measured: dict[str, int]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file. Raises QzoError naming file and line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise QzoError(f"cannot read {path}: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise QzoError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not (is_record(row) or isinstance(row.get("measured_mib"), dict)):
            raise QzoError(
                f"{path}, line {number} has no object 'measured_mib'; see bench/validation/measurement.py for the keys"
            )
        if is_record(row):
            for note in ("key", "predicted"):  # kept for readers of the file; they are made again here
                row.pop(note, None)
            try:
                validate_record(row)
            except QzoError as error:
                raise QzoError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise QzoError(f"{path} holds no measurement")
    return rows


def measured_bytes(row: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each metric that the row has."""
    found = {name: row["measured_mib"].get(key) for name, key in METRICS.items()}
    return {name: round(value * MIB) for name, value in found.items() if value is not None}


def parse(row: Mapping[str, Any]) -> Measurement:
    """The row as a case that can be predicted. Raises QzoError saying what cannot."""
    try:
        method, attention, dtype = row["method"], row["attention"], row["base_dtype"]
        if method not in METHODS:
            raise QzoError(f"method {method!r} of a measurement is not known; {' and '.join(METHODS)} are")
        if attention not in ATTENTIONS:
            raise QzoError(f"attention {attention!r} of a measurement is not known; {', '.join(ATTENTIONS)} are")
        if dtype not in DTYPES:
            raise QzoError(f"base_dtype {dtype!r} of a measurement is not known; {', '.join(DTYPES)} are")
        if row["optimizer"] != "adamw":
            raise QzoError(f"optimizer {row['optimizer']!r} of a measurement is not known; adamw is")
        return Measurement(
            source_of(row["model_id"], row["architecture"]), gpus.find(row["gpu"]), method, dtype,
            ATTENTIONS[attention], row["batch_size"], row["seq_len"], row["lora_rank"], tuple(row["lora_targets"]),
            row["gradient_checkpointing"], measured_bytes(row),
        )  # fmt: skip
    except KeyError as error:
        raise QzoError(f"a measurement has no {error}") from error


def source_of(model_id: str, architecture: Mapping[str, Any]) -> models.ModelSource:
    """The model by its hub id: the catalog's architecture, or that family's; sizes are those of the row."""
    sizes = {field: architecture[key] for key, field in ARCHITECTURE.items() if architecture.get(key) is not None}
    plain = model_id.lower()
    for name in catalog.names():
        source = models.resolve(name)
        same_name = plain.startswith((source.hub or "?").lower().removesuffix("-hf").removesuffix("-instruct"))
        if same_name and all(getattr(source.config, field, value) == value for field, value in sizes.items()):
            return models.ModelSource(name, source.config, hub=model_id)
    for part, model_type in FAMILIES.items():
        if part in plain:
            config = AutoConfig.for_model(model_type, **sizes, max_position_embeddings=1 << 17)
            return models.ModelSource(plain.replace("/", "--"), config, hub=model_id)
    raise QzoError(f"the architecture of {model_id!r} is not known; families: {', '.join(FAMILIES)}")
