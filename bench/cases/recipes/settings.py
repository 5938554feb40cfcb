"""`--set KEY=VALUE`: options of a recipe by the names that users know them by.

Keys are those of TrainingArguments and SFTConfig, of the method's PEFT configuration, of BitsAndBytesConfig, and of
`from_pretrained`, `get_peft_model` and `prepare_model_for_kbit_training`; a few are the fields of `Recipe` alone.
Values are YAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases.recipes.files import trainer
from bench.cases.recipes.files.stated import DTYPES, Stated
from bench.cases.recipes.peft_config import checked, known_keys
from bench.cases.recipes.recipe import LOOPS, LOSSES, Recipe
from bench.cases.recipes.table import OWN_OPTIMIZERS, RECIPES
from qzo.errors import QzoError

Settings = Mapping[str, Any]
ARGUMENTS = (
    "bf16", "fp16", "optim", "optim_args", "optim_target_modules", "gradient_accumulation_steps", "max_grad_norm",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_compile", "torch_empty_cache_steps", "use_liger_kernel",
    "liger_kernel_config",
)  # fmt: skip
NEWER = {  # names of transformers 5.23 -> the one that all versions have
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
QUANTIZATION: dict[str, Callable[[Stated, str], Any]] = {  # of BitsAndBytesConfig
    "load_in_4bit": Stated.flag,
    "load_in_8bit": Stated.flag,
    "bnb_4bit_use_double_quant": Stated.flag,
    "bnb_4bit_quant_type": lambda stated, key: stated.text(key, choices=("nf4", "fp4")),
    "bnb_4bit_compute_dtype": lambda stated, key: stated.text(key, choices=DTYPES),
}
PREPARATION = ("prepare_model_for_kbit_training", "use_gradient_checkpointing")
FIELDS: dict[str, Callable[[Stated, str], Any]] = {  # of Recipe, by its own names
    "dtype": lambda stated, key: stated.text(key, choices=DTYPES),
    "use_cache": Stated.flag,
    "autocast_adapter_dtype": Stated.flag,
    "trained_dtype": lambda stated, key: stated.text(key, choices=DTYPES),
    "masked": Stated.flag,
    "packing": Stated.flag,
    "activation_offloading": Stated.flag,
    "optimizer_offload": lambda stated, key: stated.text(key, choices=("states", "gradients")),
    "loop": lambda stated, key: stated.text(key, choices=LOOPS),
    "loss": lambda stated, key: stated.text(key, choices=LOSSES),
    "loss_chunk": lambda stated, key: stated.count(key, 0, least=0),
    "lengths": lambda stated, key: lengths(stated, key),
}
OF_ADAPTERS = ("autocast_adapter_dtype", "trained_dtype")
ELSEWHERE = {  # what another option of the command says
    "per_device_train_batch_size": "--batch-size",
    "max_length": "--seq-len",
    "max_seq_length": "--seq-len",
    "attn_implementation": "--attention",
    "peft_type": "--peft-config",
}
SHORTEST_ROW = 2


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Keys and values of texts like "r=16". Raises QzoError for a text without "=", no YAML, and what says nothing."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise QzoError(f"--set {text!r} is no KEY=VALUE; write for instance --set r=16")
        if key in ELSEWHERE:
            raise QzoError(f"--set {text!r} is said by {ELSEWHERE[key]} here")
        try:
            found[NEWER.get(key, key)] = yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(error).split())[:100]
            raise QzoError(f"--set {text!r}: the value is no YAML ({reason}); quote it") from error
        if found[NEWER.get(key, key)] is None:
            raise QzoError(f"--set {text!r} has no value; leave it out to have the default")
    return found


def apply(settings: Settings, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Each recipe with the settings that concern it.

    Raises QzoError for a key that is unknown or concerns none of the recipes, and for a value that its key cannot have.
    """
    concerned: set[str] = set()
    changed = {}
    for name, recipe in recipes.items():
        own = concerning(settings, recipe)
        concerned |= own.keys()
        changed[name] = _changed(recipe, own) if own else recipe
    for key in settings:
        if key not in concerned:
            raise _unknown(key, settings[key], recipes)
    return changed


