"""Answers that a model writes: greedy, with a key/value cache, for a batch of prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from qzo.models.positions import check_columns, position_options
from qzo.tasks.encoding import MAX_ANSWER, Batch, Encoder, tokens_of
from qzo.tasks.example import Example
from qzo.tasks.scoring import known_tokens


def write_answers(model: nn.Module, encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """Greedy continuations of the prompts up to a new line, the end-of-sequence token or 32 tokens, stripped."""
    tokenizer = encoder.tokenizer
    stops = [token for token in tokens_of(tokenizer, "\n")[-1:] if token != tokenizer.unk_token_id]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    texts = continued(model, encoder.prompts(examples), tokenizer, stops, MAX_ANSWER)
    return [text.strip().split("\n")[0].strip() for text in texts]


def continued(model: nn.Module, batch: Batch, tokenizer: Any, stops: list[int], most: int) -> list[str]:
    """What a model writes behind the prompts of a batch, up to a token of `stops` or `most` tokens, decoded.

    `generate` is not used: it would take over penalties and other settings that a model brings along. Raises QzoError
    for prompts that leave no room among the model's positions.
    """
    batch = batch.to(next(model.parameters()).device)
    check_columns(model, batch.input_ids.shape[1] + most)
    written = _greedy(model, batch, torch.tensor(stops, dtype=torch.int64, device=batch.input_ids.device), most)
    return [str(tokenizer.decode(until(row, stops), skip_special_tokens=True)) for row in written.tolist()]


def _greedy(model: nn.Module, batch: Batch, stops: Tensor, most: int) -> Tensor:
    """At most so many tokens after each prompt, [R, N]; what follows a stop has no meaning."""
    written: list[Tensor] = []
    done = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    for ids in islice(tokens_behind(model, batch, lambda logits: logits.argmax(-1)), most):
        written.append(ids)
        done |= torch.isin(ids, stops)
        if done.all():
            break
    return torch.stack(written, 1)


def tokens_behind(
    model: nn.Module, batch: Batch, choose: Callable[[Tensor], Tensor], copies: int = 1
) -> Iterator[Tensor]:
    """The tokens behind the prompts of a batch, one column [R * copies] after another, without end, with a cache.

    Args:
        model: a transformers causal language model.
        batch: R prompts, on the model's device.
        choose: logits [R * copies, V] -> tokens [R * copies].
        copies: texts behind each prompt, one below the other; the prompts are read once for all of them.
    """
    ids, mask, cache = known_tokens(model, batch), batch.attention_mask, None
    while True:
        options: dict[str, Any] = position_options(model, mask, ids.shape[1])
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
            )
            logits, cache = output.logits[:, -1], output.past_key_values
            if copies > 1:
                repeated, mask = _repeated(cache, copies), mask.repeat_interleave(copies, 0)
                ids, logits, copies = ids.repeat_interleave(copies, 0), logits.repeat_interleave(copies, 0), 1
                if not repeated:
                    cache = None
                    continue
            chosen = choose(logits)
        yield chosen
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _repeated(cache: Any, copies: int) -> bool:
    """Repeat the rows of a cache; False for one that holds more than keys and values, which stays as it is."""
    from transformers.cache_utils import DynamicLayer

    if not all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", [None])):
        return False
    cache.batch_repeat_interleave(copies)
    return True


def until(row: list[int], stops: Collection[int]) -> list[int]:
    """What stands in front of the first of some tokens."""
    return row[: next((n for n, token in enumerate(row) if token in stops), len(row))]
