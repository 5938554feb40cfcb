"""Scores of predictions, 0 to 1, as GLUE, SuperGLUE and SQuAD define them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from qzo.tasks.example import Example

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, float]:
    """Share of right predictions; `predictions` are indices of candidates."""
    right = sum(example.label == guess for example, guess in zip(examples, predictions, strict=True))
    return {"accuracy": right / len(examples)}


def accuracy_and_macro_f1(examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, float]:
    """As for CB: accuracy, and F1 of each label that occurs, averaged without weights."""
    labels = {example.label for example in examples} | set(predictions)
    scores = [
        _f1([example.label == label for example in examples], [p == label for p in predictions]) for label in labels
    ]
    return {**accuracy(examples, predictions), "f1": sum(scores) / len(scores)}


def of_classes(labels: Sequence[str]) -> Callable[[Sequence[Example], Sequence[int]], dict[str, Any]]:
    """Scores of a classification: accuracy, macro F1 and, as {label: {guess: count}}, what was taken for what."""

    def score(examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, Any]:
        both = accuracy_and_macro_f1(examples, predictions)
        counts = Counter(zip((example.label for example in examples), predictions, strict=True))
        confusion: dict[str, dict[str, int]] = {label: {} for label in labels}
        for (label, guess), count in sorted(counts.items()):
            confusion[labels[label]][labels[guess]] = count
        return {"accuracy": both["accuracy"], "macro_f1": both["f1"], "confusion": confusion}

    return score


def f1_and_exact_match(examples: Sequence[Example], predictions: Sequence[int]) -> dict[str, float]:
    """As for MultiRC: F1 of "right" over all answers (F1a), the share of questions judged without error, accuracy."""
    f1 = _f1([example.label == 1 for example in examples], [guess == 1 for guess in predictions])
    whole: dict[str, bool] = {}
    for example, guess in zip(examples, predictions, strict=True):
        whole[example.group] = whole.get(example.group, True) and example.label == guess
    return {"f1": f1, "em": sum(whole.values()) / len(whole), **accuracy(examples, predictions)}


def answers_f1_and_exact_match(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """As for SQuAD: token F1 and exact match after `normalized`, with the best of the given answers, averaged."""
    f1 = [max(token_f1(text, answer) for answer in e.answers) for e, text in zip(examples, texts, strict=True)]
    em = [normalized(text) in map(normalized, e.answers) for e, text in zip(examples, texts, strict=True)]
    return {"f1": sum(f1) / len(f1), "em": sum(em) / len(em)}


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and surplus white space, in SQuAD's order."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(text: str, answer: str) -> float:
    """F1 of the words of two normalized texts, each counted as often as it occurs."""
    found, wanted = normalized(text).split(), normalized(answer).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _f1(truth: Sequence[bool], guesses: Sequence[bool]) -> float:
    hits = sum(true and guess for true, guess in zip(truth, guesses, strict=True))
    return 2 * hits / (sum(truth) + sum(guesses)) if hits else 0.0
