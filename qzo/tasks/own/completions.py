"""What a model answers to prompts, and the mean reward of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzo.errors import NotFinite, QzoError
from qzo.kernels.rebuilt import kept_weights
from qzo.models.positions import check_columns
from qzo.tasks.evaluation import Watch, by_length, check_finite, evaluating
from qzo.tasks.own.prompts import Asked, PromptEncoder, RewardBatch
from qzo.tasks.own.reward import Reward, RewardTask
from qzo.tasks.sampled import drawn, ends
from qzo.tasks.writing import tokens_behind, until

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """What was written behind a prompt: its tokens up to the one that ended it, whether one did, and the reward."""

    ids: list[int]
    ended: bool
    reward: float


class RewardObjective:
    """Of prompts whose answers a function scores: the loss is minus the mean reward.

    A loss at other scales of the same batch writes with the same random numbers, so that two losses differ by what the
    scales change. It is piecewise constant: scales that change no token, or no score, change nothing at all.
    """

    cuts = ("prompts", "at their beginning, new tokens need the rest")

    def __init__(self, task: RewardTask, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.task, self.reward = task, task.reward
        self.encoder = PromptEncoder(tokenizer, task.reward.max_new_tokens, max_length)
        self._ends = ends(tokenizer)

    def fitted(self, max_length: int | None) -> RewardObjective:
        """This one, for prompts and completions of at most so many tokens together."""
        self.encoder.max_length = max_length
        return self

    def rows(self, examples: Sequence[Any]) -> list[Asked]:
        """What batches are made of. Raises QzoError for a prompt that cannot be encoded."""
        return self.encoder.rows(examples)

    def batch(self, rows: Sequence[Asked], seed: int = 0) -> RewardBatch:
        """Prompts to be answered, with random numbers of a seed."""
        return self.encoder.batch(rows).seeded(seed)

    def length(self, row: Asked) -> int:
        """Tokens of a prompt, to sort by."""
        return len(row.ids)

    def loss(self, model: nn.Module, batch: RewardBatch, centering: float = 0.0) -> Tensor:
        """Minus the mean reward, a scalar; NaN where logits are not finite. Raises QzoError as the function."""
        try:
            written = self.written(model, batch)
        except NotFinite:
            return torch.tensor(torch.nan)
        return torch.tensor(-statistics.fmean(completion.reward for completion in written), dtype=torch.float64)

    @torch.no_grad()
    def written(self, model: nn.Module, batch: RewardBatch, reward: Reward | None = None) -> list[Completion]:
        """The completions of a batch, those of one prompt side by side; `reward`: other ways to write them.

        Raises NotFinite for logits that are not; QzoError for prompts that leave no room among the model's positions,
        and where the function fails.
        """
        how = reward or self.reward
        check_columns(model, batch.tokens.input_ids.shape[1] + how.max_new_tokens)
        dice = torch.Generator(batch.tokens.input_ids.device).manual_seed(batch.seed)

        def choose(logits: Tensor) -> Tensor:
            check_finite(model, logits)
            return drawn(logits, how.temperature, dice)

        stops = torch.tensor(sorted(self._ends), dtype=torch.int64, device=batch.tokens.input_ids.device)
        columns: list[Tensor] = []
        done: Tensor | bool = False
        with kept_weights() if how.keep_weights else nullcontext():
            for ids in islice(tokens_behind(model, batch.tokens, choose, how.generations), how.max_new_tokens):
                columns.append(ids)
                done = done | torch.isin(ids, stops)
                if done.all():
                    break
        rows = torch.stack(columns, 1).tolist()
        return self._scored(batch, how, [until(row, self._ends) for row in rows], [len(row) for row in rows])

    def _scored(self, batch: RewardBatch, how: Reward, ids: list[list[int]], lengths: list[int]) -> list[Completion]:
        prompts = [prompt for prompt in batch.prompts for _ in range(how.generations)]
        texts: list[Any] = [str(self.encoder.tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        completions = [
            text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        fields = [prompt.fields for prompt in prompts]
        columns = {name: [row.get(name) for row in fields] for name in dict.fromkeys(n for row in fields for n in row)}
        given = [prompt.given for prompt in prompts]
        rewards = how.scorer.rewards(given, completions, ids, columns, [prompt.where for prompt in prompts])
        known = zip(ids, lengths, rewards, strict=True)
        return [Completion(row, len(row) < length, reward) for row, length, reward in known]

    def evaluate(
        self, model: nn.Module, rows: Sequence[Asked], batch_size: int, watch: Watch | None = None, last: bool = False
    ) -> dict[str, Any]:
        """The mean reward of completions, drawn by the same random numbers at each evaluation.

        Returns "reward", "spread" (standard deviation over completions), "ended" (share that ended by itself), "tokens"
        (mean length), "count" (prompts); in the `last` evaluation, where completions are drawn, "greedy_reward" too.
        Raises QzoError for no rows, and as `written`.
        """
        if not rows:
            raise QzoError("there are no rows to evaluate; give some")
        written = self._all_written(model, rows, batch_size, self.reward, watch)
        rewards = [completion.reward for completion in written]
        result: dict[str, Any] = {
            "reward": statistics.fmean(rewards),
            "spread": statistics.pstdev(rewards),
            "ended": statistics.fmean(completion.ended for completion in written),
            "tokens": statistics.fmean(len(completion.ids) for completion in written),
        }
        if last and self.reward.temperature:
            greedy = self._all_written(model, rows, batch_size, self.reward.greedy(), watch)
            result["greedy_reward"] = statistics.fmean(completion.reward for completion in greedy)
        return {**result, "count": len(rows)}

    def _all_written(
        self, model: nn.Module, rows: Sequence[Asked], batch_size: int, how: Reward, watch: Watch | None
    ) -> list[Completion]:
        found: list[Completion] = []
        with evaluating(model):
            for number, part in enumerate(by_length([self.length(row) for row in rows], batch_size)):
                batch = self.batch([rows[index] for index in part], seed=number)
                found += self.written(model, batch.to(next(model.parameters()).device), how)
                if watch is not None:
                    watch(len(found) // how.generations, len(rows))
        return found

    def notices(self, splits: Mapping[str, Sequence[Any]]) -> list[str]:
        """What to tell of prompts that are cut. Raises QzoError as `rows`."""
        counts = {split: self.encoder.cut(examples) for split, examples in splits.items()}
        told = ", ".join(f"{count:,} of {len(splits[split]):,} {split}" for split, count in counts.items() if count)
        if not told:
            return []
        most = f"max_length={self.encoder.max_length} tokens less {self.reward.max_new_tokens} new ones"
        return [f"{told} {self.cuts[0]} are longer than {most} and are cut: {self.cuts[1]}"]

    def shown(self, row: Asked) -> str:
        """A prompt as the model reads it."""
        return str(self.encoder.tokenizer.decode(list(row.ids)))
