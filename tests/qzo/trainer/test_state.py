"""The state of Trainer in a checkpoint whose seal fits: what Trainer cannot compute with is told before it is tried."""

import json

import pytest
import standin
import torch
from trainer_lives import make
from transformers import EarlyStoppingCallback, TrainerState
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl

import qzo
from qzo.trainer.state import check_callback, check_state
from qzo.training.checkpoints import STATE

SOUND = {"global_step": 4, "train_batch_size": 2, "epoch": 1, "eval_steps": 2.0, "best_metric": 0.5}
SAVED = {"args": {"early_stopping_patience": 1, "early_stopping_threshold": 0}, "attributes": {}}


def checked(folder, steps=4, **changed):
    content = {key: value for key, value in {**SOUND, **changed}.items() if value is not ...}
    (folder / STATE).write_text(json.dumps(content))
    check_state(folder, steps)


def test_what_a_trainer_writes_is_taken(tmp_path):
    state = TrainerState(
        global_step=4, train_batch_size=2, stateful_callbacks=[EarlyStoppingCallback(), *[TrainerControl()] * 2]
    )
    state.log_history.append({"loss": 1.5, "step": 1, "note": "any"})
    state.save_to_json(str(tmp_path / STATE))
    check_state(tmp_path, 4)
    checked(tmp_path)
    checked(tmp_path, None, global_step=3)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"best_metric": "nonsense"}, r"best_metric='nonsense' is not of its kind"),
        ({"best_model_checkpoint": "\x1b[2J"}, r"best_model_checkpoint='\\x1b\[2J'"),
        ({"eval_steps": None}, "eval_steps=None is not of its kind, int"),
        ({"save_steps": 1.5}, "save_steps=1.5"),
        ({"log_history": {}}, r"log_history=\{\}"),
        ({"log_history": [1]}, r"log_history=\[1\]"),
        ({"global_step": 3}, "global_step=3 is not the 4 that its seal says"),
        ({"global_step": ...}, "global_step=None is no number"),
        ({"train_batch_size": None}, "train_batch_size=None is no number"),
        ({"stateful_callbacks": []}, ".*is no states by name"),
        ({"stateful_callbacks": {"TrainerControl": {"args": 1}}}, ".*is no states by name"),
        ({"made_up": 1}, "made_up=1 is a key of another version of transformers"),
    ],
)
def test_a_value_that_trainer_cannot_compute_with_is_told(tmp_path, changed, told):
    with pytest.raises(qzo.QzoError, match=rf"{STATE}: {told}.*; take another checkpoint"):
        checked(tmp_path, **changed)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"global_step": '])
def test_a_state_that_is_no_object_is_told(tmp_path, content):
    (tmp_path / STATE).write_text(content)
    with pytest.raises(qzo.QzoError, match="is damaged"):
        check_state(tmp_path)


@pytest.mark.parametrize("attributes", [{"early_stopping_patience_counter": None}, {"made_up": 1}])
def test_a_callback_of_transformers_gets_only_what_it_has(tmp_path, attributes):
    check_callback(tmp_path, EarlyStoppingCallback(), {**SAVED, "attributes": {"early_stopping_patience_counter": 2}})
    check_callback(tmp_path, Counter(), {"attributes": attributes})
    with pytest.raises(qzo.QzoError, match=rf"EarlyStoppingCallback\.{next(iter(attributes))}"):
        check_callback(tmp_path, EarlyStoppingCallback(), {**SAVED, "attributes": attributes})


class Counter(TrainerCallback, ExportableState):
    """A callback with a state."""

    def __init__(self):
        self.count = 0

    def on_step_end(self, *_, **__):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


@pytest.mark.parametrize("restores", [False, True])
def test_a_callback_that_the_run_did_not_have_begins_anew(make_model, tmp_path, restores):
    model = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True, "gptq_v2")
    options = {"restore_callback_states_from_checkpoint": restores, "load_best_model_at_end": False}
    make(model, tmp_path, max_steps=2, **options).train()
    again = make(model, tmp_path, max_steps=4, **options)
    again.add_callback(Counter())
    again.train(resume_from_checkpoint=True)
    assert again.state.stateful_callbacks["Counter"]["attributes"] == {"count": 2}
