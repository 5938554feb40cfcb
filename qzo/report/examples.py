"""Validation rows as the untuned and the tuned model answer them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo import tasks
from qzo.checkpoints.load import load_tokenizer
from qzo.errors import QzoError
from qzo.models.positions import count_positions, row_length
from qzo.report.reading import Story
from qzo.tasks.encoding import Batch
from qzo.tasks.evaluation import by_length
from qzo.tasks.own.completions import RewardObjective
from qzo.tasks.sampled import ends
from qzo.tasks.scoring import candidate_scores
from qzo.tasks.writing import continued, write_answers
from qzo.training.own import OwnData, fingerprint
from qzo.training.settings import EVAL_BATCH_SIZE
from qzo.training.tuned.state import Tuned, read_tuned

MOST_TOKENS = 64  # that are written for an example
MOST_BEGUN = 64  # of a plain text that are shown to the model
SPLIT = "validation"


@dataclass(frozen=True)
class Answered:
    """What was asked, what should be answered, and what was."""

    asked: str
    wanted: str
    before: str = ""
    after: str = ""


def examples_of(
    story: Story, count: int, base: str | None, device: torch.device, tell: Callable[[str], None]
) -> list[Answered]:
    """The first `count` validation rows with the answers of both models, which are loaded one after the other.

    Args:
        story: of a run that `qzo train` made.
        count: of rows, at least 1.
        base: where the model lies now, if it moved.
        device: where the models run.
        tell: is told what begins.

    Raises QzoError where data or model are not there any more, or are not those of the run.
    """
    tuned = read_tuned(story.folder, model=base)
    task, rows = _rows(story, count)
    objective = tasks.objective(task, load_tokenizer(tuned.model), story.settings.get("max_length"))
    found: list[Answered] = []
    for name in ("before", "after"):
        tell(f"examples {name} training: loading {tuned.model}")
        model = _model(tuned, name, device)
        objective = objective.fitted(row_length(model, story.settings.get("max_length"), tuned.model))
        encoded = objective.rows(rows)[:count]
        found = found or [_asked(objective, row) for row in encoded]
        answers = _answers(objective, model, encoded)
        found = [replace(each, **{name: answer}) for each, answer in zip(found, answers, strict=True)]
    return found


def _model(tuned: Tuned, name: str, device: torch.device) -> nn.Module:
    if name == "after":
        return tuned.load(device=device)
    return tuned.untuned(device=device).eval()


def _rows(story: Story, count: int) -> tuple[Any, Sequence[Any]]:
    """The task of a run, and validation rows. Raises QzoError where the data hold other rows by now."""
    about, seed = story.about, story.settings.get("seed", 0)
    own = OwnData.of_run(about)
    if own is None and not isinstance(about.get("task"), str):
        raise QzoError(f"{story.folder} does not tell its data, so there are no examples; leave --examples out")
    task: Any = tasks.from_data(**own.options()) if own else tasks.get(about["task"], about.get("data"))
    splits = task.splits(seed)
    if own and about.get("rows") not in (None, fingerprint(splits)):
        raise QzoError(f"{own.data} has other rows than {story.folder} was trained on; leave --examples out")
    return task, splits[SPLIT] if getattr(task, "packed", False) else splits[SPLIT][:count]


def _asked(objective: Any, row: Any) -> Answered:
    """A row as people read it."""
    if isinstance(objective, RewardObjective):
        return Answered(objective.shown(row), "")
    if not isinstance(row, tuple):
        answers = row.answers if objective.task.generates else (row.answers[row.label],)
        return Answered(row.text + row.ask, " / ".join(answer.strip() for answer in answers))
    decode, begins = objective.encoder.tokenizer.decode, _begins(objective, row)
    ids = list(row[0].ids)
    wanted = decode(ids[begins : begins + MOST_TOKENS], skip_special_tokens=True)
    return Answered(
        str(decode(ids[:begins], skip_special_tokens=True)),
        str(wanted) if objective.task.packed else objective.encoder.last_answer(row),
    )


def _begins(objective: Any, row: Any) -> int:
    """Column where the answer begins: of plain text, behind its first half, at most 64 tokens."""
    if not objective.task.packed:
        return int(row[0].last_turn)
    return max(1, min(MOST_BEGUN, len(row[0].ids) // 2))


def _answers(objective: Any, model: nn.Module, rows: Sequence[Any]) -> list[str]:
    if isinstance(objective, RewardObjective):
        return [_rewarded(objective, model, row) for row in rows]
    if rows and isinstance(rows[0], tuple):
        return [_written(objective, model, row) for row in rows]
    if objective.task.generates:
        return write_answers(model, objective.encoder, rows)
    return _chosen(objective, model, rows)


def _rewarded(objective: RewardObjective, model: nn.Module, row: Any) -> str:
    """The likeliest completion of a prompt, and what it is worth."""
    batch = objective.batch([row]).to(next(model.parameters()).device)
    (found,) = objective.written(model, batch, objective.reward.greedy())
    return f"{objective.encoder.tokenizer.decode(found.ids, skip_special_tokens=True)}\n(reward {found.reward:.4g})"


@torch.no_grad()
def _chosen(objective: Any, model: nn.Module, rows: Sequence[Any]) -> list[str]:
    """The likeliest candidate of each row."""
    device, answers = next(model.parameters()).device, [""] * len(rows)
    for part in by_length([objective.length(row) for row in rows], EVAL_BATCH_SIZE):
        scores = candidate_scores(model, objective.batch([rows[number] for number in part]).to(device))
        for number, guess in zip(part, scores.argmax(1).tolist(), strict=True):
            answers[number] = rows[number].answers[guess].strip()
    return answers


def _written(objective: Any, model: nn.Module, row: Any) -> str:
    """What the model writes behind a row's prompt, greedily."""
    tokenizer, ids = objective.encoder.tokenizer, list(row[0].ids)[: _begins(objective, row)]
    room = count_positions(model)
    most = MOST_TOKENS if room is None else min(MOST_TOKENS, room - len(ids))
    if not ids or most < 1:
        return ""
    prompt = torch.tensor([ids])
    batch = Batch(prompt, torch.ones_like(prompt), torch.zeros(1, dtype=torch.int64))
    return continued(model, batch, tokenizer, sorted(ends(tokenizer)), most)[0].strip()


def check_examples(count: int | None, folder: Path, story: Story) -> None:
    """Raise QzoError, before any work, for a number of examples that cannot be shown."""
    if count is None:
        return
    if count < 1:
        raise QzoError(f"--examples {count} must be at least 1")
    if not story.validations:
        raise QzoError(f"{folder} has no best state yet, so there is nothing to compare; leave --examples out")
