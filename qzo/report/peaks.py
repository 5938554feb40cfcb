"""What memory a run needed, beside what other methods would have needed.

The run's own bytes are those that it recorded. Simulations come from whoever is installed under the entry point
`qzo.peaks`, as the bench of a checkout is; qzo itself knows no simulator. What is asked and answered: `Ask`, and
records as `bench` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from qzo.errors import QzoError
from qzo.report.reading import Story

GROUP = "qzo.peaks"
MISSING = (
    "not simulated: install the checkout with its bench, pip install --editable '.[bench]'; where that was done by an "
    "older version, do it again"
)
ROLES = ("weights", "quantization", "gradients", "optimizer", "activations", "noise", "temporaries", "unattributed")
REST = "everything else"
# (model, method, batch_size, seq_len, device, packed) -> records
Ask = Callable[[str, str, int, int, str, Mapping[str, Any] | None], Iterator[Mapping[str, Any]]]


@dataclass(frozen=True)
class Peak:
    """One method: its bytes by role, or why there are none.

    `kind` tells what was added up, `world` where the number is from; `own` is of this very run.
    """

    name: str
    world: str
    kind: str
    roles: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    own: bool = False

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.roles.values())


def measured(story: Story) -> list[Peak]:
    """What the run recorded of itself: its tensors counted, its peak measured, and what lies between."""
    model = story.facts.get("model")
    sizes = {name: model.get(name) for name in ("weights", "quantization")} if isinstance(model, dict) else {}
    held = {**sizes, "optimizer": story.peak.get("optimizer")}
    known = {name: nbytes for name, nbytes in held.items() if type(nbytes) is int and nbytes > 0}
    found = []
    for key, kind in (("allocated", "allocated on the GPU"), ("process", "peak RSS of the process")):
        total = story.peak.get(key, 0)
        if total and not (key == "process" and "allocated" in story.peak):
            rest = {REST: total - sum(known.values())}
            found.append(Peak(story.method, "measured", kind, {**known, **rest} if rest[REST] > 0 else {REST: total},
                              own=True))  # fmt: skip
    return found


def simulated(story: Story, tell: Callable[[str], None]) -> tuple[list[Peak], str | None]:
    """Peaks of the run's method and of others, and a line about what is not there; `tell` is told what begins."""
    ask = _simulator()
    if ask is None:
        return [], MISSING
    batch, device, model = (_object(story, name) for name in ("batch", "device", "model"))
    sizes = batch.get("rows"), batch.get("tokens")
    if not all(type(value) is int and value > 0 for value in sizes) or "model" not in story.about:
        return [], "not simulated: the run does not tell how large its batches are; it is of an older version"
    arguments: Any = (story.about["model"], story.method, *sizes, str(device.get("name", "cpu")), model.get("packed"))
    tell("simulating what other methods would have needed, a minute or more; --no-peaks leaves it out")
    found = []
    try:
        for record in ask(*arguments):
            found.append(_peak(record, story.method))
            tell(f"  {found[-1].name}: {found[-1].reason or f'{found[-1].total:,} bytes'}")
    except QzoError as error:
        return found, f"not simulated: {error}"
    return found, None


def _simulator() -> Ask | None:
    found = next(iter(entry_points(group=GROUP)), None)
    if found is None:
        return None
    try:
        ask: Ask = found.load()
    except (ImportError, AttributeError):  # of an environment that lacks what the bench needs, or is of another version
        return None
    return ask


def _peak(record: Mapping[str, Any], method: str) -> Peak:
    name, world = record["case"]["method"], str(record["world"])
    gpu = record["case"].get("gpu")
    world = f"{world}, {'CPU' if gpu == 'cpu' else gpu}" if gpu else world
    if record["status"] != "ok":
        return Peak(name, world, "allocated", reason=f"{record['status']}: {record['message']}", own=name == method)
    roles = {role: record["at_peak"][role] for role in ROLES if record["at_peak"].get(role)}
    return Peak(name, world, "allocated", roles, own=name == method)


def _object(story: Story, name: str) -> Mapping[str, Any]:
    value = story.facts.get(name)
    return value if isinstance(value, dict) else {}
