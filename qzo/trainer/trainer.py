"""QZO and MeZO in the Trainer of transformers."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoints.identity import BASE, MODEL, base_identity
from qzo.checkpoints.save import save_into
from qzo.durable import write_tensors
from qzo.errors import QzoError
from qzo.journal import lines
from qzo.journal.journal import Journal
from qzo.live.check import check_live
from qzo.live.scales import scales
from qzo.live.trainable import live_named, scale_group
from qzo.models.origin import origin_of
from qzo.optim.qzo import QZO
from qzo.optim.spsa import Closure, SpsaOptimizer, live_tensors
from qzo.quiet import quiet_libraries
from qzo.trainer.arguments import SHARDED, check_arguments, check_autocast, check_optimizer, check_reference
from qzo.trainer.collate import padding
from qzo.trainer.given import Formatting
from qzo.trainer.resumable import ResumableTrainer
from qzo.trainer.roles import TakenStep, said_to_train
from qzo.trainer.rows import RowsTrainer, is_own, items_in, take_rows
from qzo.training.checkpoints import OPTIMIZER, TRAINED, check, read_trained
from qzo.training.telemetry.prospect import FIRST, Prospect
from qzo.training.tuned.state import put

with quiet_libraries():
    from accelerate.utils.memory import clear_device_cache
    from transformers import Trainer

DEFAULT_COLLATORS = "transformers.data.data_collator"  # the module of those that Trainer takes by itself


class QZOTrainer(RowsTrainer):
    """transformers' Trainer with zeroth-order steps: two evaluations of the loss for each, no backward pass.

        trainer = qzo.QZOTrainer(model, TrainingArguments("out", learning_rate=1e-5), train_dataset=data)
        trainer.train(resume_from_checkpoint=...)

    Callbacks, schedulers, evaluation, logging, early stopping and checkpoints are Trainer's. What differs:

    - The optimizer is QZO on the scales of linear layers (not of an 8-bit vocabulary), offsets with them, as in
      `qzo train`, with the arguments' `learning_rate` and `seed`, or the QZO or MeZO given as
      `optimizers=(optimizer, None)`. Other optimizers of the arguments are not used.
    - A step is taken when the last of its micro-batches is there; all of them are evaluated with one z. So Trainer's
      on_pre_optimizer_step and on_optimizer_step both come after it.
    - Before the first step `qzo.check_live` proves, on its first micro-batch, that the scales are live (QZO).
    - Rows whose `input_ids` differ in length are padded (labels with -100) where no `data_collator` is given.
    - Raw rows, in the shapes that TRL documents and text with labels, are encoded as in `qzo train --data`, with the
      loss and the scores of their kind: see `qzo.trainer.rows`.
    - The model stays in eval mode: both evaluations must see the same function.
    - Logs hold d of the last step, the share of clipped steps since the last log and the number of skipped ones, and
      no norm of a gradient.
    - A checkpoint holds the live scales (`trained.safetensors`) and the optimizer's masters, not the whole model: the
      model to resume with is loaded as at first. `qzo.export(checkpoint, out)` and `save_model(folder)` write whole
      models. A resumed run ends with the very scales of an uninterrupted one.

    Args:
        model: from `qzo.load`, quantized; a model that transformers' own quantizers made is refused by Trainer.
        qzo_options: for the QZO that is made: eps, clip_threshold, relative, betas, ...
        journal: file for a `qzo.Journal`, QZO only; a resume from a checkpoint cuts it there.
        formatting_func: raw row -> the text that is learnt in its place.
        data_options: of raw rows: columns, label_words, max_length, packing, centering; before those of an SFTConfig.
        arguments: of Trainer.

    Raises QzoError for an optimizer without closures, several processes, arguments that a training without gradients
    cannot honour (see `qzo.trainer.arguments`; of others that make no difference it warns), and tensors that are not
    on the device of the arguments.
    """

    def __init__(
        self,
        *arguments: Any,
        qzo_options: dict[str, Any] | None = None,
        journal: str | os.PathLike[str] | None = None,
        formatting_func: Formatting | None = None,
        data_options: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        self.qzo_options, self.journal_path = qzo_options or {}, journal
        self.journal: Journal | None = None
        self.zeroth_order: SpsaOptimizer | None = None
        self._batches: list[tuple[dict[str, Any], Any]] = []
        self._clipped: list[bool] = []
        self._checked = False
        self._prospect: Prospect | None = None
        self._base: dict[str, str] | None = None
        signature = inspect.signature(_mixed_in(type(self)).__init__)
        bound = signature.bind_partial(self, *arguments, **named)
        given = bound.arguments
        if given.get("args") is not None:
            check_arguments(given["args"])
        check_optimizer(given, self.qzo_options)
        if "ref_model" in signature.parameters:
            check_reference(given)
        if _mixed_in(type(self)) is Trainer:
            self._encoding = take_rows(given, data_options or {}, formatting_func)
        else:
            given |= _for_mixed(type(self), signature, formatting_func, data_options)
        super().__init__(*bound.args[1:], **bound.kwargs)
        if self.args.world_size > 1:
            raise QzoError(f"world_size={self.args.world_size}: {SHARDED}")
        check_autocast(self.args, self.model)
        collate: Any = self.data_collator
        if given.get("data_collator") is None and collate.__module__ == DEFAULT_COLLATORS:
            tokenizer: Any = self.processing_class
            pad_id = getattr(tokenizer, "pad_token_id", None) or 0
            self.data_collator = padding(collate, pad_id, getattr(tokenizer, "padding_side", "right") == "left")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """QZO on linear layers unless an optimizer was given. Raises QzoError for one that needs gradients."""
        if self.zeroth_order is not None and self.optimizer is not None:
            if self.journal is not None:
                raise QzoError("the journal was closed when train() ended; make a new QZOTrainer to go on")
            return self.optimizer
        target: Any = self.model if model is None else model
        made = self.optimizer
        if made is None:
            options: dict[str, Any] = {"lr": self.args.learning_rate, "seed": self.args.seed}
            made = QZO([scale_group(target, scales(target))], **{**options, **self.qzo_options})
        if not isinstance(made, SpsaOptimizer):
            raise QzoError(f"a {type(made).__name__} needs gradients; give a qzo.QZO or qzo.MeZO, or no optimizer")
        places = {tensor.device.type for _, _, _, tensor in made._tensors()}
        if places != {self.args.device.type}:
            raise QzoError(
                f"the optimizer's tensors are on {places}, the Trainer on {self.args.device}; load them there"
            )
        if isinstance(made, QZO):
            made.foresees = False  # as `_foresee` does, which knows how many steps there are
        self.zeroth_order = made
        if self.journal_path is not None:
            self._open_journal(target, made)
        self.optimizer = TakenStep(made)
        return self.optimizer

    def _open_journal(self, model: nn.Module, optimizer: SpsaOptimizer) -> None:
        if not isinstance(optimizer, QZO):
            raise QzoError(f"a Trainer's journal is for QZO, not for {type(optimizer).__name__}; leave it out")
        assert self.journal_path is not None
        self.journal = Journal(self.journal_path, model, optimizer)
        if self._begins_anew:
            self.journal.resume(0)
        elif self.journal.steps and not self._resumes:
            self.journal.close()
            raise QzoError(
                f"{self.journal_path} holds {self.journal.steps} steps; train(resume_from_checkpoint=True) goes on "
                "with them, another file begins a new run"
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Collect a micro-batch; with the last one of a step, take it. Returns the step's loss then, 0 before."""
        model.eval()
        prepared = self._prepare_inputs(inputs)
        self._batches.append((prepared, num_items_in_batch))
        if not self.accelerator.sync_gradients:
            return torch.tensor(0.0, device=self.args.device)
        closures = self._losses_of(model)
        assert self.zeroth_order is not None
        if not self._checked and isinstance(self.zeroth_order, QZO):
            check_live(model, closures[0], self.args.seed)
        self._checked = True
        loss = self.zeroth_order.step(closures)
        if self.journal is not None:
            self.journal.record()
        last = self.zeroth_order.last
        self._clipped.append(last is not None and last.clipped)
        self._foresee(loss, self.zeroth_order)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return torch.tensor(loss, device=self.args.device)

    def _foresee(self, loss: float, optimizer: SpsaOptimizer) -> None:
        """Warn once where the lr, which is Trainer's 5e-5 unless one is named, will not do."""
        group, last = optimizer.param_groups[0], optimizer.last
        if self._prospect is None:
            self._prospect = Prospect(self.state.max_steps, group.get("clip_threshold") or math.inf)
        is_plain = not group.get("momentum") and group.get("betas") is None and not optimizer.estimator.normalize
        if last is None or optimizer.steps > FIRST or last.skipped or not is_plain:
            return
        notice = self._prospect.after(loss, last.directional_derivative, group["lr"])
        if notice is not None and not optimizer.lr_told:
            warnings.warn(notice, stacklevel=2)

    def _losses_of(self, model: nn.Module) -> list[Closure]:
        """The losses of a step's micro-batches, which are let go; of raw rows, each weighs as many items as it has."""
        batches, self._batches = self._batches, []
        if all(is_own(inputs) for inputs, _ in batches):
            items = sum(items_in(inputs) for inputs, _ in batches)
            batches = [(inputs, items) for inputs, _ in batches]
        return [partial(self._loss_of, model, inputs, items) for inputs, items in batches]

    def _loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """A micro-batch's share of the step's loss, as Trainer's own training_step has it."""
        with self.compute_loss_context_manager(), said_to_train(self.model):  # it may take labels out of its inputs
            loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        loss = loss.mean() if self.args.n_gpu > 1 else loss
        scaled: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # transformers >= 5.23
        if is_own(inputs):
            scaled = True
        elif scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        share: Tensor = loss if scaled else loss / self.current_gradient_accumulation_steps
        return share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's; training logs tell d, clipped and skipped steps in place of a gradient's norm."""
        if self.zeroth_order is not None and "loss" in logs and "learning_rate" in logs:
            logs.pop("grad_norm", None)
            last = self.zeroth_order.last
            if last is not None:
                logs["directional_derivative"] = last.directional_derivative
            logs["clipped_share"] = sum(self._clipped) / max(1, len(self._clipped))
            logs["skipped_steps"] = self.zeroth_order.skipped_steps
            self._clipped.clear()
            with said_to_train(self.model):
                super().log(logs, start_time)
            return
        super().log(logs, start_time)

    def train(self, *arguments: Any, **named: Any) -> Any:
        """As `ResumableTrainer`'s; the journal is synced and closed at the end, whatever happens."""
        try:
            return super().train(*arguments, **named)
        finally:
            self._batches.clear()
            if self.journal is not None:
                self.journal.close()

    def _unlike(self, about: dict[str, Any], step: int) -> str | None:
        """Why this run cannot go on from a checkpoint: another model, or not what its journal tells; else None."""
        begun = about.get(BASE)
        if begun is not None and self._identity().get(BASE, begun) != begun:
            return f"it was made with another model than {self._identity()[MODEL]} ({about[MODEL]}); load that one"
        if self.journal_path is None:
            return None
        path = Path(self.journal_path)
        recorded = lines.read(path) if path.is_file() else None
        steps = 0 if recorded is None else recorded.steps
        if step > steps:
            return f"{path} holds {steps} steps; give the journal it was made with, or none"
        checksum = None if recorded is None else f"{recorded.crcs[step]:08x}"
        if checksum is not None and about.get("journal_crc", checksum) != checksum:
            return f"{path} is the journal of another run; give the one it was made with, or none"
        return None

    def _identity(self) -> dict[str, str]:
        """Which model this is; read from its files once."""
        if self._base is None:
            model: Any = self.model
            self._base = base_identity(model)
        return self._base

    def _about(self) -> dict[str, Any]:
        """What the seal of a checkpoint says of the run it belongs to; the journal is on disk before it."""
        journal = {}
        if self.journal is not None:
            self.journal.sync()
            journal["journal_crc"] = self.journal.checksum
        return {**super()._about(), **self._identity(), **journal}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model in the format it came in: the GPTQ or AWQ layout, or a .gguf file.

        Trainer's checkpoints, which it writes with `_internal_call`, get the trained tensors alone.
        With MeZO all is as in Trainer. Raises QzoError for what the layout cannot hold.
        """
        if self.zeroth_order is not None and not isinstance(self.zeroth_order, QZO):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        if not _internal_call or self.zeroth_order is None:
            model: Any = self.model
            save_into(model, folder, self.processing_class)
            return
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {**self._identity(), "steps": str(self.zeroth_order.steps), "whole": "1"}
        write_tensors(folder / TRAINED, {**self._begun_with(), **live_tensors(self.zeroth_order)}, metadata)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _begun_with(self) -> dict[str, Tensor]:
        """Of a model that `qzo.load` read from a run, what that had tuned: not in the files that a checkpoint names."""
        model: Any = self.model
        origin = origin_of(model)
        live = live_named(model) if origin is not None and origin.tuned else {}
        return {} if origin is None else {name: live[name].detach() for name in origin.tuned if name in live}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer calls this before the optimizer is there; with scales, all is in the optimizer's state."""
        folder = Path(resume_from_checkpoint)
        if not (folder / TRAINED).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif not (folder / OPTIMIZER).is_file():
            raise QzoError(
                f"{folder} has no {OPTIMIZER} (save_only_model=True?), so a run cannot go on from it; take another "
                "checkpoint"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, which restores the scales too; the journal is cut where the checkpoint was made."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.zeroth_order is not None and (Path(checkpoint) / TRAINED).is_file():
            model: Any = self.model
            trained, kept = live_tensors(self.zeroth_order), read_trained(Path(checkpoint))[0]
            put(model, {name: tensor for name, tensor in kept.items() if name not in trained}, Path(checkpoint))
        if self.journal is not None and self.zeroth_order is not None:
            self.journal.resume(self.zeroth_order.steps)

    @torch.no_grad()
    def _load_best_model(self) -> None:
        """As Trainer's, from the trained tensors; masters follow, so that training can go on from there."""
        best = Path(self.state.best_model_checkpoint or "")
        check(best)
        if not (best / TRAINED).is_file():
            super()._load_best_model()
            return
        assert self.zeroth_order is not None
        own = live_tensors(self.zeroth_order)
        for name, value in read_trained(best)[0].items():
            if name in own:
                own[name].copy_(value)
        for _, _, _, tensor in self.zeroth_order._tensors():
            self.zeroth_order.state[tensor]["master"].copy_(tensor)


def _for_mixed(kind: type, signature: inspect.Signature, formatting_func: Any, data_options: Any) -> dict[str, Any]:
    """What a trainer that is mixed in gets of the arguments for raw rows, which it encodes by itself."""
    if data_options:
        raise QzoError(
            f"data_options={data_options}: {kind.__name__} encodes rows as its configuration says; leave them out"
        )
    if formatting_func is None:
        return {}
    if "formatting_func" not in signature.parameters:
        raise QzoError(f"{kind.__name__} takes no formatting_func; leave it out")
    return {"formatting_func": formatting_func}


def _mixed_in(kind: type) -> Any:
    """The class whose arguments those of QZOTrainer are: a trainer of TRL that is mixed in, else Trainer."""
    after = kind.__mro__[kind.__mro__.index(ResumableTrainer) + 1 :]
    return next(parent for parent in after if "__init__" in vars(parent))
