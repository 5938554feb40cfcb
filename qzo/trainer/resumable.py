"""A Trainer that can be stopped, killed and resumed at any moment: its checkpoints are whole or absent."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from qzo.durable import locked
from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.quiet import quiet_libraries
from qzo.trainer.state import check_callback, check_state
from qzo.training.checkpoints import (
    CUT_SHORT,
    PREFIX,
    SAVING,
    STATE,
    check,
    newest,
    publish,
    rotate,
    seal,
    step_of,
    tidy,
)
from qzo.training.stop import Stop, raise_for, stoppable

with quiet_libraries():
    from transformers import Trainer
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import SaveStrategy


class ResumableTrainer(Trainer):
    """transformers' Trainer, with its checkpoints made whole, and its stops and resumes made exact.

    A child tells by `_about` what the seal of a checkpoint says of the run, and by `_unlike` why a run cannot go on
    from one. For what the methods of Trainer do, and in which order, see there: each of these calls it.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._saving = self._begins_anew = self._resumes = False
        self._resumed: Path | None = None  # the checkpoint
        self._stop = Stop()
        super().__init__(*arguments, **named)

    def _about(self) -> dict[str, Any]:
        return {"step": self.state.global_step}

    def _unlike(self, about: dict[str, Any], step: int) -> str | None:
        return None

    def _unfit(self, place: Path, about: dict[str, Any]) -> str | None:
        """Why this run cannot go on from a whole checkpoint, or None. Raises QzoError for a state that is none."""
        check_state(place, about.get("step"))
        return self._unlike(about, step_of(place))

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **named: Any) -> Any:
        """As Trainer's. `True` goes on from the newest whole checkpoint, and warns of newer ones that are passed over;
        where there is none at all it starts at the first step.

        SIGINT and SIGTERM save a checkpoint after the step at hand, say how to go on, and end in KeyboardInterrupt and
        SystemExit(143). Raises QzoError for a checkpoint that is damaged, of another model, or of another run, and for
        a folder that another process trains into.
        """
        saves = bool(resume_from_checkpoint) or self.args.save_strategy != SaveStrategy.NO
        if not saves or not self._out.is_dir():
            return self._train_alone(resume_from_checkpoint, *arguments, **named)
        with locked(self._out):
            tidy(self._out)
            return self._train_alone(resume_from_checkpoint, *arguments, **named)

    def _train_alone(self, resume_from_checkpoint: str | bool | None, *arguments: Any, **named: Any) -> Any:
        place = self._place_to_resume(resume_from_checkpoint) if resume_from_checkpoint else None
        self._resumes = bool(resume_from_checkpoint)
        self._begins_anew, self._resumed = self._resumes and place is None, place
        try:
            with stoppable() as self._stop:
                result = super().train(None if place is None else str(place), *arguments, **named)
                if self._stop.signal is not None:
                    raise_for(self._stop.signal)
                return result
        finally:
            self._stop = Stop()

    @property
    def _out(self) -> Path:
        return Path(self.args.output_dir or ".")

    def _place_to_resume(self, wish: str | bool) -> Path | None:
        """The checkpoint to go on from; None where there is none. Raises QzoError, see `train`."""
        if wish is not True:
            place = Path(str(wish))
            reason = self._unfit(place, check(place))
            if reason is not None:
                raise QzoError(f"{place} cannot be resumed: {reason}, or take another checkpoint")
            return place
        found, notices = newest(self._out, self._unfit)
        if found is None and any(CUT_SHORT not in notice for notice in notices):
            raise QzoError(
                f"{self._out} has no checkpoint to go on from; begin anew in another folder, or mend this: {notices[0]}"
            )
        if found is None:
            notices.append(f"{self._out} holds no whole checkpoint; training starts at step 0")
        for notice in notices:
            warnings.warn(notice if found is None else f"{notice}; going on from {found}", stacklevel=3)
        return found

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """As Trainer's, which takes a step before it looks whether all are taken: a finished run takes none."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    def _load_callback_state(self) -> None:
        """As Trainer's; what callbacks with unchanged options had counted up to the checkpoint goes on in any case.

        A callback that the run did not have when it was saved begins anew.
        """
        kept: Any = self.state.stateful_callbacks
        own = [each for each in (*self.callback_handler.callbacks, self.control) if isinstance(each, ExportableState)]
        for callback in own:
            saved = kept.get(type(callback).__name__)
            for state in saved if isinstance(saved, list) else [saved or {}]:
                check_callback(self._resumed or self._out, callback, state)
        super()._load_callback_state()
        for callback in own:
            saved = kept.setdefault(type(callback).__name__, callback.state())
            if self.args.restore_callback_states_from_checkpoint or callback is self.control:
                continue
            if isinstance(saved, dict) and saved.get("args") == callback.state().get("args"):
                vars(callback).update(saved.get("attributes", {}))

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """As Trainer's; where the training was asked to stop, a checkpoint is saved and the signal passed on."""
        stopped = self._stop.signal
        if stopped is not None:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*arguments, **named)
        if stopped is not None:
            place = self._out / f"{PREFIX}{self.state.global_step}"
            if not place.is_dir():  # save_strategy="best" decides by itself
                model: Any = self.model
                self._save_checkpoint(model, None)
            print(
                f"stopped by {stopped.name} after step {self.state.global_step}, saved in {place}; "
                "go on with trainer.train(resume_from_checkpoint=True)",
                file=sys.stderr,
            )
            raise_for(stopped)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; while one is made, the hidden folder for that."""
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but whole or not at all: made in a hidden folder, sealed, synced, and renamed."""
        out, name = Path(self._get_output_dir(trial)), f"{PREFIX}{self.state.global_step}"
        shutil.rmtree(out / SAVING, ignore_errors=True)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._put_best(out, name)
            seal(out / SAVING / name, self._about())
            publish(out / SAVING / name, out / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = f"{one_line(error)}; those before it are whole"
            raise QzoError(f"{out / name} could not be written: {reason}; free some space, and resume") from error
        finally:
            self._saving = False
            shutil.rmtree(out / SAVING, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(out / name))
        rotate(out, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _put_best(self, out: Path, name: str) -> None:
        """Let the state name the best checkpoint where it will lie, not where this one is made."""
        best = out / f"{PREFIX}{self.state.best_global_step}"
        if self.state.best_global_step and (best.name == name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(out / SAVING / name / STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, once the checkpoint is in its place."""
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)
