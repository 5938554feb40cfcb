"""The answer for every method, worked out in processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.capacity.capacity import Capacity, Question, capacity
from bench.capacity.remedies import Sizes, cheapest, further_questions, key
from bench.cases.models import ModelSource
from bench.worlds.workers import InOrder, workers


def answer(questions: Sequence[Question], source: ModelSource) -> list[Capacity]:
    """The capacity of each question with its `remedy`; simulated in several processes, with progress on stderr."""
    with workers(len(questions)) as in_order:
        found = _ask(in_order, questions)
        known = {key(item): item for item in found}
        known |= {key(item): item for item in _ask(in_order, further_questions(questions, known))}
    print(file=sys.stderr)
    config = source.config.get_text_config()
    sizes = Sizes(config.num_hidden_layers, config.vocab_size)
    rows = []
    for question, item in zip(questions, found, strict=True):
        base = item["base"] and {name: item["base"][name] for name in ("peak", "at_peak")}
        rows.append(item | {"base": base, "remedy": cheapest(question, known, sizes)})
    return rows


def _ask(in_order: InOrder, questions: Sequence[Question]) -> list[Capacity]:
    found = []
    for number, item in enumerate(in_order(capacity, questions), 1):
        print(f"\r[{number}/{len(questions)}] {item['method']:<9}", end="", file=sys.stderr, flush=True)
        found.append(item)
    return found
