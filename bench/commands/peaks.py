"""What a run and its alternatives need, simulated, for `qzo report`, which asks whoever is installed as `qzo.peaks`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.quantizations import FORMATS
from bench.records.record import Record
from bench.worlds.runner import Worker

# full fine-tuning in the fewest bytes a parameter, and as the Trainer of transformers does it with bf16=True
FULL = ("ft-bf16", "ft-amp")
BESIDE = {
    "qzo": ("qzo", "qlora", "lora", *FULL),
    "qlora": ("qlora", "lora", *FULL),
    "mezo": ("mezo", "lora", *FULL),
    "lora": ("lora", *FULL),
    "ft": ("lora", *FULL),
}
NAMES = {  # class of a layer -> its format, of which the bits or the type within the file are part
    "QuantLinear": "gptq-{bits}",
    "AwqLinear": "awq",
    "BnbLinear4bit": "nf4",
    "BnbLinear8bit": "int8",
    "HqqLinear": "hqq-{bits}",
    "AoInt8Linear": "torchao-int8",
    "AoInt4Linear": "torchao-int4",
    "GgufLinear": "gguf-{type}",
}


def peaks(
    model: str, method: str, batch_size: int, seq_len: int, device: str, packed: Mapping[str, Any] | None
) -> Iterator[Record]:
    """Records of a step of the run's own method and of those beside it, each when it is asked for.

    Args:
        model: folder, .gguf file or hub id.
        method: of `qzo train`.
        batch_size, seq_len: rows and tokens of its largest batch.
        device: "cpu", or the name that CUDA gives a GPU.
        packed: class, type and bits of most quantized layers; None, there is none.

    Raises QzoError for a GPU that is not known. What else goes wrong is in a record, as its reason.
    """
    gpu = gpus.CPU if device == gpus.CPU else gpus.find(device).name
    with tempfile.TemporaryDirectory(prefix="qzo-peaks-") as folder:
        worker = Worker(Path(folder) / "worker.log")  # what libraries print there is nobody's concern
        try:
            for name in BESIDE[method]:
                quantization = quantization_of(packed) if name == "qzo" else None
                size = batch_size, max(2, seq_len)
                yield worker.ask(BenchCase(model, name, "sim", gpu, *size, quantization=quantization))
        finally:
            worker.close()


def quantization_of(packed: Mapping[str, Any] | None) -> str | None:
    """The bench's name of a format; None, its default, for one that it does not simulate."""
    about = packed or {}
    name = NAMES.get(str(about.get("layer")), "").format(bits=about.get("bits"), type=about.get("type")).lower()
    return name if name in FORMATS else None
