"""Options that name a task or data of one's own, for the commands that take them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qzo.errors import QzoError

if TYPE_CHECKING:
    from qzo.training.own import OwnData

SPLITS = ("train", "validation", "test")
REWARD = ("temperature", "max_new_tokens", "generations", "keep_weights")
SAMPLES = tuple(f"{split}_samples" for split in SPLITS)
OF_OWN = ("validation", "test", "columns", "label_words", "metric", *SAMPLES, "reward", *REWARD)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--task`, `--data` and what belongs to them."""
    group = parser.add_argument_group("data: a task by name, or files of your own")
    group.add_argument("--task", help="name of a task, e.g. rotten-tomatoes")
    group.add_argument(
        "--data",
        metavar="PLACE",
        help="your own: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of them, or hub:owner/name, with "
        "the fields text and label, prompt and completion, messages, text, or chosen and rejected; with --task, the "
        "folder of its JSONL files",
    )
    group.add_argument("--validation", metavar="PLACE", help="its validation rows; default: a tenth, drawn by seed")
    group.add_argument("--test", metavar="PLACE", help="its test rows; default: a tenth where validation is drawn too")
    group.add_argument("--columns", metavar="FIELD=COLUMN,...", help="columns of other names: prompt=question")
    group.add_argument("--label-words", metavar="FILE", help="what the model is to say for each label, JSON or TSV")
    group.add_argument("--metric", help="tells the best state: accuracy, macro_f1, loss, exact_match, f1, reward")
    for split in SPLITS:
        group.add_argument(f"--{split}-samples", type=int, metavar="N", help=f"{split} rows at most")
    group = parser.add_argument_group("a reward: what the model answers to the field prompt, scored by a function")
    group.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="a .py file or module, and its function of prompts, completions and further columns that returns numbers, "
        "as TRL's reward functions do; the mean is raised",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="of the answers (default 1); 0, the likeliest")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer, at most (default 64)")
    group.add_argument("--generations", type=int, metavar="N", help="answers to each prompt (default 1)")
    group.add_argument(
        "--keep-weights",
        action="store_true",
        default=None,
        help="rebuild packed weights once an answer, not once a token: faster, and the memory of a dense model",
    )


def own_data(options: argparse.Namespace) -> OwnData | None:
    """The data of one's own that was asked for; None where a task was. Raises QzoError."""
    if options.task is not None:
        unused = next((name for name in OF_OWN if getattr(options, name) is not None), None)
        if unused is not None:
            raise QzoError(f"--{unused.replace('_', '-')} is for --data without --task; leave one of them out")
        return None
    if options.data is None:
        raise QzoError("what to train on is missing: --data FILE of your own, or --task NAME, e.g. rotten-tomatoes")
    from qzo.tasks.own.kinds import parse_columns
    from qzo.training.own import OwnData

    sizes = {split: getattr(options, f"{split}_samples") for split in SPLITS}
    for split, size in sizes.items():
        if size is not None and size < 1:
            raise QzoError(f"--{split}-samples {size} must be at least 1")
    return OwnData(
        options.data,
        options.validation,
        options.test,
        parse_columns(options.columns),
        options.label_words,
        options.metric,
        sizes,
        _reward(options),
    )


def take_over(options: argparse.Namespace, about: Mapping[str, Any]) -> None:
    """Put what a run was begun with where nothing was asked for; what was asked for is compared with it later."""
    if about.get("task") is not None:
        if options.data is None:
            options.task, options.data = options.task or about["task"], about.get("data")
        return
    if options.task is not None:
        return
    sizes = about.get("sizes") or {}
    columns = ",".join(f"{field}={column}" for field, column in (about.get("columns") or {}).items())
    known = {name: about.get(name) for name in ("data", "validation", "test", "label_words", "reward")}
    known |= {"metric": about.get("asked_metric"), "columns": columns or None}
    known |= {f"{split}_samples": sizes.get(split) for split in SPLITS}
    known |= {name: about.get(name) for name in REWARD}
    for name, value in known.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _reward(options: argparse.Namespace) -> Any:
    """The reward that was asked for, its function found; None without. Raises QzoError."""
    asked = {name: getattr(options, name) for name in REWARD if getattr(options, name) is not None}
    if options.reward is None:
        if asked:
            raise QzoError(f"--{next(iter(asked)).replace('_', '-')} is for --reward MODULE:FUNCTION; leave it out")
        return None
    from qzo.tasks.own.reward import Reward

    return Reward(options.reward, **asked)


def device(name: str) -> Any:
    """A device that is there. Raises QzoError for others."""
    import torch

    from qzo.files.folder import one_line

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # PyTorch has no kind of its own for it
        raise QzoError(f"--device {name} cannot be used: {one_line(error)}; name another, such as cpu") from error
