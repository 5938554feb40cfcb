"""Answers that the model writes itself, token by token, the most likely each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzo.tasks.encoding import MAX_ANSWER, Batch, Encoder
from qzo.tasks.example import Example
from qzo.tasks.scoring import position_options


def write_answers(model: nn.Module, encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """Greedy continuations of the prompts up to a new line, the end-of-sequence token or 32 tokens, stripped.

    `generate` is not used: it would take over penalties and other settings that a model brings along.
    """
    tokenizer = encoder.tokenizer
    stops = [
        token for token in tokenizer.encode("\n", add_special_tokens=False)[-1:] if token != tokenizer.unk_token_id
    ]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    batch = encoder.prompts(examples).to(next(model.parameters()).device)
    written = _greedy(model, batch, torch.tensor(stops, dtype=torch.int64, device=batch.input_ids.device))
    texts = [str(tokenizer.decode(_until(row, stops), skip_special_tokens=True)) for row in written.tolist()]
    return [text.strip().split("\n")[0].strip() for text in texts]


@torch.no_grad()
def _greedy(model: nn.Module, batch: Batch, stops: Tensor) -> Tensor:
    """At most 32 tokens after each prompt, [R, N]; what follows a stop has no meaning."""
    ids, mask, cache = batch.input_ids, batch.attention_mask, None
    written: list[Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    while len(written) < MAX_ANSWER and not done.all():
        options: dict[str, Any] = position_options(model, mask, ids.shape[1])
        output = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
        )
        cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        written.append(ids)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        done |= torch.isin(ids[:, 0], stops)
    return torch.cat(written, 1)


def _until(row: list[int], stops: list[int]) -> list[int]:
    return row[: next((n for n, token in enumerate(row) if token in stops), len(row))]
