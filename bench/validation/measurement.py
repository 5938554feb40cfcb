"""Measurement files, and the measurements in them that were made by others: checked and turned into bytes.

A file has one JSON object a line: a record of our own (`bench.validation.recorded`), a row with a `recipe`
(`bench.validation.recipes`), one that others published (`bench.validation.published`), or a row of `fitcheck-llm`'s
archive, whose keys are what was trained (model_id, architecture, method, base_dtype, attention, batch_size, seq_len,
lora_rank, lora_targets, gradient_checkpointing, optimizer, gpu), and `measured_mib`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import catalog, gpus, models
from bench.cases.pretrained import CONFIG_MAPPING, AutoConfig
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
OTHER_KEYS = {"process_nvidia_smi": "process"}  # of `measured_mib`, where a source says it in its own words
# What a source prints without its name: (metric, what its "GB" are worth in those of 1e9 bytes that the row was turned
# from). MeZO's are nvidia-smi's, and GiB: the weights of OPT-30B alone, 59.9e9 bytes, are more than its 58.
PRINTED = {
    "princeton-nlp/MeZO": ("process", (1 << 30) / 1e9),
    "QwenLM/Qwen": ("process", 1.0),
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
    "max_position_embeddings": "max_position_embeddings",
}
FAMILIES = (  # pattern in a model's id -> model_type, for models that are not in the catalog; the first match counts
    (r"qwen-?3", "qwen3"),
    (r"qwen", "qwen2"),
    (r"ministral", "ministral"),
    (r"mixtral", "mixtral"),
    (r"mistral|zephyr", "mistral"),
    (r"gemma-?3", "gemma3_text"),
    (r"gemma-?2-", "gemma2"),  # and not gemma-2b
    (r"gemma", "gemma"),
    (r"phi-?(3|4)", "phi3"),
    (r"phi", "phi"),
    (r"olmo-?2", "olmo2"),
    (r"olmo", "olmo"),
    (r"stablelm.*alpha|pythia|neox|dolly-v2", "gpt_neox"),
    (r"stablelm", "stablelm"),
    (r"granite|powerlm", "granite"),
    (r"starcoder2", "starcoder2"),
    (r"santacoder|starcoder|bigcode", "gpt_bigcode"),
    (r"falcon", "falcon"),
    (r"smollm-?3", "smollm3"),
    (r"llama|smollm|yi-|vicuna|alpaca|deepseek-llm", "llama"),
    (r"opt-", "opt"),
)
INNER = {"gpt_bigcode": {"intermediate_size": "n_inner"}}  # a field that has another name and no alias
LEARNED_POSITIONS = ("gpt_bigcode", "opt")  # whose number is memory; others have as many as anyone asks for
UNKNOWN = "llama"  # of a name that says nothing, where the row has the sizes: what most models are like
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
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise QzoError(f"cannot read {path}: {error.strerror}; name another file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise QzoError(f"{path}, line {number} is not JSON: {error}; correct the line") from error
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
        raise QzoError(f"{path} holds no measurement; add a line for each")
    return rows


def measured_bytes(row: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each metric that the row has."""
    found = {name: row["measured_mib"].get(key) for name, key in METRICS.items()}
    found |= {name: row["measured_mib"][key] for key, name in OTHER_KEYS.items() if key in row["measured_mib"]}
    metric, unit = PRINTED.get(str((row.get("source") or {}).get("repo")), ("", 1.0))
    if metric and "memory_as_printed" in row["measured_mib"]:
        found[metric] = unit * row["measured_mib"]["memory_as_printed"]
    return {name: round(value * MIB) for name, value in found.items() if value is not None}


def parse(row: Mapping[str, Any]) -> Measurement:
    """The row as a case that can be predicted. Raises QzoError saying what cannot."""
    try:
        method, attention, dtype = row["method"], row["attention"], row["base_dtype"]
        if method not in METHODS:
            raise QzoError(f"method {method!r} of a measurement is not known; choose {' or '.join(METHODS)}")
        if attention not in ATTENTIONS:
            raise QzoError(f"attention {attention!r} of a measurement is not known; choose {' or '.join(ATTENTIONS)}")
        if dtype not in DTYPES:
            raise QzoError(f"base_dtype {dtype!r} of a measurement is not known; choose {' or '.join(DTYPES)}")
        if row["optimizer"] != "adamw":
            raise QzoError(f"optimizer {row['optimizer']!r} of a measurement is not known; leave it out for adamw")
        return Measurement(
            source_of(row["model_id"], row["architecture"]), gpus.find(row["gpu"]), method, dtype,
            ATTENTIONS[attention], row["batch_size"], row["seq_len"], row["lora_rank"], tuple(row["lora_targets"]),
            row["gradient_checkpointing"], measured_bytes(row),
        )  # fmt: skip
    except KeyError as error:
        raise QzoError(f"a measurement has no {error}; add it") from error


def source_of(model_id: str, architecture: Mapping[str, Any]) -> models.ModelSource:
    """The model by its name or hub id: the catalog's architecture, or that of its family with the row's sizes.

    Raises QzoError for one that is not in the catalog and comes without sizes: another model's would be taken for its.
    """
    sizes = {field: architecture[key] for key, field in ARCHITECTURE.items() if architecture.get(key) is not None}
    plain = model_id.lower()
    for name in catalog.names():
        source = models.resolve(name)
        same_name = plain == name or plain.startswith(_stem((source.hub or "?").lower()))
        if same_name and all(getattr(source.config, field, value) == value for field, value in sizes.items()):
            return models.ModelSource(name, source.config, hub=model_id)
    if not {"hidden_size", "num_hidden_layers"} <= set(sizes):
        raise QzoError(
            f"the model {model_id!r} is not in the catalog, and its row has no architecture; give hidden_size, "
            "num_layers and the other keys of bench/validation/measurement.py"
        )
    model_type = next((kind for pattern, kind in FAMILIES if re.search(pattern, plain)), UNKNOWN)
    if model_type not in LEARNED_POSITIONS:
        sizes = {"max_position_embeddings": 1 << 17} | sizes
    config = AutoConfig.for_model(model_type, **_as_named(model_type, sizes))
    return models.ModelSource(plain.replace("/", "--"), config, hub=model_id)


def _as_named(model_type: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes by the names that this family's config gives them."""
    names = CONFIG_MAPPING[model_type].attribute_map | INNER.get(model_type, {})
    return {names.get(field, field): value for field, value in sizes.items()}


def _stem(hub: str) -> str:
    return hub.removesuffix("-hf").removesuffix("-instruct")
