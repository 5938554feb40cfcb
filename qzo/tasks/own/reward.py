"""Prompts with a function that scores what a model answers, as a task: the mean reward is to be raised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qzo.errors import QzoError
from qzo.tasks.own import kinds
from qzo.tasks.own.function import RewardFunction, as_function
from qzo.tasks.own.prompts import Prompt, prompt_row
from qzo.tasks.sampling import Pools
from qzo.tasks.source.files import Rows

METRIC = "reward"


@dataclass(frozen=True)
class Reward:
    """What scores completions, and how these are written.

    Args:
        function: `function(prompts=..., completions=..., **columns) -> list[float]`, as TRL's GRPOTrainer calls reward
            functions: all of the rows by name, one value for each completion; completions are text, or lists of one
            message where prompts are messages. Or "MODULE:FUNCTION", whose module is a .py file or importable from the
            current folder. It must give the same for the same completions, or a run cannot be resumed to the bit.
        temperature: of the draw; 0 always takes the likeliest token.
        max_new_tokens: of a completion, at most.
        generations: completions of each prompt.
        keep_weights: rebuild packed weights once for all tokens of a completion, not for each of them: several times as
            fast where they are rebuilt by PyTorch's operators, but the dense weights are then all there at once.

    Raises QzoError for a value out of range, and a function that cannot be found.
    """

    function: str | Callable[..., Any] | RewardFunction
    temperature: float = 1.0
    max_new_tokens: int = 64
    generations: int = 1
    keep_weights: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise QzoError(f"temperature={self.temperature} is not 0 or a positive number; choose e.g. 1")
        for name in ("max_new_tokens", "generations"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise QzoError(f"{name}={value} is not a positive whole number; choose e.g. 64")
        if self.temperature == 0 and self.generations > 1:
            raise QzoError(
                f"generations={self.generations} at temperature 0 are all the same text; give a temperature, e.g. 1"
            )
        _ = self.scorer

    @cached_property
    def scorer(self) -> RewardFunction:
        """The function, found."""
        return as_function(self.function)

    def greedy(self) -> Reward:
        """The same with the likeliest tokens, one completion for each prompt."""
        return replace(self, function=self.scorer, temperature=0.0, generations=1)

    def told(self) -> str:
        """In words, for a summary."""
        how = f"sampled at temperature {self.temperature:g}" if self.temperature else "greedy"
        several = "" if self.generations == 1 else f", {self.generations} for each prompt"
        return f"{self.scorer.name} of completions, {how}, of up to {self.max_new_tokens} tokens{several}"


@dataclass(frozen=True)
class RewardTask:
    """Prompts of a user's own and a reward; see `SequenceTask` for what else it has."""

    name: str
    reward: Reward
    pools: Any = field(repr=False)
    kind: kinds.Kind = kinds.PROMPTS
    metric: str = METRIC
    words = ()
    packed = False

    @property
    def writes(self) -> bool:
        """Whether more is measured at the end than in between: greedy completions beside those that are drawn."""
        return self.reward.temperature > 0

    def splits(self, seed: int = 0) -> Pools:
        """Prompts by split, drawn by seed."""
        drawn: Pools = self.pools.drawn(seed)
        return drawn


def reward_prompts(rows: Rows, reward: Reward, metric: str | None) -> dict[str, list[Prompt]]:
    """The prompts of rows by split. Raises QzoError where the function cannot be called with their columns."""
    if metric not in (None, METRIC):
        raise QzoError(f'metric "{metric}" is not measured on {kinds.PROMPTS.text}; choose {METRIC}')
    if "prompt" not in rows["train"][0].fields:
        row = rows["train"][0]
        raise QzoError(
            f"{row.where} has the fields {', '.join(row.fields) or 'none'}; a reward needs prompt. Name it by "
            "--columns, e.g. --columns prompt=question"
        )
    prompts = {split: [prompt_row(row) for row in found] for split, found in rows.items()}
    every = [set(prompt.fields) for found in prompts.values() for prompt in found]
    first = prompts["train"][0].fields
    reward.scorer.check_columns([name for name in first if all(name in fields for fields in every)])
    return prompts
