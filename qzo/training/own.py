"""A user's own data in a run: what was asked for, as it is held to on a resume, and a hash of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qzo.checkpoints.identity import place_of
from qzo.tasks.own.reward import Reward
from qzo.tasks.source.files import HUB

REWARD, SOURCE = "reward", "reward_source"  # in run.json: its function, and SHA-256 of the file that has it
WRITING = ("temperature", "max_new_tokens", "generations")


@dataclass(frozen=True)
class OwnData:
    """Arguments of `qzo.tasks.from_data`."""

    data: str
    validation: str | None = None
    test: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    label_words: str | None = None
    metric: str | None = None
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    reward: Reward | None = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return dict(vars(self))

    def about(self) -> dict[str, Any]:
        """As a run remembers it; files by their absolute paths."""
        places = {name: _place(getattr(self, name)) for name in ("data", "validation", "test", "label_words")}
        sizes = {split: size for split, size in self.sizes.items() if size is not None}
        asked = {"columns": dict(self.columns), "asked_metric": self.metric, "sizes": sizes}
        return {"task": None, **places, **asked, **({} if self.reward is None else _about_reward(self.reward))}

    @staticmethod
    def of_run(about: Mapping[str, Any]) -> OwnData | None:
        """The data that a run was begun with; None where it was begun with a task."""
        if about.get("task") is not None or not isinstance(about.get("data"), str):
            return None
        names = ("data", "validation", "test", "label_words")
        places: Any = {name: about.get(name) for name in names}
        return OwnData(
            **places,
            columns=about.get("columns") or {},
            metric=about.get("asked_metric"),
            sizes=about.get("sizes") or {},
            reward=_reward_of(about),
        )


def _about_reward(reward: Reward) -> dict[str, Any]:
    """As a run remembers it; a file by its absolute path, and what is in it by a hash. Raises QzoError."""
    module, colon, name = reward.scorer.name.rpartition(":")
    return {
        REWARD: f"{place_of(module)}{colon}{name}" if module.endswith(".py") else reward.scorer.name,
        SOURCE: reward.scorer.digest,
        **{name: getattr(reward, name) for name in WRITING},
    }


def _reward_of(about: Mapping[str, Any]) -> Reward | None:
    """The reward of a run, found again. Raises QzoError where it is not there any more."""
    if about.get(REWARD) is None:
        return None
    ways: Any = {name: about[name] for name in WRITING if name in about}
    return Reward(about[REWARD], **ways)


def _place(path: str | None) -> str | None:
    return path if path is None or path.startswith(HUB) else place_of(path)


def fingerprint(splits: Mapping[str, Sequence[Any]]) -> str:
    """SHA-256 over the examples of all splits, in their order."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for example in examples:
            digest.update(repr((split, _parts(example))).encode())
    return digest.hexdigest()


def _parts(example: Any) -> dict[str, Any]:
    """All of an example but where it stands."""
    return {name: value for name, value in vars(example).items() if name != "where"}
