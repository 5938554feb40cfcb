"""Training a model on a task: what `qzo train` does."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo.checkpoints.identity import place_of
from qzo.checkpoints.tokenizer import load_tokenizer
from qzo.durable import replace_file
from qzo.errors import NotFinite, QzoError
from qzo.kernels import asked
from qzo.live.check import check_live
from qzo.models.positions import row_length
from qzo.models.prefix import SharedPrefix
from qzo.optim.noise import mix_seed
from qzo.optim.ranks import Ranks
from qzo.regular import is_there
from qzo.signals import Stopped, held, interruptible
from qzo.tasks.own.prompts import RewardBatch
from qzo.tasks.summary import described
from qzo.training.auto.settle import layers_of, rows_of, settle
from qzo.training.batches import batch_numbers
from qzo.training.learners import check_eps, check_model, make_learner
from qzo.training.loop import Trained, train
from qzo.training.own import OwnData, fingerprint
from qzo.training.run import RESULT, RUN, TEST, Result, Run, check_folder, dtype_of, read_run
from qzo.training.settings import AUTO, QUANTIZED, TrainSettings
from qzo.training.telemetry.memory import packed_as, resident_bytes
from qzo.training.telemetry.progress import Progress, lines_of, tell
from qzo.training.telemetry.writers import writers
from qzo.training.tuned.start import start_from
from qzo.training.tuned.state import put_best


def train_task(
    source: str,
    task_name: str | None,
    settings: TrainSettings,
    out: str | os.PathLike[str],
    data: str | None = None,
    resume: bool = False,
    own: OwnData | None = None,
    device: str | None = None,
    wandb: str | None = None,
    moved: str | None = None,
    ranks: Ranks | None = None,
) -> tuple[Trained, Result]:
    """Train a model on a task and test its best state; returns how training ended, and the result of the test.

    `out` then holds the run (see `qzo.training.run`) and `result.json`, both of what is returned.

    Args:
        source: of the model, as in `qzo.load`; quantized for qzo and qlora, which take a .gguf file packed. Of a run,
            its best state is what the new one begins with, and keeps.
        task_name: of `qzo.tasks`; its examples are split by `settings.seed`. None where there is `own`.
        settings: how.
        out: folder of the run, new or empty, or with `resume` one to go on with.
        data: folder of the task's files, None for where the task has them from.
        resume: go on where the run ended.
        own: data of one's own in the place of a task. Without a test split the test's result is empty, or, where
            answers are compared that the model writes, that of the validation split.
        device: where to train; None, the GPU if there is one.
        wandb: project of Weights & Biases that gets the run's numbers and settings; None, none does.
        moved: where the model of a run that is given as `source` lies now; None, where it lay.
        ranks: that take each step together, see `qzo.training.together`; None, this process is alone.

    Raises QzoError for wrong input, a model whose logits are not finite, losses that are not, and a full disk; what is
    on disk can be resumed. Nothing is, where a run fails before its first validation is done.
    """
    tasks: Any = import_module("qzo.tasks")
    out = Path(out)
    about: Result = own.about() if own else {"task": task_name, "data": data if data is None else place_of(data)}
    if resume and is_there(out / RUN):
        settings = settings.as_begun(read_run(out)["settings"])
    check_folder(out, settings, about, resume)  # before a large model is read
    start = start_from(source, out, resume, moved)
    about |= start.about
    check_folder(out, settings, about, resume)
    task = tasks.from_data(**own.options()) if own else tasks.get(task_name, data_dir=data)
    splits = task.splits(seed=settings.seed)
    if own:
        about["rows"] = fingerprint(splits)
        check_folder(out, settings, about, resume)
    if settings.centering and not task.words:
        raise QzoError(f"centering={settings.centering} is for label words, and {task.name} has none; leave it out")
    objective = tasks.objective(task, load_tokenizer(start.model), settings.max_length)
    for examples in splits.values():  # what cannot be encoded is told before a large model is read
        objective.rows(examples)
    tell(f"loading {source}")
    packed = settings.method in QUANTIZED
    model: Any = start.load(dtype_of(asdict(settings)), device or _device(), packed).eval()
    resumed = out if resume else None
    settled = layers_of(model, settings, bool(task.words), resumed)
    check_model(model, settled, source)
    if not (out / RUN).is_file():
        check_eps(model, settled)
    work = _Work(objective.fitted(row_length(model, settings.max_length, source)), model, splits, settled)
    settled = work.settings = rows_of(settled, work.tokens, bool(task.words), resumed)
    for line in tasks.summary(task, splits, work.objective, work.rows) if own else ():
        tell(line)
    for notice in work.objective.notices(splits):
        tell(f"notice: {notice}")
    first = 0 if own and own.reward else (settled.layer_range or (0, 0))[0]  # a cache remembers the layers below too
    run = Run(out, settings, about, task.metric, resume)
    try:
        start.keep(out)
    except QzoError:
        run.discard_unless_begun()
        run.close()
        raise
    run.settle({name: getattr(settled, name) for name in ("layers", "batch_size") if getattr(settings, name) == AUTO})
    with interruptible():
        loss = SharedPrefix(model, work.loss, first) if first else work.loss
        trained = _run(source, run, work, loss, wandb, ranks)
        try:
            put_best(model, out)
            test = _tested(work, f"the state of step {trained.best_step}")
        except KeyboardInterrupt as error:
            raise Stopped("stopped while the best state was tested; --resume tests it again", error) from error
        except torch.OutOfMemoryError as error:
            raise _too_little(error) from error
    trained = replace(trained, first_test=run.facts().get(TEST) or {})
    content = json.dumps({**asdict(trained), "test": test}, indent=2) + "\n"
    replace_file(out / RESULT, lambda path: path.write_text(content, encoding="utf-8"))
    return trained, test


def _tested(work: _Work, what: str) -> Result:
    """The result of the test; of the validation split where there is no test, if more is measured at the end."""
    split = "test" if "test" in work.splits else "validation"
    if split == "validation" and not getattr(work.objective.task, "writes", False):
        return {}
    tell(f"testing {what} on {len(work.rows[split]):,} examples")
    return work.evaluate(lines_of(split), split, last=True)


def _baseline(work: _Work) -> Result:
    """What the test gives before the first step. Raises NotFinite."""
    try:
        return _tested(work, "the model before the first step")
    except NotFinite as error:
        raise NotFinite(f"before the first step, {error}") from error


class _Work:
    """A model and the splits of a task, as the loop asks for them."""

    def __init__(self, objective: Any, model: nn.Module, splits: dict[str, list[Any]], settings: TrainSettings) -> None:
        self.objective, self.model, self.splits, self.settings = objective, model, splits, settings
        if prepare := getattr(objective, "prepare", None):  # where candidates are scored
            prepare(model)
        self.device = next(model.parameters()).device
        self.rows = {split: objective.rows(examples) for split, examples in splits.items()}
        train = self.rows["train"]
        self._known = [objective.length(row) for row in train], [getattr(row, "label", 0) for row in train]

    @property
    def tokens(self) -> list[int]:
        """Of each training row in a batch: all of its lines together, as of two answers to a prompt."""
        lines = self._lines
        return [length * lines for length in self._known[0]]

    @property
    def _lines(self) -> int:
        rows = getattr(self.objective.batch(self.rows["train"][:1]), "input_ids", ())
        return max(1, len(rows))

    def facts(self, model: Result, trained: dict[str, torch.Tensor]) -> Result:
        """What is known before the first step, as `facts.json` holds it."""
        reward = getattr(self.objective.task, "reward", None)  # of answers to prompts, which are written
        longest = max(self._known[0]) + (reward.max_new_tokens if reward else 0)
        each = reward.generations if reward else self._lines
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        assert isinstance(self.settings.batch_size, int)
        return {
            "data": described(self.objective.task, self.splits, self.objective, self.rows),
            "model": {**model, "trained": sum(tensor.numel() for tensor in trained.values())},
            "batch": {"rows": self.settings.batch_size * each, "tokens": longest},
            "device": {"type": self.device.type, "name": name},
            "keep_weights": bool(reward and reward.keep_weights),
        }

    def batch_at(self, step: int) -> Any:
        """The batch of a step."""
        assert isinstance(self.settings.batch_size, int)
        numbers = batch_numbers(*self._known, self.settings.batch_size, self.settings.seed, step)
        batch = self.objective.batch([self.rows["train"][number] for number in numbers]).to(self.device)
        return batch.seeded(mix_seed(self.settings.seed, step)) if isinstance(batch, RewardBatch) else batch

    def loss(self, batch: Any) -> torch.Tensor:
        """The training loss of the model as it stands."""
        value: torch.Tensor = self.objective.loss(self.model, batch, self.settings.centering)
        return value

    def evaluate(self, watch: Any, split: str = "validation", last: bool = False) -> Result:
        """The scores of the model as it stands; `watch` is told how far it is."""
        rows, size = self.rows[split], self.settings.eval_batch_size
        return dict(self.objective.evaluate(self.model, rows, size, watch=watch, last=last))


def _run(source: str, run: Run, work: _Work, loss: Any, wandb: str | None, ranks: Ranks | None) -> Trained:
    """Make what the loop needs, and release it whatever happens."""
    try:
        model = {**resident_bytes(work.model), "packed": packed_as(work.model)}  # before adapters are put in
        if open_ := run.settings.undecided:
            settle(run, work.model, lambda: loss(work.batch_at(0)))
        learner = make_learner(work.model, run.settings, run.folder, source, ranks)
        facts = {**work.facts(model, learner.tensors()), TEST: run.facts().get(TEST)}
        run.keep_facts(facts)
        config = {"model": source, **run.settings.to_json()}
        told = writers(run.folder, learner.steps, wandb, config)
        progress = Progress(run.settings.steps, learner.steps, learner.slope_name, told)
        if run.resumed:
            progress.notice(f"going on after step {learner.steps} of {run.settings.steps}")
        if legs := run.settings.legs:
            progress.notice(f"the lr falls anew from step {legs[-1]} on, over {run.settings.steps - legs[-1]} steps")
        advice = asked.advice(work.device, run.settings.noise) if run.settings.method == "qzo" else None
        for notice in (*run.notices, *learner.notices, *([advice] if advice else [])):
            progress.notice(notice)
        try:
            if run.settings.method == "qzo" and learner.steps < run.settings.steps and not open_:
                progress.phase("checking that the scales are live")
                first = work.batch_at(learner.steps)
                check_live(work.model, lambda: loss(first), run.settings.seed, run.settings.layer_range)
            if learner.steps == 0 and facts[TEST] is None:
                run.keep_facts({**facts, TEST: _baseline(work)})
            if learner.steps == 0:
                progress.phase(f"validation before the first step, {len(work.rows['validation']):,} examples")
            return train(learner, run, work.batch_at, loss, lambda: work.evaluate(progress.validating), progress)
        except KeyboardInterrupt as error:
            with held():
                steps = learner.save()
            raise Stopped(f"stopped after {steps} steps; go on with --resume", error) from error
        finally:
            progress.close()
            learner.close()
    except torch.OutOfMemoryError as error:
        run.discard_unless_begun()
        raise _too_little(error) from error
    except QzoError as error:
        if not isinstance(error, Stopped):
            run.discard_unless_begun()
        raise
    finally:
        run.close()


def _too_little(error: torch.OutOfMemoryError) -> QzoError:
    return QzoError(
        f"the device has too little memory: {str(error).partition('. ')[0]}; give a smaller --eval-batch-size, "
        "--batch-size or --max-length (the first may change on a --resume, the others need a new run)"
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
