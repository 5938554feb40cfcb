"""The answer for every method, worked out in processes of their own."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from typing import Any

from bench.capacity.capacity import Capacity, Question, capacity
from bench.capacity.remedies import Sizes, cheapest, further_questions, key
from bench.cases.models import ModelSource
from bench.cases.notices import ignore_future_warnings

WORKERS = 2


def answer(questions: Sequence[Question], source: ModelSource) -> list[Capacity]:
    """The capacity of each question with its `remedy`; simulated in two processes, with progress on stderr."""
    with multiprocessing.get_context("spawn").Pool(min(WORKERS, len(questions)), ignore_future_warnings) as pool:
        found = _ask(pool, questions)
        known = {key(item): item for item in found}
        known |= {key(item): item for item in _ask(pool, further_questions(questions, known))}
    print(file=sys.stderr)
    config = source.config.get_text_config()
    sizes = Sizes(config.num_hidden_layers, config.vocab_size)
    rows = []
    for question, item in zip(questions, found, strict=True):
        base = item["base"] and {name: item["base"][name] for name in ("peak", "at_peak")}
        rows.append(item | {"base": base, "remedy": cheapest(question, known, sizes)})
    return rows


def _ask(pool: Any, questions: Sequence[Question]) -> list[Capacity]:
    found = []
    for number, item in enumerate(pool.imap(capacity, questions), 1):
        print(f"\r[{number}/{len(questions)}] {item['method']:<9}", end="", file=sys.stderr, flush=True)
        found.append(item)
    return found
