"""Scores of a model on examples: by the likeliest label word, with its prior taken off, or by the answer it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import NotFinite, QzoError
from qzo.tasks.encoding import Encoder
from qzo.tasks.example import Example
from qzo.tasks.metrics import answers_f1_and_exact_match
from qzo.tasks.scoring import candidate_scores, loss
from qzo.tasks.writing import write_answers

Watch = Callable[[int, int], None]  # examples done, and how many there are
WIDER = {torch.float16: "--dtype bfloat16, in Python dtype=torch.bfloat16", torch.bfloat16: "--dtype float32"}


def evaluate(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int = 16,
    prior: Sequence[float] | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Score a model; it is put in eval mode meanwhile and nothing of it is changed.

    Args:
        model: a transformers causal language model.
        encoder: of the examples' task.
        examples: what to score.
        batch_size: examples that are run together; they are sorted by length first.
        prior: log-probability of each label word that `label_prior` found; it is subtracted from the scores.
        watch: called with the number of examples done and that of all, after each batch.

    Returns:
        The task's scores, 0 to 1 ("accuracy", or "f1" and "em"), "loss" (mean over the examples, or over the answers'
        tokens in a generation task), "count", and "predictions": how often each label word was chosen, the place of
        the candidate in tasks without label words, and "answered" or "empty" in a generation task.

    Raises:
        QzoError: no examples, a prior that does not fit the task, or rows that are longer than the model has positions;
            `NotFinite` where logits are NaN or infinite, for then nothing was chosen.
    """
    if not examples:
        raise QzoError(f"there are no {encoder.task.name} examples to evaluate; give some")
    _check_prior(encoder, prior)
    with evaluating(model):
        if encoder.task.generates:
            return _evaluate_written(model, encoder, examples, batch_size, watch)
        scores = _scores(model, encoder, examples, batch_size, watch)
    if prior is not None:
        scores = scores - torch.tensor(prior)
    predictions = scores.argmax(1).tolist()
    labels = torch.tensor([example.label for example in examples])
    words = [word.strip() for word in encoder.task.words] or [f"choice{n + 1}" for n in range(scores.shape[1])]
    counts = Counter(predictions)
    return {
        **encoder.task.score(examples, predictions),
        "loss": nn.functional.cross_entropy(scores, labels).item(),
        "count": len(examples),
        "predictions": {word: counts[index] for index, word in enumerate(words)},
    }


def label_prior(model: nn.Module, encoder: Encoder, examples: Sequence[Example], batch_size: int = 16) -> list[float]:
    """How much the model likes each label word whatever the text: its mean log-probability among the label words.

    The labels of the examples are not looked at. Give training texts: the mean over texts of the task takes the place
    of the content-free texts of contextual calibration (Zhao et al. 2021).

    Raises:
        QzoError: a task without label words, or no examples.
    """
    if not encoder.task.words:
        raise QzoError(
            f"{encoder.task.name} has no label words whose prior could be calibrated; leave the prior out "
            "(--calibrated)"
        )
    if not examples:
        raise QzoError("a label prior needs at least one text; give some")
    with evaluating(model):
        return _scores(model, encoder, examples, batch_size).log_softmax(1).mean(0).tolist()


def _check_prior(encoder: Encoder, prior: Sequence[float] | None) -> None:
    words = encoder.task.words
    if prior is not None and len(prior) != len(words):
        raise QzoError(
            f"a prior of {len(prior)} values does not fit {encoder.task.name}, which has {len(words)} label words; "
            "take that of qzo.tasks.label_prior on this task"
        )


def _scores(
    model: nn.Module, encoder: Encoder, examples: Sequence[Example], batch_size: int, watch: Watch | None = None
) -> Tensor:
    """Log-likelihoods of the candidates, [N, C] on the CPU, in the order of the examples. Raises NotFinite."""
    found: dict[int, Tensor] = {}
    for part in by_length([encoder.length(example) for example in examples], batch_size):
        batch = encoder.batch([examples[index] for index in part]).to(_device(model))
        scores = candidate_scores(model, batch).cpu()
        check_finite(model, scores)
        found.update(zip(part, scores, strict=True))
        if watch is not None:
            watch(len(found), len(examples))
    return torch.stack([found[index] for index in range(len(examples))])


def check_finite(model: nn.Module, numbers: Tensor) -> None:
    """Raise NotFinite for NaN or infinity, with what helps where the model's dtype may be the cause."""
    if numbers.isfinite().all():
        return
    dtype = next(model.parameters()).dtype
    range_of = "its numbers end at 65,504, and activations of this model are larger: " if dtype == torch.float16 else ""
    remedy = f"{range_of}run it in a wider dtype, {WIDER[dtype]}" if dtype in WIDER else "look for NaN in its weights"
    raise NotFinite(f"the logits are not finite in {str(dtype)[6:]}; {remedy}")


def _evaluate_written(
    model: nn.Module, encoder: Encoder, examples: Sequence[Example], batch_size: int, watch: Watch | None
) -> dict[str, Any]:
    texts, total, tokens, done = [""] * len(examples), 0.0, 0, 0
    for part in by_length([encoder.length(example) for example in examples], batch_size):
        chosen = [examples[index] for index in part]
        count = sum(len(encoder.encode(example).answers[0]) for example in chosen)
        value = loss(model, encoder.batch(chosen).to(_device(model)))
        check_finite(model, value)
        total += value.item() * count
        tokens += count
        for index, text in zip(part, write_answers(model, encoder, chosen), strict=True):
            texts[index] = text
        done += len(part)
        if watch is not None:
            watch(done, len(examples))
    answered = sum(bool(text) for text in texts)
    return {
        **answers_f1_and_exact_match(examples, texts),
        "loss": total / tokens,
        "count": len(examples),
        "predictions": {"answered": answered, "empty": len(texts) - answered},
    }


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of examples in batches of similar length, so that little is padding. Raises QzoError."""
    if batch_size < 1:
        raise QzoError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, a model is in eval mode and nothing takes gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
