"""What a GGUF file says of its model: what is read is noted, so that nothing that matters is left unread.

The keys of a model begin with the name of its architecture. Others (`general.`, `tokenizer.`, `quantize.`, `split.`,
those of whoever published the file) do not bear on what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.formats.gguf.header import GgufHeader

UNHEARD = ("tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "classifier.output_labels")  # by no logit
NEUTRAL: dict[str, tuple[Any, ...]] = {  # key -> values with which it changes nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
}
REQUIRED: Any = object()


class Metadata:
    """The keys of a file's architecture, without its name in front of them.

    Every value that is asked for counts as understood; `check_all_read` raises QzoError for one that was not, unless it
    is known to change nothing.
    """

    def __init__(self, path: Path, header: GgufHeader) -> None:
        """Of a file with this header."""
        self.path, self.header = path, header
        self.architecture = str(header.metadata.get("general.architecture"))
        prefix = f"{self.architecture}."
        self.values = {
            key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
        }
        self._read: set[str] = set()

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """A value as it is; of a list, one for each layer, the one value that they all are. Raises QzoError."""
        self._read.add(name)
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise QzoError(f"{self.path} has no {self.architecture}.{name} in its metadata; convert it again")
        if value is None and name in self.values:
            raise self.refused(name, "an array too long for one number for each layer")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.refused(name, "another for each layer, which no model of transformers has")
            return value[0]
        return value

    def listed(self, name: str) -> Any:
        """A value that may be a list; None where there is none."""
        self._read.add(name)
        return self.values.get(name)

    def whole(self, name: str, default: Any = REQUIRED) -> int:
        """A positive whole number. Raises QzoError."""
        value = self.get(name, default)
        if value is default and value is not REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise QzoError(f"{self.path}: its config says {name} = {value!r}; need a positive whole number")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number that is not negative. Raises QzoError."""
        value = self.get(name, default)
        if value is default and value is not REQUIRED:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise QzoError(f"{self.path}: its config says {name} = {value!r}; need a finite number, not below 0")
        return float(value)

    def must_be(self, name: str, wanted: float, what: str) -> None:
        """Raise QzoError where a key is there and is neither 0 nor `wanted`, which follows from `what`."""
        value = self.number(name, 0.0)
        if value and not math.isclose(value, wanted, rel_tol=1e-4):
            raise self.refused(name, f"and only {wanted:g}, {what}, is known here")

    def refused(self, name: str, why: str) -> QzoError:
        """An error for a key whose value cannot be honoured."""
        value = self.values.get(name)
        said = f"{value!r}" if len(repr(value)) < 40 else "a list"
        return QzoError(
            f"{self.path}: {self.architecture}.{name} = {said}, {why}; the model would compute something else without "
            "it: take the model's safetensors files"
        )

    def check_all_read(self, harmless: Callable[[str, Any], bool] = lambda name, value: False) -> None:
        """Raise QzoError for a key that was not asked for and may matter; `harmless` tells of more that do not."""
        for name, value in self.values.items():
            if name in self._read or name in UNHEARD or harmless(name, value):
                continue
            if name in NEUTRAL and not isinstance(value, list | str) and value in NEUTRAL[name]:
                continue
            raise self.refused(name, "is not known here")


def tokens_of(header: GgufHeader) -> dict[str, int | None]:
    """The numbers of the tokens that begin a text, end it and fill it up; None for those that a file does not name."""
    metadata = header.metadata
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: value if isinstance(value, int) else None for name, value in found.items()}


def ending_tokens(header: GgufHeader) -> list[int]:
    """Every token at which a text of the model ends: of the text, of a turn, of a message."""
    found = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(value for value in found if isinstance(value, int)))
