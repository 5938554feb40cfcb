"""Checkpoints of QZOTrainer: whole or absent, sealed, and whatever happened the same bits in the end."""

import os
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import standin
import torch
from crashes import alive, kill_at, operations, sample
from trainer_lives import OPTIONS, ends, left_over, live, make
from transformers import TrainerCallback

import qzo
from qzo import QzoError, load, scales
from qzo.durable import lock, read_tensors, write_tensors
from qzo.training.checkpoints import SEAL, check, listed, tidy

pytestmark = pytest.mark.filterwarnings("ignore:.*training starts at step 0", "ignore:.*was passed over")


@pytest.fixture
def model(make_model, tmp_path):
    return standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True, "gptq_v2")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


class Stop(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.act()


def interrupt():
    raise KeyboardInterrupt


def run(model, folder, resume=None, until=None, act=interrupt, **more):
    trainer = make(model, folder, **more)
    if until is not None:
        trainer.add_callback(Stop(until, act))
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        if until is None:
            raise
    return trainer


def flipped(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def same(one, other):
    one, other = one.zeroth_order.truth(), other.zeroth_order.truth()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("part", range(2))
def test_a_kill_at_any_file_operation_ends_in_the_same_bits(model, folder, tmp_path, part):
    whole = tmp_path / "whole"
    whole.mkdir()
    names = operations(whole, lambda: live(model, whole, max_steps=4))
    assert len(names) > 100 and not left_over(whole)
    wanted = ends(whole)
    for number in sample(names, 8)[part::2]:
        assert kill_at(folder, number, lambda: live(model, folder, max_steps=4)), number
        code, text = alive(lambda: live(model, folder, max_steps=4))
        assert code == 0, f"{names[number]}: {text}"
        assert ends(folder) == wanted, names[number]
        assert not [name for name in left_over(folder) if not name.startswith(".tuned")], names[number]
        shutil.rmtree(folder)
        folder.mkdir()


def test_a_folder_that_another_process_trains_or_saves_into_is_refused_and_nothing_in_it_is_touched(model, folder):
    trainer = run(model, folder, max_steps=2)
    (folder / "out/.saving").mkdir()
    with ExitStack() as other:
        other.callback(os.close, lock(folder / "out"))
        for work in (lambda: make(model, folder).train(resume_from_checkpoint=True), trainer.save_model):
            with pytest.raises(QzoError, match="out is in use by another process; wait for it, or choose another"):
                work()
    assert left_over(folder) == ["out/.saving"]
    trainer.save_model()


def test_a_finished_run_takes_no_further_step(model, folder):
    first = run(model, folder)
    journal, again = (folder / "run.journal").read_bytes(), run(model, folder, True)
    assert again.state.global_step == again.zeroth_order.steps == 5 and same(first, again)
    assert (folder / "run.journal").read_bytes() == journal
    shorter = run(model, folder, str(folder / "out/checkpoint-4"), max_steps=3)
    assert shorter.state.global_step == shorter.zeroth_order.steps == 4


def test_damage_anywhere_in_a_checkpoint_shows_and_an_older_one_is_taken(model, folder):
    whole = run(model, folder, save_total_limit=None)
    place = folder / "out/checkpoint-4"
    shutil.rmtree(folder / "out/checkpoint-5")
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", SEAL, "trained.safetensors"):
        kept = (place / name).read_bytes()
        (place / name).write_bytes(flipped(kept))
        with pytest.raises(QzoError, match=f"{name} is damaged"):
            check(place)
        with pytest.raises(QzoError, match=f"{name} is damaged"):
            qzo.export(place, folder / "exported")
        if name != "trained.safetensors":
            (place / name).write_bytes(kept)
    assert not (folder / "exported").exists()
    with pytest.raises(QzoError, match=r"trained\.safetensors is damaged"):
        make(model, folder).train(resume_from_checkpoint=str(place))
    with pytest.warns(UserWarning, match=r"checkpoint-4 was passed over: .*trained.* damaged.*going on from .*-2"):
        again = run(model, folder, True, save_total_limit=None)
    assert again.state.global_step == 5 and same(whole, again)


def test_a_checkpoint_that_lacks_a_file_or_its_seal_is_not_whole(model, folder):
    run(model, folder)
    place = folder / "out/checkpoint-5"
    for name in ("rng_state.pth", SEAL):
        kept = (place / name).read_bytes()
        (place / name).unlink()
        with pytest.raises(QzoError, match=f"checkpoint-5 lacks {name}; take another checkpoint"):
            check(place)
        (place / name).write_bytes(kept)
    assert check(place)["step"] == 5
    for place in listed(folder / "out"):
        (place / "optimizer.pt").write_bytes(b"")
    with pytest.raises(QzoError, match=r"out has no checkpoint to go on from; .*optimizer\.pt is damaged"):
        run(model, folder, True)


def test_checkpoints_of_yesterdays_version_are_read_and_its_half_ones_passed_over(model, folder):
    whole = run(model, folder, save_total_limit=None)
    shutil.rmtree(folder / "out/checkpoint-5")
    for place in listed(folder / "out"):
        (place / SEAL).unlink()
        tensors, metadata = read_tensors(place / "trained.safetensors")
        write_tensors(place / "trained.safetensors", tensors, {"model": metadata["model"], "steps": "2"})
    (folder / "out/checkpoint-4/trainer_state.json").unlink()
    (folder / "out/checkpoint-3").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-4 lacks trainer_state.json: its writing was cut short"):
        again = run(model, folder, True, save_total_limit=None)
    assert again.state.global_step == 5 and same(whole, again)
    assert qzo.export(folder / "out/checkpoint-2", folder / "exported") == len(scales(again.model))


def test_without_any_checkpoint_a_resume_starts_at_the_first_step(model, folder, tmp_path):
    other = tmp_path / "other"
    whole = run(model, other)
    run(model, folder, until=1)
    assert not listed(folder / "out")
    with pytest.raises(QzoError, match=r"run\.journal holds 1 steps; train\(resume_from_checkpoint=True\) goes on"):
        run(model, folder)
    with pytest.warns(UserWarning, match="holds no whole checkpoint; training starts at step 0"):
        again = run(model, folder, True)
    assert same(whole, again) and (folder / "run.journal").read_bytes() == (other / "run.journal").read_bytes()


def test_after_a_resume_from_an_older_checkpoint_its_own_are_the_newest(model, folder):
    whole = run(model, folder, save_total_limit=None)
    run(model, folder, str(folder / "out/checkpoint-2"), until=5, save_total_limit=None)
    assert [place.name for place in listed(folder / "out")] == ["checkpoint-2", "checkpoint-5", "checkpoint-4"]
    again = run(model, folder, True, save_total_limit=None)
    assert same(whole, again) and again.state.global_step == 5


def test_a_new_run_in_an_old_folder_goes_on_from_its_own_checkpoints(model, folder):
    run(model, folder, learning_rate=1e-2)
    (folder / "run.journal").unlink()
    run(model, folder, until=3)
    assert listed(folder / "out")[-1].name == "checkpoint-2"
    again = run(model, folder, True)
    assert again.state.log_history[0]["learning_rate"] <= OPTIONS["learning_rate"] and again.state.global_step == 5


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(model, folder):
    run(model, folder)
    out = folder / "out"
    os.replace(out / "checkpoint-5", out / ".checkpoint-5.old")
    shutil.copytree(out / "checkpoint-4", out / ".checkpoint-4.old")
    (out / ".checkpoint-1.gone").mkdir()
    (out / ".saving/checkpoint-6").mkdir(parents=True)
    tidy(out)
    assert check(out / "checkpoint-5") and not left_over(out)


def test_a_resume_on_another_model_is_refused(model, make_model, folder, tmp_path):
    torch.manual_seed(7)
    other = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "other", True, "gptq_v2")
    run(model, folder)
    (folder / "run.journal").unlink()
    trainer = make(other, folder)
    trainer.journal_path = None
    with pytest.raises(QzoError, match=rf"made with another model than {other} \({model}\)"):
        trainer.train(resume_from_checkpoint=str(folder / "out/checkpoint-5"))
    moved = model.rename(tmp_path / "moved")
    trainer = make(moved, folder)
    trainer.journal_path = None
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5


def test_an_export_takes_the_model_that_was_trained_from_any_folder(model, make_model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = run(Path("model"), folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    standin.write_model(make_model(dtype=torch.bfloat16), Path("model"), True, "gptq_v2")
    assert qzo.export(folder / "out/checkpoint-5", "exported") == len(scales(trainer.model))
    codes = [load(place).model.layers[0].mlp.up_proj.qweight for place in ("exported", model)]
    assert torch.equal(*codes)
    shutil.rmtree(model)
    shutil.copytree("model", model)
    with pytest.raises(QzoError, match="what lies there now is another model"):
        qzo.export(folder / "out/checkpoint-5", "again")


def test_a_journal_of_another_run_is_told_from_the_one_of_the_checkpoint(model, folder, tmp_path):
    run(model, folder)
    run(model, tmp_path / "other", learning_rate=1e-3)
    shutil.copy(tmp_path / "other/run.journal", folder / "run.journal")
    with pytest.raises(QzoError, match=r"no checkpoint to go on from; .*run\.journal is the journal of another run"):
        run(model, folder, True)


def test_early_stopping_counts_on_over_a_resume(model, folder, tmp_path):
    more = {"max_steps": 12, "eval_steps": 1, "save_steps": 1, "learning_rate": 5e-3, "save_total_limit": None}
    whole = run(model, tmp_path / "whole", **more)
    last = whole.state.global_step
    assert last < 12
    run(model, folder, until=last - 1, **more)
    again = run(model, folder, True, **more)
    assert again.state.global_step == last and same(whole, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(model, folder, tmp_path, capfd, number):
    whole = run(model, tmp_path / "whole", save_steps=100, load_best_model_at_end=False)
    before = {signal_: signal.getsignal(signal_) for signal_ in (signal.SIGINT, signal.SIGTERM)}
    trainer = make(model, folder, save_steps=100, load_best_model_at_end=False)
    trainer.add_callback(Stop(3, lambda: signal.raise_signal(number)))
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as told:
        trainer.train()
    assert number == signal.SIGINT or told.value.code == 143
    message = capfd.readouterr().err
    assert f"stopped by {number.name} after step 3, saved in {folder}/out/checkpoint-3" in message
    assert "train(resume_from_checkpoint=True)" in message
    assert {signal_: signal.getsignal(signal_) for signal_ in before} == before
    again = run(model, folder, True, save_steps=100, load_best_model_at_end=False)
    assert same(whole, again)


def test_a_second_signal_stops_at_once_and_a_thread_is_left_alone(model, folder):
    trainer = make(model, folder)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.add_callback(Stop(1, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and not listed(folder / "out")
    done = []
    thread = threading.Thread(target=lambda: done.append(run(model, folder, True).state.global_step))
    thread.start()
    thread.join()
    assert done == [5]


def test_handlers_of_a_script_stay_its_own(model, folder):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer = run(model, folder, until=2, act=lambda: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1] and trainer.state.global_step == 5


def test_a_full_disk_is_told_and_leaves_what_was_whole(model, folder, monkeypatch):
    trainer, save = make(model, folder), torch.save

    def full(content, path, *arguments, **named):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path, *arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        QzoError, match=r"checkpoint-4 could not be written: .*No space left on device; those before it"
    ):
        trainer.train()
    assert [place.name for place in listed(folder / "out")] == ["checkpoint-2"] and not left_over(folder)
