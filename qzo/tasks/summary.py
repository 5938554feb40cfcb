"""What was recognised in a user's data: as numbers, and in a few lines that are told before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from qzo.tasks.own.completions import RewardObjective
from qzo.tasks.own.reward import RewardTask
from qzo.tasks.own.task import LabelTask, SequenceTask

if TYPE_CHECKING:
    from qzo.tasks.objective import Objective

Splits = Mapping[str, Sequence[Any]]
SHOWN = 400  # characters of the example
MOST_SHARES = 12  # labels whose shares are told one by one


def described(task: Any, splits: Splits, objective: Any, rows: Splits) -> dict[str, Any]:
    """What the data of a task are, as JSON holds it.

    Returns "name", "kind" (in words; None of a task that is known by name), "metric", "splits" ({split: {"rows",
    "texts", "median", "longest"}}, the last two in tokens), "labels" ({label: training rows}, the most frequent first;
    None where there are no label words), "reward" (in words, or None), "example" (as the model sees it) and "notices"
    (what is cut).
    """
    counted = {}
    for split, found in rows.items():
        lengths = [objective.length(row) for row in found]
        counted[split] = {
            "rows": len(found),
            "texts": len(splits[split]),
            "median": median(lengths),
            "longest": max(lengths),
        }
    kind = getattr(task, "kind", None)
    return {
        "name": task.name,
        "kind": None if kind is None else kind.text,
        "metric": task.metric,
        "splits": counted,
        "labels": _counts(task.words, splits["train"]) if task.words else None,
        "reward": task.reward.told() if isinstance(task, RewardTask) else None,
        "example": _example(objective, rows["train"][0]),
        "notices": objective.notices(splits),
    }


def summary(
    task: LabelTask | SequenceTask | RewardTask, splits: Splits, objective: Objective, rows: Splits
) -> list[str]:
    """Lines: the kind, rows and lengths of each split, shares of the labels, and one example as the model sees it."""
    about = described(task, splits, objective, rows)
    lines = [f"data: {about['name']}, {about['kind']}; metric {about['metric']}"]
    for split, found in about["splits"].items():
        of = f" of {found['texts']:,} texts" if getattr(task, "packed", False) else ""
        lines.append(
            f"{split}: {found['rows']:,} rows{of}, tokens: median {found['median']:,.0f}, longest {found['longest']:,}"
        )
    if about["labels"]:
        lines.append(f"labels: {_shares(about['labels'])}")
    if about["reward"]:
        lines.append(f"reward: {about['reward']}")
    lines.append(f"an example: {about['example']}")
    return lines


def _counts(words: Sequence[str], examples: Sequence[Any]) -> dict[str, int]:
    """Label -> its training rows."""
    counts = Counter(example.label for example in examples)
    return {words[label].strip(): count for label, count in counts.most_common()}


def _shares(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    parts = [f"{label} {count / total:.0%}" for label, count in counts.items()]
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
