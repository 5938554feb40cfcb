"""Records of llama2-13b as the bench writes them: exact where the sizes follow from the shapes, plausible elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.records.files import write_json, write_record
from bench.records.record import Record, build_record, failed_record
from bench.records.summary import summarise

PARAMETERS = 13_015_864_320
BF16 = 2 * PARAMETERS  # 26,031,728,640
EMBEDDINGS_AND_NORMS = 655_360_000 + 829_440
CODES = 6_343_884_800
SCALES = 99_123_200  # in number
CODES_2BIT = 12_687_769_600 // 8 * 2 + 280 * (1 << 20)  # 16 bits for 8 weights, and a codebook a layer
ADAPTERS = 6_553_600
CONTEXT = 414 << 20
SLACK = {"mezo": 180 << 20, "qzo": 96 << 20, "qzo-full": 96 << 20, "qzo-2bit": 90 << 20}

ENVIRONMENT = {
    "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7", "platform": "Linux-6.1-x86_64",
    "gpu": None, "driver": None, "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False,
}  # fmt: skip

ROLES: dict[str, dict[str, int]] = {
    "ft-bf16": {"weights": BF16, "gradients": BF16, "optimizer": 2 * BF16 + 1452, "temporaries": 530 << 20},
    "ft-mixed": {"weights": BF16, "gradients": BF16, "optimizer": 104_126_914_560 + 1452, "temporaries": 530 << 20},
    "ft-amp": {"weights": 2 * BF16, "gradients": 2 * BF16, "optimizer": 4 * BF16 + 1452, "temporaries": 1060 << 20},
    "ft-sgd": {"weights": BF16, "gradients": BF16, "activations": 21 << 20, "temporaries": 312 << 20},
    "lora": {"weights": BF16 + 4 * ADAPTERS, "gradients": 4 * ADAPTERS, "optimizer": 8 * ADAPTERS,
             "activations": 1_090 << 20, "temporaries": 64 << 20},
    "qlora": {"weights": EMBEDDINGS_AND_NORMS + 4 * ADAPTERS, "quantization": CODES + 204_000_000,
              "gradients": 4 * ADAPTERS, "optimizer": 8 * ADAPTERS, "activations": 1_090 << 20,
              "temporaries": 320 << 20},
    "qlora-lean": {"weights": EMBEDDINGS_AND_NORMS + 2 * ADAPTERS, "quantization": CODES + 101_000_000,
                   "gradients": 2 * ADAPTERS, "optimizer": 2 * ADAPTERS, "activations": 80 << 20,
                   "temporaries": 150 << 20},
    "peqa-lean": {"weights": EMBEDDINGS_AND_NORMS, "quantization": CODES + 4 * SCALES, "activations": 80 << 20,
                  "temporaries": 170 << 20},
    "mezo": {"weights": BF16, "noise": 16 << 20, "temporaries": 44 << 20},
    "qzo": {"weights": EMBEDDINGS_AND_NORMS, "quantization": CODES + 4 * SCALES, "noise": 16 << 20,
            "temporaries": 141_557_760},
    "qzo-full": {"weights": 829_440, "quantization": CODES + 4 * SCALES + 330_240_000, "noise": 16 << 20,
                 "temporaries": 141_557_760},
    "qzo-2bit": {"weights": EMBEDDINGS_AND_NORMS, "quantization": CODES_2BIT + 4_300_000, "noise": 4 << 20,
                 "temporaries": 141_557_760},
}  # fmt: skip
RANDOM_CODES = "codes drawn at random: memory, not accuracy"


def case_of(method: str, **changes: Any) -> dict[str, Any]:
    quantized = method in ("qlora", "qlora-lean", "peqa-lean", "qzo", "qzo-full", "qzo-2bit")
    return {
        "model": "llama2-13b", "method": method, "batch_size": 1, "seq_len": 128, "dtype": "bfloat16",
        "attention": "flash", "gradient_checkpointing": False, "optimizer": "adamw",
        "quantization": {"format": "gptq", "bits": 4, "group_size": 128} if quantized else None,
        "gpu": "rtx-4090",
    } | changes  # fmt: skip


def make_record(method: str, roles: Mapping[str, int] | None = None, **changes: Any) -> Record:
    """The simulated record of a method; `changes` are arguments of `build_record` or keys of the case."""
    roles = ROLES[method] if roles is None else roles
    allocated = sum(roles.values())
    case_keys = {key: changes.pop(key) for key in list(changes) if key in case_of(method)}
    resident = roles.get("weights", 0) + roles.get("quantization", 0)
    second = "forward-plus" if method in ("mezo", "qzo", "qzo-full", "qzo-2bit") else "backward"
    values: dict[str, Any] = {
        "total": PARAMETERS, "trainable": PARAMETERS, "allocated": allocated, "at_peak": roles, "floor": resident,
        "phases": {"load": resident, second: allocated},
        "reserved": allocated + SLACK.get(method, 420 << 20),
        "process": allocated + SLACK.get(method, 420 << 20) + CONTEXT,
        "notes": [RANDOM_CODES] if method == "qzo-2bit" else [],
    }  # fmt: skip
    world = changes.pop("world", "simulated")
    return build_record(case_of(method, **case_keys), world, ENVIRONMENT, **(values | changes))


def make_failed(method: str, status: str = "oom", message: str = "out of memory", **case_keys: Any) -> Record:
    return failed_record(case_of(method, **case_keys), "simulated", ENVIRONMENT, status=status, message=message)


def all_records() -> dict[str, Record]:
    return {method: make_record(method) for method in ROLES}


def save(folder: Path, records: Mapping[str, Record]) -> Path:
    for record in records.values():
        write_record(folder, record)
    write_json(folder / "summary.json", summarise(records))
    return folder
