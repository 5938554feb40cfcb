"""The cheapest change that helps a method short of memory: simulated where that can be, else by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.capacity.capacity import HELD, Capacity, Question
from bench.cases.methods import BY_NAME, smaller_methods

LOGIT_BYTES = 2 + 4 + 4  # a logit in bf16, in fp32 for the loss, and the gradient of that
WORTHWHILE = 1.05  # a change helps if it makes the batch at least so many times larger
AT_A_TIME = 2  # streamed layers: one computes while the next arrives
Known = Mapping[tuple[str, bool], Capacity]  # (method, gradient checkpointing) -> capacity
Remedy = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the model: number of layers, and entries of the vocabulary."""

    layers: int
    vocabulary: int


def key(capacity: Capacity) -> tuple[str, bool]:
    """Under which a capacity is known."""
    return capacity["method"], capacity["gradient_checkpointing"]


def further_questions(asked: Iterable[Question], known: Known) -> list[Question]:
    """What must be simulated besides, batches only: checkpointing where it can help, and smaller methods not asked."""
    more: dict[tuple[str, bool], Question] = {}
    for question in asked:
        case = question.case
        if _can_checkpoint(question, known[case.method, case.recomputes]):
            variants = [replace(case, gradient_checkpointing=True)]
        else:
            variants = [replace(case, method=method, recipe=None) for method in smaller_methods(case.method)]
        for variant in variants:
            name = variant.method, variant.recomputes
            if name not in known:
                more[name] = replace(question, batch_only=True, case=variant)
    return list(more.values())


def cheapest(question: Question, known: Known, sizes: Sizes) -> Remedy | None:
    """The first change that makes the batch at least 5 % larger; None if none does.

    In this order: checkpointing, fewer logits, a smaller format, streaming.
    Keys: change; batch, at the question's sequence length; checked, "simulated" or how it was calculated.
    """
    answer = known[question.case.method, question.case.recomputes]
    if answer["base"] is None:
        return None
    changes = (
        *_checkpointed(question, known), *_fewer_logits(question, answer, sizes), *_smaller(question, known),
        *_streamed(question, answer, sizes),
    )  # fmt: skip
    enough = max(_batch(answer) + 1, WORTHWHILE * _batch(answer))
    return next((change for change in changes if change["batch"] >= enough), None)


def _checkpointed(question: Question, known: Known) -> Iterator[Remedy]:
    found = known.get((question.case.method, True))
    if found and not question.case.recomputes:
        yield {"change": "gradient checkpointing", "batch": _batch(found), "checked": "simulated"}


def _smaller(question: Question, known: Known) -> Iterator[Remedy]:
    for method in smaller_methods(question.case.method):
        found = known.get((method, replace(question.case, method=method).recomputes))
        if found:
            yield {"change": BY_NAME[method].change or method, "batch": _batch(found), "checked": "simulated"}


def _fewer_logits(question: Question, answer: Capacity, sizes: Sizes) -> Iterator[Remedy]:
    """Logits at one labelled token of each sequence instead of all; the peak may then be elsewhere: an upper bound."""
    case = question.case
    if case.first_order:
        saved = (case.seq_len - 1) * sizes.vocabulary * LOGIT_BYTES
        formula = f"{LOGIT_BYTES} bytes x {sizes.vocabulary:,} x {case.seq_len - 1} tokens less a sequence, at best"
        batch = _batch_with(question, answer, fixed=0, each=saved)
        yield {"change": "logits only at labels", "batch": batch, "checked": formula}


def _streamed(question: Question, answer: Capacity, sizes: Sizes) -> Iterator[Remedy]:
    """Layers fetched from CPU memory when their turn comes."""
    if BY_NAME[question.case.method].streamable and sizes.layers > AT_A_TIME:
        parts = answer["base"]["components"]
        layers = sum(parts.values()) - parts.get("embeddings", 0) - parts.get("working_buffers", 0)
        saved = layers * (sizes.layers - AT_A_TIME) // sizes.layers
        formula = f"{AT_A_TIME} of {sizes.layers} layers resident: {saved / 2**30:.2f} GiB less"
        batch = _batch_with(question, answer, fixed=saved, each=0)
        yield {"change": "layers streamed from CPU memory", "batch": batch, "checked": formula}


def _batch_with(question: Question, answer: Capacity, fixed: int, each: int) -> int:
    """The batch that `fixed` bytes less, and `each` less a sequence, lead to, on the straight line from batch 1."""
    base, point = answer["base"]["peak"]["process"], answer["batch"]
    room = question.memory_bytes - base + fixed + each  # beyond batch 1
    if room < 0:
        return 0
    if point is None:
        return 1
    slope = (point["next_process"] - base) / point["largest"] - each
    return 1 + int(room / slope) if slope > 0 else 0


def _can_checkpoint(question: Question, answer: Capacity) -> bool:
    if not question.case.first_order or question.case.recomputes or answer["base"] is None:
        return False
    return sum(answer["base"]["at_peak"][role] for role in HELD) <= question.memory_bytes


def _batch(capacity: Capacity) -> int:
    return capacity["batch"]["largest"] if capacity["batch"] else 0
