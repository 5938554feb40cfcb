"""A training recipe as data: what a script states about a step, in the words of the libraries that run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qzo.errors import QzoError

LOOPS = ("trainer", "plain", "bare")
LOSSES = ("full", "chunked", "tiled", "fused")
FLASH = "flash_attention_2"  # of `attention`: rows are told apart by where they begin, without a mask
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}  # argument of the Trainer -> dtype of its autocast


@dataclass(frozen=True)
class Recipe:
    """What a training script states. `peft` is None where every weight is trained; `kbit` are the options of
    `prepare_model_for_kbit_training`, None where it is not called; `lengths` are the tokens of the rows, again and
    again, padded on the right to the longest of their batch. `loop` is who runs the steps: the Trainer of transformers,
    a "plain" loop, which holds the model's outputs until the next forward returns and drops gradients before it, or a
    "bare" one, which only runs forward, backward and update, without a mask and without clipping.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)  # of TrainingArguments
    peft: dict[str, Any] | None = None  # of the class `peft_class`
    peft_class: str = "LoraConfig"
    quantization: dict[str, Any] | None = None  # of BitsAndBytesConfig
    kbit: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    attention: str = "sdpa"
    batch_size: int = 2
    lengths: tuple[int, ...] = (1024,)
    max_shard_size: str = "50GB"
    loop: str = "trainer"
    use_cache: bool = False
    masked: bool = False  # an attention mask that is not all ones, even where all lengths are the same
    autocast_adapter_dtype: bool = True  # of get_peft_model: adapters of a 16-bit model are fp32
    packing: bool = False  # a batch is one row without padding, each of its parts as long as the longest of `lengths`
    trained_dtype: str | None = None  # to which the script casts all that is trained, adapters or weights
    loss: str = "full"  # of all logits, `loss_chunk` tokens at a time, tiles (TRL), or fused with the head (Liger)
    loss_chunk: int = 0
    activation_offloading: bool = False  # what backward needs waits in the host's memory
    optimizer_offload: str | None = None  # "states", or "gradients" too, wait in the host's memory
    versions: dict[str, str] = field(default_factory=dict)  # of libraries, where they differ in what they hold

    @property
    def autocast(self) -> str | None:
        """The dtype of the Trainer's autocast; None without one."""
        return next((dtype for name, dtype in AUTOCAST.items() if self.arguments.get(name)), None)

    @property
    def checkpointing(self) -> bool:
        """Whether layers are recomputed in backward, by the Trainer's argument or by PEFT's preparation."""
        by_peft = self.kbit is not None and self.kbit.get("use_gradient_checkpointing", True)
        return bool(self.arguments.get("gradient_checkpointing") or by_peft)

    def stated(self) -> dict[str, Any]:
        """The fields that are not as they are where nobody says anything, for JSON."""
        defaults = Recipe(self.name)
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        told = {name: value for name, value in values.items() if name == "name" or value != getattr(defaults, name)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    @property
    def collated(self) -> bool:
        """Whether batches come with a mask, as collators make one."""
        return self.loop != "bare"

    @property
    def padded(self) -> bool:
        """Whether attention gets a mask that is not all ones; between packed rows it has a block for each."""
        return self.attention != FLASH and (self.masked or self.packing or len(set(self.lengths)) > 1)


def differences(recipe: Recipe, usual: Recipe) -> str:
    """What a recipe has otherwise than another one, as `--set` takes it: r=16, optim=adafactor."""
    told: list[str] = []
    for item in fields(Recipe):
        new, old = getattr(recipe, item.name), getattr(usual, item.name)
        if item.name == "name" or new == old:
            continue
        if item.name in ("arguments", "peft", "quantization", "kbit") and new is not None:
            told += [f"{key}={_text(value)}" for key, value in new.items() if value != (old or {}).get(key)]
            told += [f"no {key}" for key in old or {} if key not in new]
        else:
            told.append(f"{item.name}={_text(new)}")
    return ", ".join(told)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def parse(stated: Mapping[str, Any]) -> Recipe:
    """A recipe from JSON. Raises QzoError for a field that is unknown or missing."""
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(stated) - known)
    if unknown or "name" not in stated:
        raise QzoError(
            f"a recipe has no {unknown[0] if unknown else 'name'}; its fields are {', '.join(sorted(known))}: correct "
            "it"
        )
    values: dict[str, Any] = dict(stated)
    if "lengths" in values:
        values["lengths"] = tuple(values["lengths"])
    for name, allowed in (("loop", LOOPS), ("loss", LOSSES)):
        if values.get(name, allowed[0]) not in allowed:
            raise QzoError(f"{name}={values[name]!r} of a recipe is unknown; choose {' or '.join(allowed)}")
    return Recipe(**values)
