"""What was recognised in a user's data, in a few lines, before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from qzo.tasks.objective import Objective
from qzo.tasks.own.completions import RewardObjective
from qzo.tasks.own.reward import RewardTask
from qzo.tasks.own.task import LabelTask, SequenceTask

Splits = Mapping[str, Sequence[Any]]
SHOWN = 400  # characters of the example
MOST_SHARES = 12  # labels whose shares are told one by one


def summary(
    task: LabelTask | SequenceTask | RewardTask, splits: Splits, objective: Objective, rows: Splits
) -> list[str]:
    """Lines: the kind, rows and lengths of each split, shares of the labels, and one example as the model sees it."""
    lines = [f"data: {task.name}, {task.kind.text}; metric {task.metric}"]
    for split, found in rows.items():
        lengths = [objective.length(row) for row in found]
        of = f" of {len(splits[split]):,} texts" if getattr(task, "packed", False) else ""
        lines.append(
            f"{split}: {len(found):,} rows{of}, tokens: median {median(lengths):,.0f}, longest {max(lengths):,}"
        )
    if isinstance(task, LabelTask):
        lines.append(f"labels: {_shares(task, splits['train'])}")
    if isinstance(task, RewardTask):
        lines.append(f"reward: {task.reward.told()}")
    lines.append(f"an example: {_example(objective, rows['train'][0])}")
    return lines


def _shares(task: LabelTask, examples: Sequence[Any]) -> str:
    counts = Counter(example.label for example in examples)
    parts = [f"{task.words[label].strip()} {count / len(examples):.0%}" for label, count in counts.most_common()]
    more = f", and {len(parts) - MOST_SHARES} more" if len(parts) > MOST_SHARES else ""
    return ", ".join(parts[:MOST_SHARES]) + more


def _example(objective: Any, row: Any) -> str:
    """What the model reads, with what it is to learn in brackets; the middle of a long one is left out."""
    if isinstance(objective, RewardObjective):
        text = f"{objective.shown(row)}[...]"
    elif not isinstance(row, tuple):
        text = f"{row.text}{row.ask}[{row.answers[row.label]}]"
    else:
        decode, tokens = objective.encoder.tokenizer.decode, row[0]
        begins = tokens.begins
        text = f"{decode(list(tokens.ids[:begins]))}[{decode(list(tokens.ids[begins:]))}]"
    text = text.replace("\n", "\\n")
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
