"""What a model thinks of the candidates: log-likelihoods and the loss, with logits only where answers are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.models.loss import IGNORED, last_columns_only
from qzo.models.positions import check_columns, position_options
from qzo.tasks.answers import answer_losses, shares_prompts
from qzo.tasks.encoding import Batch


def loss(model: nn.Module, batch: Batch, centering: float = 0.0) -> Tensor:
    """The training loss of a batch, differentiable.

    Choice: mean over the examples of the cross entropy -log softmax_c(s)[label], where s is `candidate_scores`. So
    only the candidates compete, not the whole vocabulary. Generation: mean cross entropy of the answers' tokens.
    The head computes logits [R, 1, V] where candidates are single tokens, else [R, A + 1, V]; fp32 from there on.

    Args:
        model: a transformers causal language model, on the device of the batch.
        batch: what `Encoder.batch` made.
        centering: share of each candidate's mean score over the batch that is taken off before the softmax, in [0, 1).
            What all examples have in common, the prior of the candidates, then counts less: for a zeroth-order step
            it is half of the curvature and none of what is to be learnt. With every label in its share in each batch
            the loss keeps its minimum where the prior is right, as long as some of it counts.

    Returns:
        Scalar fp32 tensor.

    Raises:
        QzoError: rows that are longer than the model has positions, and tokens that it does not have.
    """
    if batch.choices is None and batch.targets is not None and batch.targets.shape[0] == batch.labels.shape[0]:
        losses = row_losses(model, batch, batch.targets)
        return losses.sum() / (batch.targets != IGNORED).sum()
    scores = candidate_scores(model, batch)
    if centering:
        scores = scores - centering * scores.mean(0)
    return nn.functional.cross_entropy(scores, batch.labels)


def candidate_scores(model: nn.Module, batch: Batch) -> Tensor:
    """Log-likelihood of each candidate after its prompt, summed over its tokens; fp32 [B, C].

    Candidates of several tokens share one row where the model can read them so, see `qzo.tasks.answers`.
    """
    if batch.choices is not None:
        logits = forward(model, batch, keep=1)[:, -1].float()
        return logits.log_softmax(-1).gather(1, batch.choices)
    if batch.targets is None:
        raise QzoError("a batch of prompts has no answers to score; make it with Encoder.batch")
    check_columns(model, batch.input_ids.shape[1])
    known = replace(batch, input_ids=known_tokens(model, batch))
    shares = shares_prompts(model, known, row_losses)
    losses = answer_losses(model, known) if shares else row_losses(model, batch, batch.targets)
    return -losses.sum(1).view(batch.labels.shape[0], -1)


def forward(model: nn.Module, batch: Batch, keep: int) -> Tensor:
    """Logits of the last `keep` columns, [R, keep, V]; positions count from the first token that is no padding.

    Raises QzoError for rows that are longer than the model has positions, and for tokens that it does not have.
    """
    check_columns(model, batch.input_ids.shape[1])
    input_ids = known_tokens(model, batch)
    with last_columns_only(model, keep):
        output = model(
            input_ids=input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=keep,
            use_cache=False,
            **position_options(model, batch.attention_mask, batch.input_ids.shape[1]),
        )
    return output.logits


def known_tokens(model: Any, batch: Batch) -> Tensor:
    """The tokens of a batch; padding that a tokenizer got later than its model, and that is masked, becomes token 0.

    Raises QzoError where a token of a text, or a candidate, is one that the model has no row for.
    """
    count = getattr(model.get_input_embeddings(), "num_embeddings", None)
    parts = [batch.input_ids] if batch.choices is None else [batch.input_ids, batch.choices]
    if count is None or max(int(part.max()) for part in parts) < count:
        return batch.input_ids
    input_ids = batch.input_ids.masked_fill(batch.attention_mask == 0, 0)
    largest = max(int(part.max()) for part in (input_ids, *parts[1:]))
    if largest >= count:
        raise QzoError(
            f"the tokenizer has a token {largest}, and this {type(model).__name__} has {count:,} tokens; take the "
            "tokenizer that came with the model"
        )
    return input_ids


def row_losses(model: nn.Module, batch: Batch, targets: Tensor) -> Tensor:
    """Cross entropy of each answer token, 0 where there is none; [R, A]. Each answer stands behind its own prompt."""
    logits = forward(model, batch, keep=targets.shape[1] + 1)[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
