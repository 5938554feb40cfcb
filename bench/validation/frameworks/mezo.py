"""MeZO's finetune.sh (large_models/run.py, utils.py, prefix.py): the Trainer of transformers 4.28 on fp32 weights.

Both answers to a question are two rows of a batch, and the loss is the cross entropy of their scores. OPT's attention
adds a mask in the weights' dtype, so that under autocast all scores are fp32 from there on, and bounds them from below
by a maximum, whose backward keeps what it bounded (modeling_opt.py, OPTAttention).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.validation.frameworks.transformers_4 import base_of


def answer(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probability of each token of ids [1, T] but the first (run.py, forward): keys and values go before they are
    taken of all the vocabulary.
    """
    logits = model(input_ids=ids, use_cache=True).logits[0, :-1]
    log_probs = F.log_softmax(logits, dim=-1)
    labels = ids[0, 1:]
    return log_probs[torch.arange(len(labels), device=ids.device), labels]


def score_answers(model: nn.Module) -> None:
    """The model's forward gives the loss of all rows as answers to one question; logits die with it."""
    inner = base_of(model)
    inner.forward = partial(_scored, inner.forward)


def _scored(forward: Any, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """utils.py, forward_wrap_with_option_len."""
    output = forward(input_ids=input_ids, **options)
    shifted = output.logits[..., :-1, :].contiguous()
    targets = input_ids.clone()[..., 1:].contiguous()
    picked = F.log_softmax(shifted, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    mask = targets != -100
    scores = (picked * mask).sum(-1) / mask.sum(-1)
    return {"loss": F.cross_entropy(scores[None], torch.zeros(1, dtype=torch.long, device=scores.device))}


def bound_scores(model: nn.Module) -> None:
    """The attention of transformers 4.28 in the place of today's eager one."""
    for module in base_of(model).modules():
        if type(module).__name__ == "OPTAttention":
            module.forward = partial(_attend, module)


def _attend(
    module: Any, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    batch, tokens, _width = hidden_states.shape
    query, key, value = (
        item.view(batch, tokens, module.num_heads, module.head_dim).transpose(1, 2).contiguous()
        for item in (
            module.q_proj(hidden_states) * module.scaling, module.k_proj(hidden_states), module.v_proj(hidden_states)
        )
    )  # fmt: skip
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    scores = torch.matmul(query, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores + attention_mask
        scores = torch.maximum(scores, torch.full((), torch.finfo(scores.dtype).min, device=scores.device))
    wide = scores.dtype is torch.float32
    weights = F.softmax(scores, dim=-1) if wide else F.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
    out = torch.matmul(weights, value).transpose(1, 2).reshape(batch, tokens, -1)
    return module.out_proj(out), None