def concerning(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """The settings that a recipe can have."""
    return {key: value for key, value in settings.items() if _concerns(key, recipe)}


def lengths(stated: Stated, key: str) -> tuple[int, ...]:
    """Tokens of rows: a list, or a text like "1024x2, 300x6" (tokens x rows)."""
    value = stated.value(key)
    parts = value if isinstance(value, list) else str(value).split(",")
    found: list[int] = []
    for part in parts:
        tokens, _, rows = str(part).strip().partition("x")
        if not tokens.isdigit() or (rows and not rows.isdigit()) or int(tokens) < SHORTEST_ROW or int(rows or 1) < 1:
            raise stated.wrong(key, "are no lengths; write [1024, 300] or, as tokens x rows, 1024x2,300x6")
        found += [int(tokens)] * int(rows or 1)
    return tuple(found)


def _concerns(key: str, recipe: Recipe) -> bool:
    if key in QUANTIZATION:
        return recipe.quantization is not None
    if key in PREPARATION:
        return recipe.kbit is not None
    if key.startswith("optim") and recipe.arguments.get("optim") in OWN_OPTIMIZERS:
        return False
    if key in ARGUMENTS or (key in FIELDS and key not in OF_ADAPTERS):
        return True
    return recipe.peft is not None and (key in OF_ADAPTERS or key in known_keys(recipe.peft_class))


def _changed(recipe: Recipe, settings: Settings) -> Recipe:
    stated = Stated(settings, Path("--set"))
    changes: dict[str, Any] = {key: FIELDS[key](stated, key) for key in FIELDS if key in settings}
    arguments = [key for key in ARGUMENTS if key in settings]
    if arguments:
        changes["arguments"] = _arguments(recipe, stated, arguments)
    quantization = {key: read(stated, key) for key, read in QUANTIZATION.items() if key in settings}
    if quantization:
        changes["quantization"] = _quantization(recipe, stated, quantization)
    if "use_gradient_checkpointing" in settings:
        again = stated.flag("use_gradient_checkpointing")
        changes["kbit"] = (recipe.kbit or {}) | {"use_gradient_checkpointing": again}
    if "prepare_model_for_kbit_training" in settings and not stated.flag("prepare_model_for_kbit_training"):
        changes["kbit"] = None
    own = {key: settings[key] for key in stated.rest()}
    if own:
        changes["peft"] = checked(recipe.peft_class, (recipe.peft or {}) | own, "--set")
    return replace(recipe, **changes)


def _arguments(recipe: Recipe, stated: Stated, keys: Sequence[str]) -> dict[str, Any]:
    """The Trainer's, those that are stated in the place of the recipe's own."""
    if "gradient_checkpointing_kwargs" in keys and "gradient_checkpointing" not in keys:
        kept = stated.mapping("gradient_checkpointing_kwargs")
    else:
        kept = None
    found, _ = trainer.arguments_of(stated)
    if kept is not None:  # for whoever switches it on by --gradient-checkpointing
        found["gradient_checkpointing_kwargs"] = kept
    if "optim" in found:
        _check_optimizer(stated)
    other = {"bf16": "fp16", "fp16": "bf16"}
    replaced = {*keys, *(other[key] for key in keys if found.get(key) and key in other)}
    arguments = {key: value for key, value in recipe.arguments.items() if key not in replaced} | found
    if arguments.get("bf16") and arguments.get("fp16"):
        raise stated.wrong("fp16", "cannot stand beside bf16=true; choose one")
    return arguments


def _check_optimizer(stated: Stated) -> None:
    from transformers.training_args import OptimizerNames

    stated.text("optim", choices=[name.value for name in OptimizerNames])


def _quantization(recipe: Recipe, stated: Stated, found: dict[str, Any]) -> dict[str, Any] | None:
    both = dict(recipe.quantization or {}) | found
    if found.get("load_in_8bit") and "load_in_4bit" not in found:
        both["load_in_4bit"] = False
    if both.get("load_in_4bit") and both.get("load_in_8bit"):
        raise stated.wrong("load_in_8bit", "cannot stand beside load_in_4bit; choose one")
    if both.get("load_in_4bit"):
        return {key: value for key, value in both.items() if key != "load_in_8bit"}
    return {"load_in_8bit": True} if both.get("load_in_8bit") else None


def _unknown(key: str, value: Any, recipes: Mapping[str, Recipe]) -> QzoError:
    """What is wrong with a key that changed none of the recipes."""
    whose = [name for name, recipe in RECIPES.items() if _concerns(key, recipe)]
    if whose:
        methods = ", ".join(recipes) or "the methods of this run"
        return QzoError(
            f"--set {key}={value} does not concern {methods}; it is for {', '.join(whose)}: leave it "
            "out, or add one of these to --methods"
        )
    if key in trainer.SILENT.split():
        return QzoError(f"--set {key}={value} changes no byte of a step; leave it out")
    if key in trainer.NOT_SIMULATED:
        return QzoError(f"--set {key}={value} is not simulated: {trainer.NOT_SIMULATED[key]}; leave it out")
    names = {*ARGUMENTS, *QUANTIZATION, *PREPARATION, *FIELDS, *ELSEWHERE}
    for recipe in {recipe.peft_class: recipe for recipe in (*RECIPES.values(), *recipes.values())}.values():
        names |= set(known_keys(recipe.peft_class))
    near = difflib.get_close_matches(key, sorted(names), n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return QzoError(
        f"--set {key}: no option of the Trainer, PEFT or bitsandbytes that concerns memory{hint}; correct it, or "
        "leave it out"
    )
