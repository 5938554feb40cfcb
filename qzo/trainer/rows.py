"""Raw rows in a Trainer: encoded, batched, learnt and scored as `qzo train --data` does it."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoints.tokenizer import load_tokenizer
from qzo.errors import NotFinite, QzoError
from qzo.models.loss import IGNORED
from qzo.models.origin import origin_of
from qzo.models.positions import count_positions
from qzo.quiet import quiet_libraries
from qzo.tasks.encoding import Batch
from qzo.tasks.objective import Objective, objective
from qzo.tasks.own import kinds
from qzo.tasks.own.task import METRICS, SequenceTask, recognised
from qzo.tasks.source.row import Row
from qzo.trainer.given import Formatting, is_raw, rows_of
from qzo.trainer.resumable import ResumableTrainer
from qzo.trainer.sft import DataOptions, data_options

with quiet_libraries():
    from transformers.trainer_pt_utils import LengthGroupedSampler
    from transformers.trainer_utils import EvalLoopOutput

OWN = ("choices", "targets")  # what a batch of raw rows has beside what a model takes; one of the two


class EncodedRows(torch.utils.data.Dataset[Any]):
    """Raw rows as a Trainer takes them: each is what batches of `objective` are made of."""

    def __init__(self, made: Objective, rows: Sequence[Any]) -> None:
        self.objective, self.rows = made, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


class RowEncoding:
    """How the raw rows of a trainer are read: the task that the first data set tells, and the model's tokenizer.

    Args:
        model: whose positions bound a row.
        tokenizer: its own; None, that of the files it was loaded from.
        options: how rows are encoded.
        formatting_func: row -> text; None, rows are recognised by their fields.
        metric: of the arguments, "eval_" before it or not; where it is one of the kind, it is measured.
        seed: of a shuffle.

    Raises QzoError for a model that came without a tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        options: DataOptions,
        formatting_func: Formatting | None = None,
        metric: str | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer or _tokenizer_of(model), options
        self.formatting_func, self.metric, self.seed = formatting_func, metric, seed
        self.task: Any = None
        self._first: EncodedRows | None = None

    def encoded(self, dataset: Any, name: str) -> EncodedRows:
        """The rows of a data set; the first that comes tells kind and labels. Raises QzoError with the row."""
        rows = self._renamed(rows_of(dataset, name, self.formatting_func))
        if not rows:
            raise QzoError(f"{name} has no rows; give some")
        if self.task is None:
            self.task = self._recognised(rows, name)
        made = objective(self.task, self.tokenizer, self.options.max_length).fitted(self._longest())
        examples = [example for row in rows for example in self.task.read(row)]
        if self.options.shuffle:
            random.Random(self.seed).shuffle(examples)
        found = EncodedRows(made, made.rows(examples))
        for notice in made.notices({name: examples}):
            warnings.warn(notice, stacklevel=2)
        self._first = self._first or found
        return found

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """A batch of training rows: tensors by name."""
        assert self._first is not None
        return {name: part for name, part in vars(self._first.objective.batch(rows)).items() if part is not None}

    def loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The mean loss of a batch that `collate` made."""
        assert self._first is not None
        batch: Any = Batch(**inputs)
        return self._first.objective.loss(model, batch, self.options.centering)

    def _renamed(self, rows: list[Row]) -> list[Row]:
        columns = self.options.columns if self.formatting_func is None else {}
        if self.options.of_config and rows:  # of a name that is a default, rows of other kinds know nothing
            columns = {field: name for field, name in columns.items() if name in rows[0].fields}
        return kinds.renamed(rows, columns)

    def _recognised(self, rows: Sequence[Row], name: str) -> Any:
        """The task, with what the options say of prompts, users' turns and packing."""
        options = self.options
        kind = kinds.kind_of(rows)
        wish = (self.metric or "").removeprefix("eval_")
        metric = wish if wish in METRICS[kind] else None
        task = recognised(rows, name, options.columns, options.label_words, metric)
        if not isinstance(task, SequenceTask):
            return task
        whole = {kinds.COMPLETION: options.whole_completions, kinds.CHAT: options.whole_messages}
        packed = task.packed if options.packing is None else options.packing
        if packed and kind is not kinds.TEXT:
            raise QzoError(f"packing=True is for plain text, and {name} holds {kind.text}; leave it out")
        return replace(task, packed=packed, whole=whole.get(kind, False))

    def _longest(self) -> int | None:
        """Tokens that a row may have. Raises QzoError for more than the model has positions."""
        asked, most = self.options.max_length, count_positions(self.model)
        if asked is None or most is None or asked <= most:
            return most if asked is None else asked
        if self.options.of_config:
            return most
        raise QzoError(f"max_length={asked} is more than the {most} positions of the model; choose {most} or less")


