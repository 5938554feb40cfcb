"""Every key of the GGUF standard in a file of every family: it moves the logits, is refused, or is known to be nothing.

A key that loads and changes no logit, though its value is one with a meaning, was left unread without a word.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import torch
from figures import finish
from gguf_files import tiny, write_gguf

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect
from qzo.formats.gguf.metadata.keys import NEUTRAL, UNHEARD

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"num_hidden_layers": 6},
    "phi3": {},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LENGTHS = ("context_length", "rope.scaling.original_context_length")  # of texts: no logit of a short one
WINDOWS = ("attention.sliding_window", "attention.sliding_window_pattern")  # wider than the text, or of no window
ALONE = (  # no meaning without a factor, or without experts
    *("rope.scaling.type", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    *("rope.scaling.yarn_ext_factor", "expert_used_count"),
)
VALUES: tuple[Any, ...] = (3, 0.37, True, "yarn", [1, 2], 2**40)
OF_NO_LAYER = dict.fromkeys(("qwen2_moe", "qwen3_moe"), ("feed_forward_length",))  # all of experts, of other lengths
IDENTICAL = ("attention.value_length", "vocab_size", "block_count", "expert_weights_norm", "expert_gating_func")


def keys() -> list[str]:
    """All keys of a model in the package gguf, without its architecture, and two of its past."""
    groups = [
        getattr(gguf.Keys, name) for name in ("LLM", "Attention", "Rope", "SSM", "WKV", "ShortConv", "Classifier")
    ]
    found = {value for group in groups for value in vars(group).values() if isinstance(value, str)}
    names = {value.removeprefix("{arch}.") for value in found if value.startswith("{arch}.") and "{dense}" not in value}
    return sorted(names | {"rope.scale_linear", "attention.made_up"})


def adding(key: str, value: Any) -> Any:
    """Writes one key, in the place of the one that the file has."""

    def add(writer: Any) -> None:
        name = f"{writer.arch}.{key}"
        writer.kv_data[0].pop(name, None)
        kind = {int: "uint64", float: "float32", bool: "bool", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{kind}")(name, value)

    return add


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(5, 45)[None]).logits
    return result


def main() -> None:
    """Try them all, or those of the families named as arguments, both ways of loading."""
    tried, unread, tracebacks, differing = 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for family in sys.argv[1:] or FAMILIES:
            options = FAMILIES[family]
            model = tiny(family, **options) if options else tiny(family)
            base = logits(load(write_gguf(model, Path(folder) / f"{family}.gguf", "Q8_0"), torch.float32))
            for number, (key, value) in enumerate((key, value) for key in keys() for value in VALUES):
                file = write_gguf(model, Path(folder) / f"{family}{number}.gguf", "Q8_0", meta=adding(key, value))
                told, found = [], []
                for dequantize in (True, False):
                    try:
                        found.append(logits(load(file, torch.float32, dequantize=dequantize)))
                    except QzoError as error:
                        told.append(str(error))
                    except Exception as error:
                        tracebacks += 1
                        print(f"{family} {key}={value!r}: {type(error).__name__} {error}")
                tried += 1
                try:
                    reason = inspect(file).reason
                except QzoError as error:
                    reason = str(error)
                if (len(found) == 2 and not torch.allclose(*found, atol=1e-4)) or len(told) == 1:
                    differing += 1
                    print(f"{family} {key}={value!r}: packed and dequantized differ")
                if bool(told) != (reason is not None):
                    differing += 1
                    print(f"{family} {key}={value!r}: load says {told}, inspect {reason}")
                neutral = value == 2**40 and key.endswith("softcapping")  # below which tanh is the identity
                neutral |= key in UNHEARD or value in NEUTRAL.get(key, ()) or key in OF_NO_LAYER.get(family, ())
                neutral |= key in (*LENGTHS, *WINDOWS, *ALONE, *IDENTICAL)
                if found and not neutral and torch.equal(found[0], base):
                    unread += 1
                    print(f"{family} {key}={value!r}: loaded, and no logit moved")
                file.unlink()
    finish("gguf keys", tried, unread=unread, differing=differing, tracebacks=tracebacks)


if __name__ == "__main__":
    main()
