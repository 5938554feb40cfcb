"""A score that no gradient reaches, raised: `python -m bench.studies.reward --out FILE` trains SmolLM2's GGUF on it.

The model is asked what animals can do and is to begin its answer with Yes or No, which nothing in the prompt asks for.
The score, `bench/studies/yes_or_no.py`, is a regular expression on the sampled text; which questions are trained on,
and which are kept apart for validation and test, is drawn by seed. Every seed is a run of `qzo train --reward` in a
folder of its own under --work: stopped at any moment, the command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases.weights import gguf_source
from bench.commands.parser import Parser
from bench.records.environment import environment
from bench.studies import yes_or_no
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer
from qzo.durable import replace_file
from qzo.errors import QzoError
from qzo.training.own import OwnData
from qzo.training.run import METRICS
from qzo.training.settings import TrainSettings
from qzo.training.task import train_task
from qzo.training.tuned.state import read_tuned

MODEL = "smollm2-135m"
SYSTEM = "You are a helpful assistant."
ANIMALS = (
    "cats", "dogs", "horses", "whales", "bees", "owls", "frogs", "elephants", "penguins", "spiders", "bears", "foxes",
    "rabbits", "eagles", "sharks", "ants", "geese", "goats", "snails", "bats", "cows", "tigers", "ducks", "monkeys",
)  # fmt: skip
DEEDS = ("fly", "swim", "climb trees", "sing", "dig holes", "see at night", "run fast", "eat grass")
SIZES = {"validation": 24, "test": 48}
WAYS: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 2, "generations": 1}
# A relative eps of 0.05 still leaves the model its words, and moves the score by more than chance does. With scores
# divided by their spread, a step moves each scale by lr / (eps sqrt(directions)) = 3 % of itself, at first.
OPTIONS: dict[str, Any] = {
    "steps": 24, "batch_size": 24, "lr": 4e-3, "eps": 5e-2, "relative": True, "clip_threshold": float("inf"),
    "directions": 8, "estimator": "population", "normalize": True, "layers": "15-29", "scheduler": "linear",
    "eval_every": 6, "eval_batch_size": 24,
}  # fmt: skip
SHOWN, LONGER = 4, 16  # test questions whose greedy answers a record keeps, before and after, and tokens of these
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what --out lacks, and write it there; 0, or 2 and one line on stderr."""
    parser = Parser(
        prog="python -m bench.studies.reward", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the seeds that it holds are not run again")
    parser.add_argument("--work", type=Path, default=Path("results/reward"), help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--steps", type=int, default=OPTIONS["steps"], help="of QZO")
    parser.add_argument("--threads", type=int, help="of PyTorch; default all cores")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        if options.threads:
            torch.set_num_threads(options.threads)
        source = str(gguf_source(MODEL).weights)
        for seed in _numbers(options.seeds):
            settings = TrainSettings(seed=seed, **{**OPTIONS, "steps": options.steps})
            if not any(entry["settings"] == settings.to_json() for entry in read(options.out)):
                log.info("seed %d", seed)
                add(options.out, measure(source, settings, options.work))
    except (QzoError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def questions() -> list[dict[str, Any]]:
    """The rows: conversations that ask what an animal can do."""
    return [
        {"prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Can {animal} {deed}?"}]}
        for animal in ANIMALS
        for deed in DEEDS
    ]


def measure(source: str, settings: TrainSettings, work: Path) -> dict[str, Any]:
    """The entry of one seed: settings, the test before and after, the curve, and some answers."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "questions.jsonl"
    text = "".join(f"{json.dumps(row)}\n" for row in questions())
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    reward = tasks.Reward(f"{yes_or_no.__file__}:yes_or_no", keep_weights=True, **WAYS)
    own, folder = OwnData(str(file), sizes=SIZES, reward=reward), work / f"seed-{settings.seed}"
    task = tasks.from_data(**own.options())
    examples = task.splits(settings.seed)["test"]
    objective: Any = tasks.objective(task, load_tokenizer(source))
    rows = objective.rows(examples)
    untuned: Any = load(source, dequantize=False).eval()
    before = scores(untuned, objective, rows)
    del untuned
    trained, test = train_task(source, None, settings, folder, resume=folder.exists(), own=own)
    after = scores(read_tuned(folder).load(), objective, rows)
    if after["reward"] != test["reward"]:
        raise QzoError(
            f"{folder}: the run's test says {test['reward']}, and its best state gives {after['reward']}; remove the "
            "run and train it again"
        )
    curve = [{"step": step, "reward": found["reward"]} for step, found in validations(folder / METRICS)]
    machine = {**environment(), "processor": platform.processor() or platform.machine()}
    return {
        "seed": settings.seed,
        "settings": settings.to_json(),
        "before": before,
        "after": after,
        "best_step": trained.best_step,
        "curve": curve,
        "losses": losses(folder / METRICS),
        "seconds": round(time.monotonic() - started, 1),  # of this process: less where a stopped run was taken up again
        "environment": {**machine, "threads": torch.get_num_threads()},
    }


def scores(model: Any, objective: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """The mean reward of sampled and of greedy answers, and the greedy ones to the first questions."""
    found = objective.evaluate(model, rows, OPTIONS["eval_batch_size"], last=True)
    batch = objective.batch(rows[:SHOWN])
    answers = objective.written(model, batch, replace(objective.reward.greedy(), max_new_tokens=LONGER))
    texts = [objective.encoder.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
    asked = [prompt.given[-1]["content"] for prompt in batch.prompts]
    return {**found, "answers": [[question, text] for question, text in zip(asked, texts, strict=True)]}


def validations(metrics: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, result) of each validation of a run."""
    return [(entry["step"], entry["validation"]) for entry in _lines(metrics) if "validation" in entry]


def losses(metrics: Path) -> list[float | None]:
    """The loss of each step of a run: minus the mean reward over its directions."""
    return [entry["loss"] for entry in _lines(metrics) if "loss" in entry]


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8-sig").splitlines()]


def add(file: Path, entry: dict[str, Any]) -> None:
    """Put the entry of a seed into the record."""
    kept = [old for old in read(file) if old["seed"] != entry["seed"]]
    about = {"model": MODEL, "system": SYSTEM, "rows": len(questions()), "sizes": SIZES, "ways": WAYS}
    content = {**about, "entries": sorted([*kept, entry], key=lambda e: e["seed"])}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a record; none where there is no file."""
    return list(json.loads(file.read_text(encoding="utf-8-sig"))["entries"]) if file.exists() else []


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise QzoError(f'--seeds "{text}" is not a comma-separated list of whole numbers; give e.g. 0,1,2') from error


if __name__ == "__main__":
    sys.exit(main())