def take_rows(
    given: dict[str, Any], asked: Mapping[str, Any], formatting_func: Formatting | None
) -> RowEncoding | None:
    """Exchange raw data sets among the arguments of a Trainer for encoded ones, with a collator and a tokenizer.

    Args:
        given: name -> argument; changed where rows are raw and no data_collator is there that would encode them.
        asked: options of the user's own, see `qzo.trainer.sft.ASKED`.
        formatting_func: row -> text, or None.

    Returns how rows are encoded; None where none are raw. Raises QzoError with the row, and for options of raw rows
    beside tokenised ones.
    """
    names = [name for name in ("train_dataset", "eval_dataset") if any(map(is_raw, _parts(given.get(name)).values()))]
    if not names or given.get("data_collator") is not None:
        if asked or formatting_func is not None:
            raise QzoError("data_options and formatting_func are for raw rows, and these are tokenised; leave them out")
        return None
    arguments = given.get("args")
    options = data_options(arguments, asked, given)
    metric, seed = getattr(arguments, "metric_for_best_model", None), getattr(arguments, "seed", 0)
    encoding = RowEncoding(given["model"], given.get("processing_class"), options, formatting_func, metric, seed)
    for name in names:
        parts = {
            key: encoding.encoded(part, f'{name} "{key}"' if key else name) for key, part in _parts(given[name]).items()
        }
        given[name] = parts if isinstance(given[name], dict) else parts[""]
    given |= {"data_collator": encoding.collate, "processing_class": encoding.tokenizer}
    return encoding


def _parts(dataset: Any) -> dict[str, Any]:
    """Data sets by name, of an evaluation on several."""
    return dataset if isinstance(dataset, dict) else {"": dataset}


class RowsTrainer(ResumableTrainer):
    """ResumableTrainer that takes raw rows as well: see `QZOTrainer`."""

    _encoding: RowEncoding | None = None  # of raw rows; None where all are tokenised

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's, for raw rows too."""
        return super().get_eval_dataloader(self._encoded(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As Trainer's, for raw rows too."""
        return super().get_test_dataloader(self._encoded(test_dataset, "test_dataset"))

    def _encoded(self, dataset: Any, name: str) -> Any:
        encoding = self._encoding
        return dataset if encoding is None or not is_raw(dataset) else encoding.encoded(dataset, name)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As Trainer's; the lengths of raw rows are known."""
        data = self.train_dataset if train_dataset is None else train_dataset
        strategy = str(getattr(self.args, "train_sampling_strategy", "random"))
        if not isinstance(data, EncodedRows) or strategy in ("random", "sequential"):
            return super()._get_train_sampler(train_dataset)
        if strategy != "group_by_length":
            raise QzoError(f'train_sampling_strategy="{strategy}" is for tokenised rows; leave it out')
        lengths = [data.objective.length(row) for row in data.rows]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=lengths)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As Trainer's; of raw rows, the loss of their kind, and their share of it where items are counted."""
        if self._encoding is None or not is_own(inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._encoding.loss(model, inputs)
        if num_items_in_batch is not None:
            loss = loss * items_in(inputs) / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's; of raw rows, the scores of `qzo eval`, and no predictions."""
        data = dataloader.dataset
        if not isinstance(data, EncodedRows):
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self.callback_handler.eval_dataloader = dataloader
        model: Any = self.model
        model.to(self.args.device)
        try:
            result = data.objective.evaluate(model, data.rows, self.args.eval_batch_size, self._watch)
        except NotFinite:
            if not self.state.global_step:
                raise
            result = {"loss": math.nan, data.objective.task.metric: math.nan}
        scores = {f"{metric_key_prefix}_{name}": value for name, value in result.items() if isinstance(value, float)}
        nothing: Any = None
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=scores, num_samples=len(data))

    def _watch(self, done: int, count: int) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)


def is_own(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch is of raw rows."""
    return any(name in inputs for name in OWN)


def items_in(inputs: Mapping[str, Any]) -> int:
    """What a batch's mean loss is the mean over: learnt tokens, or examples where answers are chosen or compared."""
    targets, labels = inputs.get("targets"), inputs["labels"]
    by_tokens = targets is not None and len(targets) == len(labels) and "choices" not in inputs
    return int((targets != IGNORED).sum()) if by_tokens and targets is not None else len(labels)


def _tokenizer_of(model: nn.Module) -> Any:
    origin = origin_of(model)
    if origin is None:
        raise QzoError("raw rows need the tokenizer of the model; give it as processing_class")
    return load_tokenizer(origin.path)
