"""Answers that the model writes itself, token by token, the most likely each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qzo.tasks.encoding import MAX_ANSWER, Encoder
from qzo.tasks.example import Example


def write_answers(model: nn.Module, encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """Greedy continuations of the prompts up to a new line, the end-of-sequence token or 32 tokens, stripped.

    The model's own generation settings (sampling, penalties) are left aside.
    """
    from transformers import GenerationConfig

    inner: Any = model
    tokenizer = encoder.tokenizer
    device = next(model.parameters()).device
    batch = encoder.prompts(examples).to(device)
    stops = {tokenizer.eos_token_id, *tokenizer.encode("\n", add_special_tokens=False)[-1:]}
    settings = GenerationConfig(
        max_new_tokens=MAX_ANSWER,
        do_sample=False,
        eos_token_id=sorted(stops - {None, tokenizer.unk_token_id} | {tokenizer.eos_token_id} - {None}) or None,
        pad_token_id=encoder.pad_token_id,
    )
    written: torch.Tensor = inner.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=settings
    )
    texts = tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [text.strip().split("\n")[0].strip() for text in texts]
