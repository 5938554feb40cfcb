"""One cell of the benchmark: what is trained, how, and on which device."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.cases.methods import BY_NAME
from bench.cases.quantizations import FORMATS, check_group_size
from bench.cases.recipes.recipe import Recipe, parse
from qzo.errors import QzoError
from qzo.optim.estimator import NOISE

DEVICES = ("auto", "cuda", "cpu", "sim")
ATTENTIONS = ("flash", "efficient", "cudnn", "math", "eager")


def choose(kind: str, value: str, allowed: Iterable[str], remedy: str | None = None) -> str:
    """Return `value` if it is one of `allowed`; otherwise raise with the nearest names."""
    names = list(allowed)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise QzoError(f"unknown {kind} {value!r}{hint} ({remedy or 'known: ' + ', '.join(names)})")


@dataclass(frozen=True)
class BenchCase:
    """Everything that determines a record; validated on construction.

    Attributes:
        model: catalog name, folder with a config.json, .gguf file or hub id.
        method: the name of a row of `bench.cases.methods.TABLE`.
        device: "cuda", "cpu" or "sim" ("auto" is resolved before a case is run).
        gpu: what `sim` stands for, a name from `bench list gpus` or "cpu"; None on a real device.
        batch_size, seq_len: sequences a step and tokens a sequence.
        attention: one of `ATTENTIONS`; None takes flash where the device has it, else what PyTorch runs instead.
        gradient_checkpointing: recompute each layer in backward (non-reentrant); first-order methods only.
        group_size: weights that share a scale in `qzo` and `qzo-full`; None takes 128, or the largest of 64 and 32
            that divides every layer.
        quantization: of `qzo` and `qzo-full`, one of `bench.cases.quantizations.FORMATS`; None takes 4 bits in GPTQ's
            layout.
        steps: optimizer steps of a measured cell; the first two are watched by the ledger, the others timed.
        seed: of noise, batches and random codes.
        recipe: how a first-order method trains where it is not as its row of the table has it; its batch, length and
            attention are those of the case.
        weights: folder that holds the model's weights unpacked once for all cells; None reads them where they are.
        still_offsets: leave the offsets of such a format where they are, as measurements did that were made before they
            followed their scales.
        noise: where qzo and mezo take z from, see `qzo.QZO`.
    """

    model: str
    method: str
    device: str = "sim"
    gpu: str | None = None
    batch_size: int = 1
    seq_len: int = 128
    attention: str | None = None
    gradient_checkpointing: bool = False
    group_size: int | None = None
    steps: int = 5
    seed: int = 0
    weights: str | None = None
    quantization: str | None = None
    recipe: Recipe | None = None
    still_offsets: bool = False
    noise: str = "generator"

    def __post_init__(self) -> None:
        choose("method", self.method, BY_NAME)
        choose("device", self.device, DEVICES)
        choose("noise", self.noise, NOISE)
        if self.attention is not None:
            choose("attention", self.attention, ATTENTIONS)
        if self.quantization is not None:
            choose("quantization", self.quantization, FORMATS)
            check_group_size(self.quantization, self.group_size)
        for name, lowest in (("batch_size", 1), ("seq_len", 2), ("steps", 3)):
            value = getattr(self, name)
            if value < lowest:
                raise QzoError(f"{name}={value} is too small; it must be at least {lowest}")
        if self.group_size is not None and self.group_size < 1:
            raise QzoError(f"group_size={self.group_size} is not a number of weights; choose 128, 64 or 32")

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> BenchCase:
        """The case of which `asdict` made this."""
        recipe = stated.get("recipe")
        return cls(**dict(stated) | {"recipe": recipe and parse(recipe)})

    @property
    def first_order(self) -> bool:
        """Whether the method runs a backward pass."""
        return BY_NAME[self.method].first_order

    @property
    def recomputes(self) -> bool:
        """Whether backward recomputes each layer: because the case says so, or because the method always does."""
        return self.first_order and (self.gradient_checkpointing or BY_NAME[self.method].checkpointed)
