"""The loss and the scores of sequences; a preference is learnt from forward passes alone, without a reference model."""

from __future__ import annotations

import math
from collections.abc import Sequence as Several
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.models.loss import IGNORED
from qzo.models.positions import count_positions
from qzo.tasks.answers import MOST_LOGITS
from qzo.tasks.encoding import Batch
from qzo.tasks.evaluation import Watch, by_length, check_finite, evaluating
from qzo.tasks.metrics import normalized, token_f1
from qzo.tasks.own.encoding import Row, SequenceEncoder
from qzo.tasks.scoring import forward
from qzo.tasks.writing import continued

ODDS_WEIGHT = 1.0  # of the odds ratio beside the likelihood; the paper of ORPO tries 0.1 to 1
LONGEST_ANSWER = 256  # tokens that are written for a comparison
LEAST = 1e-6  # of -log p of a token, where odds have no bound


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The training loss, scalar fp32, differentiable.

    One answer: mean cross entropy over the learnt tokens of the batch. A better answer w and a worse one l, as in ORPO
    (Hong et al. 2024, eq. 6 and 7), with p(y) the geometric mean of the probabilities of y's tokens:

        -log p(w) - ODDS_WEIGHT * log sigmoid(log odds(w) - log odds(l)),   odds(y) = p(y) / (1 - p(y))

    Logits are made for the learnt columns, at most 256 MiB of them at once where no gradient is wanted.

    Raises QzoError as `qzo.tasks.loss`.
    """
    losses, targets = token_losses(model, batch), _targets(batch)
    counts = (targets != IGNORED).sum(1)
    if not is_pairs(batch):
        return losses.sum() / counts.sum()
    better, worse = means(losses, targets)
    likelihood = losses.view(-1, 2, losses.shape[1])[:, 0].sum() / counts.view(-1, 2)[:, 0].sum()
    return likelihood - ODDS_WEIGHT * nn.functional.logsigmoid(_log_odds(better) - _log_odds(worse)).mean()


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each learnt token, 0 for others; fp32 [R, A]. Raises QzoError."""
    targets = _targets(batch)
    keep = targets.shape[1] + 1
    size = len(targets)
    if not torch.is_grad_enabled():
        vocabulary = int(getattr(model.get_output_embeddings(), "out_features", 0) or 2**17)  # type: ignore[operator]
        size = max(1, MOST_LOGITS // (keep * vocabulary))
    parts = []
    for start in range(0, len(targets), size):
        part = Batch(batch.input_ids[start : start + size], batch.attention_mask[start : start + size], batch.labels)
        logits = forward(model, part, keep)[:, :-1].float()
        own = targets[start : start + size]
        parts.append(nn.functional.cross_entropy(logits.transpose(1, 2), own, ignore_index=IGNORED, reduction="none"))
    return torch.cat(parts)


def is_pairs(batch: Batch) -> bool:
    """Whether each example has a better and a worse answer."""
    return len(_targets(batch)) == 2 * len(batch.labels)


def means(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss over the tokens of the better and of the worse answer; both [B]."""
    per_row = (losses.sum(1) / (targets != IGNORED).sum(1)).view(-1, 2)
    return per_row[:, 0], per_row[:, 1]


def _log_odds(loss: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(-loss)."""
    loss = loss.clamp_min(LEAST)
    return -loss - torch.log(-torch.expm1(-loss))


def _targets(batch: Batch) -> Tensor:
    if batch.targets is None:
        raise QzoError("a batch of prompts has nothing to learn; make it with SequenceEncoder.batch")
    return batch.targets


def evaluate_sequences(
    model: nn.Module,
    encoder: SequenceEncoder,
    rows: Several[Row],
    batch_size: int = 16,
    writes: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Scores of a model; it is put in eval mode meanwhile and nothing of it is changed.

    Returns "loss" (mean over all learnt tokens), "perplexity" (its exponential), "count"; with `writes` "exact_match"
    and "f1" of what the model writes, greedily, for the last answer of each row, after SQuAD's normalization; of pairs
    "loss" is that of training, "accuracy" how often the better answer is likelier by the mean over its tokens, and
    "margin" by how much.

    Raises QzoError for no rows; NotFinite for logits that are not finite.
    """
    if not rows:
        raise QzoError("there are no rows to evaluate; give some")
    totals: dict[str, float] = dict.fromkeys(("loss", "tokens", "accuracy", "margin", "exact_match", "f1"), 0.0)
    done, pairs = 0, len(rows[0]) == 2
    device = next(model.parameters()).device
    with evaluating(model):
        for part in by_length([encoder.length(row) for row in rows], batch_size):
            chosen = [rows[number] for number in part]
            batch = encoder.batch(chosen).to(device)
            for name, value in (_pair_scores(model, batch) if pairs else _token_scores(model, batch)).items():
                totals[name] += value
            if writes:
                for name, value in _written_scores(model, encoder, chosen).items():
                    totals[name] += value
            done += len(part)
            if watch is not None:
                watch(done, len(rows))
    count = len(rows)
    if pairs:
        return {name: totals[name] / count for name in ("accuracy", "loss", "margin")} | {"count": count}
    loss = totals["loss"] / totals["tokens"]
    written = {name: totals[name] / count for name in ("exact_match", "f1")} if writes else {}
    return {**written, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "count": count}


def _token_scores(model: nn.Module, batch: Batch) -> dict[str, float]:
    losses = token_losses(model, batch)
    check_finite(model, losses)
    return {"loss": float(losses.double().sum()), "tokens": float((_targets(batch) != IGNORED).sum())}


def _pair_scores(model: nn.Module, batch: Batch) -> dict[str, float]:
    losses = token_losses(model, batch)
    check_finite(model, losses)
    better, worse = means(losses, _targets(batch))
    odds = nn.functional.logsigmoid(_log_odds(better) - _log_odds(worse))
    return {
        "accuracy": float((better < worse).sum()),
        "loss": float((better - ODDS_WEIGHT * odds).sum()),
        "margin": float((worse - better).sum()),
    }


def _written_scores(model: nn.Module, encoder: SequenceEncoder, rows: Several[Row]) -> dict[str, float]:
    """Sums over rows of what `evaluate_sequences` tells of written answers."""
    tokenizer = encoder.tokenizer
    stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    wanted = [encoder.last_answer(row) for row in rows]
    most, room = _longest_answer(rows), count_positions(model)
    if room is not None and len(rows) > 1 and max(row[0].last_turn for row in rows) + most > room:
        return _written_apart(model, encoder, rows)
    texts = continued(model, encoder.prompts(rows), tokenizer, stops, most)
    pairs = list(zip(texts, wanted, strict=True))
    return {
        "exact_match": float(sum(normalized(text) == normalized(right) for text, right in pairs)),
        "f1": sum(token_f1(text, right) for text, right in pairs),
    }


def _longest_answer(rows: Several[Row]) -> int:
    return min(LONGEST_ANSWER, max(len(row[0].ids) - row[0].last_turn for row in rows))


def _written_apart(model: nn.Module, encoder: SequenceEncoder, rows: Several[Row]) -> dict[str, float]:
    """`_written_scores` of rows with short prompts, and of the others.

    The longest prompt and the longest answer of several may need more positions than the model has; one row does not.
    """
    ordered = sorted(rows, key=lambda row: row[0].last_turn)
    half = len(rows) // 2
    one, other = (_written_scores(model, encoder, part) for part in (ordered[:half], ordered[half:]))
    return {name: one[name] + other[name] for name in one}
