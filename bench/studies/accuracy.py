"""How well each method learns: `python -m bench.studies.accuracy --out FILE` trains them all on one task, seed by seed.

A row of the report is a model (16-bit, or 4-bit by round-to-nearest, by GPTQ or as its GGUF has it) and a way to train
it. Every row and seed is a run of `qzo train` in a folder of its own under --work: stopped at any moment, the command
goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import qzo
from bench.cases.weights import gguf_source, unpack
from bench.commands.parser import Parser
from bench.records.environment import environment
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer
from qzo.checkpoints.save import save
from qzo.durable import replace_file, whole_folder
from qzo.errors import QzoError
from qzo.quantizers.calibration import token_batches
from qzo.training.run import METRICS
from qzo.training.settings import ZEROTH_ORDER, TrainSettings
from qzo.training.task import train_task

MODEL, TASK = "smollm2-135m", "rotten-tomatoes"
SIXTEEN, RTN, GPTQ = "16-bit", "4-bit round-to-nearest", "4-bit GPTQ"
GGUF = "4-bit GGUF"  # MODEL's own file, whose weights the 16-bit model has too
GROUP_SIZE = 32
CALIBRATION = {"samples": 128, "seq_len": 128}  # of the training texts, without their labels
BATCH_SIZE = 16
PASSES = 1600  # forward passes over a batch that every zeroth-order run may take
FIRST_ORDER_STEPS = 63  # of 16 examples: one pass over 1,000
BLOCK = 10  # steps whose losses make one point of the learning curve
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One line of the report: what is trained, how, and under which name. Without `method` it is zero-shot."""

    name: str
    model: str
    method: str | None = None
    calibrated: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def settings(self, seed: int) -> TrainSettings:
        """What `qzo train` is told."""
        assert self.method is not None
        options = {"batch_size": BATCH_SIZE, "scheduler": "linear", "dtype": "float32", **self.options}
        one_step = TrainSettings(self.method, steps=1, **options)
        steps = PASSES // passes(one_step) if self.method in ZEROTH_ORDER else FIRST_ORDER_STEPS
        return TrainSettings(self.method, steps=steps, eval_every=-(-steps // 2), seed=seed, **options)

    def folder(self, seed: int) -> str:
        """Name of the run's folder."""
        return f"{self.name.lower().replace(' ', '-').replace(',', '')}-{seed}"


# found as reports/studies/accuracy/settings.md tells
LAYERS = {"layers": "15-21", "directions": 8, "estimator": "one-sided", "centering": 0.5}
RELATIVE = {"relative": True, "eps": 1e-2, "clip_threshold": 1.0}
ROWS = (
    Row("zero-shot 16-bit", SIXTEEN),
    Row("zero-shot round-to-nearest", RTN),
    Row("zero-shot GPTQ", GPTQ),
    Row("zero-shot GPTQ, calibrated", GPTQ, calibrated=True),
    Row("zero-shot GGUF", GGUF),
    Row("zero-shot GGUF, calibrated", GGUF, calibrated=True),
    Row("QZO GPTQ", GPTQ, "qzo", options={**LAYERS, **RELATIVE, "lr": 0.25}),
    Row("QZO GGUF", GGUF, "qzo", options={**LAYERS, **RELATIVE, "lr": 0.25}),
    Row("MeZO 16-bit", SIXTEEN, "mezo", options={**LAYERS, "lr": 4e-3, "clip_threshold": 8.0}),
    Row("QZO round-to-nearest", RTN, "qzo", options={**LAYERS, **RELATIVE, "lr": 0.25}),
    Row("full fine-tuning", SIXTEEN, "ft", options={"lr": 2e-5}),
    Row("LoRA", SIXTEEN, "lora", options={"lr": 1e-3}),
    Row("QZO GPTQ, Adam", GPTQ, "qzo", options={**LAYERS, **RELATIVE, "lr": 0.03, "update": "adam"}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what --out lacks, and write it there; 0, or 2 and one line on stderr."""
    parser = Parser(
        prog="python -m bench.studies.accuracy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it holds already is not run again")
    parser.add_argument("--work", type=Path, default=Path("results/accuracy"), help="folder of models and runs")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", help="comma-separated folder names, e.g. qzo-gptq; default all")
    parser.add_argument("--threads", type=int, help="of PyTorch; default all cores")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        if options.threads:
            torch.set_num_threads(options.threads)
        for seed in _numbers(options.seeds):
            models = Models(options.work, seed)
            for row in _chosen(options.rows):
                if not _has(options.out, row, seed):
                    log.info("%s, seed %d", row.name, seed)
                    add(options.out, measure(row, seed, models, options.work))
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(row: Row, seed: int, models: Models, work: Path) -> dict[str, Any]:
    """The entry of one row and seed: what was run, its test result, and how it came there."""
    machine = environment()
    started = time.monotonic()
    entry: dict[str, Any] = {"row": row.name, "model": row.model, "seed": seed, "calibrated": row.calibrated}
    source = str(models.path(row.model))
    if row.method is None:
        entry |= {"settings": None, "test": zero_shot(source, seed, row.calibrated), "curve": [], "forward_passes": 0}
    else:
        settings, folder = row.settings(seed), work / row.folder(seed)
        trained, test = train_task(source, TASK, settings, folder, resume=folder.exists())
        curve = list(learning_curve(folder / METRICS))
        entry |= {"settings": settings.to_json(), "test": test, "best_step": trained.best_step, "curve": curve}
        entry |= {"steps": trained.steps, "skipped": trained.skipped, "forward_passes": passes(settings)}
    seconds = round(time.monotonic() - started, 1)  # of this process: less where a stopped run was taken up again
    machine = {**machine, "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return {**entry, "seconds": seconds, "environment": machine}


def zero_shot(source: str, seed: int, calibrated: bool) -> dict[str, Any]:
    """The model as it is, on the test examples of a seed; calibrated: by the label words' prior on training texts."""
    task = tasks.get(TASK)
    splits, encoder = task.splits(seed=seed), tasks.Encoder(task, load_tokenizer(source))
    model: Any = load(source, torch.float32, dequantize=False).eval()  # a GGUF's blocks as they are
    prior = tasks.label_prior(model, encoder, splits["train"]) if calibrated else None
    return tasks.evaluate(model, encoder, splits["test"], prior=prior)


def passes(settings: TrainSettings) -> int:
    """Forward passes over a batch that the training took, without validation; backward passes are not among them."""
    if settings.method not in ZEROTH_ORDER:
        return settings.steps
    two_sided = settings.estimator == "two-sided"
    return settings.steps * (2 * settings.directions if two_sided else settings.directions + 1)


def learning_curve(metrics: Path) -> Iterator[dict[str, Any]]:
    """A point for every validation, and one for the mean loss of every ten steps."""
    losses: list[float] = []
    for line in metrics.read_text(encoding="utf-8-sig").splitlines():
        entry = json.loads(line)
        if "validation" in entry:
            found = entry["validation"]
            yield {"step": entry["step"], "accuracy": found["accuracy"], "validation_loss": round(found["loss"], 4)}
        elif entry["loss"] is not None:
            losses.append(entry["loss"])
        if len(losses) == BLOCK:
            yield {"step": entry["step"], "loss": round(sum(losses) / BLOCK, 4)}
            losses.clear()


class Models:
    """The model of a seed in 16 and in 4 bits, as folders that are made when first asked for.

    GPTQ is calibrated on the training texts of the seed, so that it has seen no text that is tested.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed

    def path(self, name: str) -> Path:
        """Folder of one of the models, or the GGUF file."""
        if name == GGUF:
            return Path(str(gguf_source(MODEL).weights))
        slug = name.replace(" ", "-").lower() + (f"-{self.seed}" if name == GPTQ else "")
        folder = self.work / "models" / slug
        if not folder.exists():
            whole_folder(folder, lambda partial: self._make(name, partial))
        return folder

    def _make(self, name: str, folder: Path) -> None:
        if name == SIXTEEN:
            unpack(gguf_source(MODEL), folder)
            return
        source_folder = self.path(SIXTEEN)
        model, tokenizer = load(source_folder, torch.bfloat16), load_tokenizer(str(source_folder))
        texts = "\n".join(example.text for example in tasks.get(TASK).splits(seed=self.seed)["train"])

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        if name == GPTQ:
            qzo.quantize(model, 4, GROUP_SIZE, method="gptq", calibration=token_batches(encode, texts, **CALIBRATION))
        else:
            qzo.quantize(model, 4, GROUP_SIZE)
        save(model, folder)
        tokenizer.save_pretrained(folder)


def add(file: Path, entry: dict[str, Any]) -> None:
    """Put an entry into the record, in place of one of the same row and seed; sorted, so that order says nothing."""
    order = [row.name for row in ROWS]
    kept = [old for old in read(file) if (old["row"], old["seed"]) != (entry["row"], entry["seed"])]
    entries = sorted([*kept, entry], key=lambda e: (order.index(e["row"]) if e["row"] in order else 99, e["seed"]))
    text = json.dumps({"model": MODEL, "task": TASK, "group_size": GROUP_SIZE, "entries": entries}, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda path: path.write_text(text, encoding="utf-8"))


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a record; none where there is no file."""
    return list(json.loads(file.read_text(encoding="utf-8-sig"))["entries"]) if file.exists() else []


def _has(file: Path, row: Row, seed: int) -> bool:
    entries = [entry for entry in read(file) if (entry["row"], entry["seed"]) == (row.name, seed)]
    if row.method is None:
        return bool(entries)
    settings, defaults = row.settings(seed).to_json(), TrainSettings(row.method).to_json()
    return any({**defaults, **entry["settings"]} == settings for entry in entries)  # what an older one lacks: default


def _chosen(names: str | None) -> list[Row]:
    known = {row.folder(0).removesuffix("-0"): row for row in ROWS}
    wanted = list(known) if names is None else names.split(",")
    for name in wanted:
        if name not in known:
            raise QzoError(f'unknown row "{name}"; rows are {", ".join(known)}: choose one')
    return [known[name] for name in wanted]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise QzoError(f'--seeds "{text}" is not a comma-separated list of whole numbers; give e.g. 0,1,2') from error


if __name__ == "__main__":
    sys.exit(main())
