"""A text that a model goes on with, token by token: greedy, or sampled by temperature and nucleus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.models.positions import count_positions
from qzo.tasks.encoding import Batch, start_tokens, tokens_of
from qzo.tasks.evaluation import check_finite
from qzo.tasks.writing import tokens_behind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # of a character whose other bytes are in tokens to come


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_tokens: written at most; fewer where the model has no more positions.
        temperature: 0, always the likeliest token; else logits are divided by it.
        top_p: only the likeliest tokens, whose probabilities add up to this, are drawn.
        seed: of what is drawn.

    Raises QzoError for a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise QzoError(f"max_tokens={self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise QzoError(f"temperature={self.temperature} is not 0 or a positive number; choose e.g. 0.7")
        if not 0 < self.top_p <= 1:
            raise QzoError(f"top_p={self.top_p} is not in (0, 1]; choose e.g. 0.9, or 1 for all tokens")


def write(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling, whole: bool = False
) -> Iterator[str]:
    """Pieces of the text behind a prompt, as they are written, up to the end-of-sequence token.

    Args:
        model: a transformers causal language model, in eval mode.
        tokenizer: its own.
        prompt: text; with `whole` as a chat template wrote it, with all special tokens in it.
        sampling: how tokens are chosen.

    Raises QzoError for a prompt without tokens or with more than the model has positions; NotFinite.
    """
    ids = [*([] if whole else start_tokens(tokenizer)), *tokens_of(tokenizer, prompt)]
    most = count_positions(model)
    if not ids:
        raise QzoError("the prompt is empty, and this tokenizer has no token to begin with; give a few words")
    if most is not None and len(ids) >= most:
        raise QzoError(f"the prompt has {len(ids):,} tokens, and the model {most:,} positions; shorten it")
    room = sampling.max_tokens if most is None else min(sampling.max_tokens, most - len(ids))
    device = next(model.parameters()).device
    row = torch.tensor([ids], device=device)
    batch = Batch(row, torch.ones_like(row), torch.zeros(1, dtype=torch.int64))
    dice = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: Tensor) -> Tensor:
        check_finite(model, logits)
        return _chosen(logits.float().cpu(), sampling, dice).to(device)

    ended = ends(tokenizer)
    written: list[int] = []
    shown = 0
    for column in islice(tokens_behind(model, batch, choose), room):
        token = int(column)
        if token in ended:
            break
        written.append(token)
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        if not text.endswith(UNFINISHED):
            yield text[shown:]
            shown = len(text)
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    if len(text) > shown:
        yield text[shown:]


def ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer: of a sequence, or of a turn where a template has a token of its own for that."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    found: Any = tokenizer.convert_tokens_to_ids(list(names))
    known = {token for token in found if token is not None}
    unknown = {tokenizer.unk_token_id}
    return ({tokenizer.eos_token_id} | known) - unknown - {None}


def _chosen(logits: Tensor, sampling: Sampling, dice: torch.Generator) -> Tensor:
    """[1, V] -> [1]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    return order.gather(-1, torch.multinomial(kept, 1, generator=dice))[:, 0]


def drawn(logits: Tensor, temperature: float, dice: torch.Generator) -> Tensor:
    """A token for each row, [R, V] -> [R], by a race: argmax p_v / e_v with e_v exponential, which draws v with p_v.

    With the same e, probabilities that differ little draw the same token more often than by any other way of drawing
    but the best one, by at most a factor of two: so texts of a perturbed model differ because the model does, not by
    chance. Temperature 0 takes the likeliest token and draws nothing.
    """
    if temperature == 0:
        return logits.argmax(-1)
    race = torch.empty(logits.shape, device=logits.device).exponential_(generator=dice)
    return ((logits.float() / temperature).softmax(-1) / race).argmax(-1)
