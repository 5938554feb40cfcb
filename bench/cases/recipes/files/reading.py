"""Which tool a file is for, and what it says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases.recipes.files import axolotl, llama_factory, trl
from bench.cases.recipes.files.stated import Stated
from bench.cases.recipes.recipe import Recipe
from qzo.errors import QzoError

LARGEST_FILE = 1 << 20  # bytes; published ones have two thousand
TOOLS = (axolotl, llama_factory, trl)  # asked in this order: what one has in common with TrainingArguments comes last


@dataclass(frozen=True)
class ReadRecipe:
    """What a configuration file says.

    Attributes:
        tool: whose file it is, with the version whose defaults fill in what it leaves out.
        recipe: complete, defaults included.
        model: as the file names it, None where it names none.
        seq_len, batch_size: as the file states them, None where they are defaults.
        not_honoured: what concerns memory and is not simulated, `key: why`.
        not_understood: keys that are not known at all.
    """

    tool: str
    recipe: Recipe
    model: str | None
    seq_len: int | None
    batch_size: int | None
    not_honoured: tuple[str, ...]
    not_understood: tuple[str, ...]

    def notes(self) -> list[str]:
        """What a reader of a prediction must know, a line each."""
        lines = [f"read as {self.tool}"] + [f"not simulated, {line}" for line in self.not_honoured]
        return lines + ([f"not understood: {', '.join(self.not_understood)}"] if self.not_understood else [])


def read_recipe(path: str | Path) -> ReadRecipe:
    """The recipe in a YAML or JSON file of TRL, TrainingArguments, axolotl or LLaMA-Factory.

    Raises QzoError for a file that cannot be read or is for no such tool, a value of the wrong type or out of bounds,
    and what is another kind of training than one that is simulated (preference losses, rewards).
    """
    path = Path(path)
    stated = Stated(_values(path), path)
    tool = next((tool for tool in TOOLS if any(key in stated for key in tool.SIGNS)), None)
    if tool is None:
        raise QzoError(
            f"{path}: no key in it is one of TRL, TrainingArguments, axolotl or LLaMA-Factory; "
            f"add one, such as {', '.join(tool.SIGNS[0] for tool in TOOLS)}"
        )
    recipe, model, seq_len, batch_size = tool.recipe(stated)
    return ReadRecipe(tool.VERSION, recipe, model, seq_len, batch_size, tuple(stated.not_honoured), stated.rest())


def _values(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        if path.stat().st_size > LARGEST_FILE:
            raise QzoError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {LARGEST_FILE:,}")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise QzoError(
            f"recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}; name another file"
        ) from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QzoError(f"{path} is no {'JSON' if path.suffix == '.json' else 'YAML'}: {reason}; correct it") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise QzoError(f"{path} holds no keys with values; write lines like `bf16: true`")
    return values
