"""A reward, raised: `python -m reports.studies.reward.page` makes reward.md and curve.png again."""

from __future__ import annotations

import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reports.studies.words import machine, quoted
from reports.tables.table import Table

HERE = Path(__file__).parent
RECORD, REPORT, CURVE = "reward.json", "reward.md", "curve.png"
WHEN = ("before", "after")
SCORES = (("reward", "sampled"), ("greedy_reward", "greedy"))
Entry = Mapping[str, Any]


def render(record: Mapping[str, Any]) -> str:
    """The report as Markdown, of a record of `bench.studies.reward`."""
    entries = record["entries"]
    parts = [
        f"# {record['model']}: a regular expression as a reward",
        setting(record),
        table(entries).to_markdown(),
        f"![mean reward over the steps]({CURVE})",
        answers(entries[0]),
    ]
    return "\n\n".join(parts) + "\n"


def setting(record: Mapping[str, Any]) -> str:
    """What is asked, scored and trained, and on what machine."""
    first, ways = record["entries"][0], record["ways"]
    settings = first["settings"]
    machines = sorted({machine(entry["environment"]) for entry in record["entries"]})
    lines = [
        f'{record["rows"]} questions of the form "Can dogs swim?", as a chat with the system prompt '
        f'"{record["system"]}". The reward is 1 where the first word of the answer is Yes or No, else 0, see '
        "bench/studies/yes_or_no.py. It has no derivative, and does not know which answer is right: what is learnt "
        "is a format.",
        f"Answers of up to {ways['max_new_tokens']} tokens, sampled at temperature {ways['temperature']:g}. Before and "
        f"after: the same {record['sizes']['test']} test questions with the same random numbers, and greedy; trained "
        f"on all others but {record['sizes']['validation']} for validation, drawn by seed.",
        f"QZO on the model's 4-bit GGUF, packed: {settings['steps']} steps of {settings['directions']} directions "
        f"compared with one another ({settings['estimator']}), scores divided by their spread, batches of "
        f"{settings['batch_size']} questions, scales of layers {settings['layers']}, relative amounts, eps "
        f"{settings['eps']:g}, lr {settings['lr']:g} {settings['scheduler']}.",
        *(f"Machine: {machine}; `make reward`." for machine in machines),
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(entries: Sequence[Entry]) -> Table:
    """One line a seed, and their mean."""
    headers = ["seed", *(f"{name} {when}" for _, name in SCORES for when in WHEN), "best step", "minutes"]
    rows = [
        [str(entry["seed"]), *_scores(entry), str(entry["best_step"]), f"{entry['seconds'] / 60:.1f}"]
        for entry in entries
    ]
    if len(entries) > 1:
        means = [statistics.mean(entry[when][key] for entry in entries) for key, _ in SCORES for when in WHEN]
        rows.append(["mean", *(f"{mean:.3f}" for mean in means), "", ""])
    error = statistics.mean((entry["before"]["spread"] / entry["before"]["count"] ** 0.5) for entry in entries)
    notes = [
        f"mean reward on {entries[0]['before']['count']} test questions, standard error of the sampled one before "
        f"about {error:.2f}; the state of the best validation, chosen by sampled answers",
        "minutes: everything of a seed, evaluations included, while other programs shared the machine",
    ]
    return Table("Mean reward on questions that were not trained on", headers, rows, notes)


def answers(entry: Entry) -> str:
    """Greedy answers to the first test questions of a seed, before and after."""
    rows = [
        [question, quoted(before), quoted(after)]
        for (question, before), (_, after) in zip(*(entry[when]["answers"] for when in WHEN), strict=True)
    ]
    note = (
        "longer than in training, and cut; whether they are right was not asked, nor how they go on, so both may be "
        "worse than before"
    )
    return Table(f"Greedy answers, seed {entry['seed']}", ["question", *WHEN], rows, [note]).to_markdown()


def to_png(record: Mapping[str, Any]) -> bytes:
    """The mean reward of each step's texts, pale, and of the validation, over the steps; a colour a seed."""
    figure = Figure(figsize=(7, 3.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for number, entry in enumerate(record["entries"]):
        steps = [(step, -loss) for step, loss in enumerate(entry["losses"]) if loss is not None]
        axis.plot(*zip(*steps, strict=True), color=f"C{number}", alpha=0.3, lw=1)
        points = [(point["step"], point["reward"]) for point in entry["curve"]]
        axis.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", ms=3, label=f"seed {entry['seed']}")
    axis.set_title("mean reward: validation, and pale the texts of each step", loc="left", fontsize=10)
    axis.set_xlabel("steps", fontsize=9)
    axis.set_ylim(0, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _scores(entry: Entry) -> list[str]:
    return [f"{entry[when][key]:.3f}" for key, _ in SCORES for when in WHEN]


def main() -> int:
    """Write report and picture beside the record."""
    record = json.loads((HERE / RECORD).read_text(encoding="utf-8-sig"))
    (HERE / REPORT).write_text(render(record), encoding="utf-8")
    (HERE / CURVE).write_bytes(to_png(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
