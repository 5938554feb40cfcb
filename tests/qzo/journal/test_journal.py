"""The journal: kill and resume, replay without data, damage, full disks."""

import errno
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lives import OPTIONS, STEPS, make, train
from tiny import Tiny

import qzo
from qzo import QZO, Journal, MeZO, QzoError, replay, scales, trainable
from qzo.journal import lines as journal_lines
from qzo.journal.fingerprint import model_hash
from qzo.journal.snapshot import snapshot_path

HELPERS = Path(__file__).parents[1] / "helpers"


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def state(model, optimizer):
    return {**{name: t.clone() for name, t in optimizer.truth().items()}, **scales(model)}


def recorded(path, steps=10, model=None, snapshot_every=None, **options):
    """A journal of some steps on a tiny model; returns model and optimizer."""
    model = Tiny(torch.float16) if model is None else model
    optimizer = QZO(scales(model), lr=1e-4, **options)
    with Journal(path, model, optimizer, snapshot_every=snapshot_every) as journal:
        for step in range(steps):
            optimizer.step(lambda: model.loss(step))  # noqa: B023
            journal.record()
    return model, optimizer


@pytest.mark.parametrize("rule", ["plain", "adam"])
def test_200_steps_killed_at_20_random_moments_end_bit_identical(tmp_path, rule):
    environment = {**os.environ, "PYTHONPATH": f"{HELPERS.parents[2]}:{HELPERS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HELPERS / "lives.py"), str(tmp_path), "20", rule]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    fates = [line.split(" ", 1)[1].rsplit(" ", 1)[0] for line in done.stdout.splitlines()]
    assert fates == ["signal 9"] * 20 + ["exit 0"]
    (tmp_path / "whole").mkdir()
    torch.set_num_threads(1)
    whole = train(tmp_path / "whole", rule)
    assert same(torch.load(tmp_path / "killed.pt"), whole)
    for snapshot in (True, False):
        model, _ = make(rule)
        optimizer, notices = replay(model, tmp_path / "run.journal", snapshot=snapshot)
        assert not notices and optimizer.steps == STEPS and optimizer.skipped_steps == 4
        assert same(state(model, optimizer), whole)
    assert (tmp_path / "run.journal").read_bytes() == (tmp_path / "whole/run.journal").read_bytes()


@pytest.mark.parametrize("rule", list(OPTIONS))
def test_a_run_cut_at_every_byte_of_its_last_two_lines_resumes_bit_identical(tmp_path, rule):
    whole = train(tmp_path, rule, 6)
    data = (tmp_path / "run.journal").read_bytes()
    snapshot_path(tmp_path / "run.journal").unlink(missing_ok=True)
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    before = data[: last - 1].rfind(b"\n") + 1
    for cut in range(before, len(data)):
        (tmp_path / "run.journal").write_bytes(data[:cut])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert same(train(tmp_path, rule, 6), whole)
        torn = cut not in (before, last)
        assert [str(w.message).endswith("is torn and was dropped") for w in caught] == [True] * torn
        assert (tmp_path / "run.journal").read_bytes() == data


def test_unquantized_offsets_groups_schedulers_and_mezo_replay_too(tmp_path):
    def options(number):
        model = Tiny(torch.bfloat16, offset=number == 1)
        if number == 0:
            optimizer = QZO(trainable(model, "scales+unquantized"), lr=1e-3, directions=2, estimator="one-sided")
            optimizer.param_groups[1]["lr"] = 1e-2
            optimizer.param_groups[1]["clip_threshold"] = 0.01
        elif number == 1:
            optimizer = QZO(trainable(model, "scales+offsets"), lr=1e-3, momentum=0.9, distribution="rademacher")
        else:
            optimizer = MeZO(model.named_parameters(), lr=1e-3)
        return model, optimizer

    for number in range(3):
        model, optimizer = options(number)
        with Journal(tmp_path / f"{number}.journal", model, optimizer, snapshot_every=5) as journal:
            optimizer.register_step_post_hook(journal.record)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20, cycle_momentum=number == 1)
            for step in range(12):
                optimizer.step(lambda: model.loss(step))  # noqa: B023
                scheduler.step()
        for snapshot in (True, False):
            fresh, _ = options(number)
            again, notices = replay(fresh, tmp_path / f"{number}.journal", snapshot)
            assert not notices and same(again.truth(), optimizer.truth())
            assert same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_resume_to_an_earlier_step_cuts_the_rest_off(tmp_path):
    model, optimizer = recorded(tmp_path / "j", 8, snapshot_every=5)
    whole = state(model, optimizer)
    for stop in (3, 5, 6):
        model = Tiny(torch.float16)
        optimizer = QZO(scales(model), lr=1e-4)
        with Journal(tmp_path / "j", model, optimizer, snapshot_every=5) as journal:
            assert journal.resume(stop) == stop == optimizer.steps == journal.steps
            for step in range(stop, 8):
                optimizer.step(lambda: model.loss(step))  # noqa: B023
                journal.record()
        assert same(state(model, optimizer), whole)


def test_an_optimizer_that_was_loaded_stays_as_it_is(tmp_path):
    _, optimizer = recorded(tmp_path / "j", 8)
    fresh = Tiny(torch.float16)
    other = QZO(scales(fresh), lr=1e-4)
    journal = Journal(tmp_path / "j", fresh, other)
    other.load_state_dict(optimizer.state_dict())
    assert journal.resume(8) == 8 and other.steps == 8
    journal.close()


def test_twenty_thousand_steps_take_less_than_a_megabyte(tmp_path):
    model, optimizer = make("plain")
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20_000)
    derivatives = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    with Journal(tmp_path / "j", model, optimizer, None, 1000) as journal:
        optimizer.step(model.loss)
        step = optimizer.last
        for number, d in enumerate(derivatives):  # as steps leave them behind, only faster
            options = ({**step.options[0], "lr": rates.get_last_lr()[0]},)
            optimizer.last = replace(step, step=number, applied=((d,),), options=options)
            journal.record()
            rates.step()
    contents = journal_lines.read(tmp_path / "j")
    assert contents.steps == 20_000 and contents.size == (tmp_path / "j").stat().st_size < 1_000_000
    assert contents.entries[-1] == journal_lines.Step(19_999, 3, ((derivatives[-1],),), (options[0]["lr"],))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-7, -100.0, 1 / 3, 5e-324, 1.7976931348623157e308, -2.5e-5, 123456789.25]
)
def test_numbers_come_back_to_the_bit_in_eleven_characters(value):
    text = journal_lines._write_number(value)
    assert len(text) <= 11 and not set(text) & set(" ,;\n")
    assert journal_lines._read_number(text).hex() == value.hex()


@pytest.mark.parametrize("line", [2, 5, 9])
@pytest.mark.parametrize("how", ["flip", "drop", "double", "swap"])
def test_a_damaged_earlier_line_is_named(tmp_path, line, how):
    recorded(tmp_path / "j", 10)
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    index = line - 1
    if how == "flip":
        lines[index] = lines[index][:4] + bytes([lines[index][4] ^ 1]) + lines[index][5:]
    elif how == "drop":
        del lines[index]
    elif how == "double":
        lines.insert(index, lines[index])
        line += 1
    else:
        lines[index], lines[index + 1] = lines[index + 1], lines[index]
    (tmp_path / "j").write_bytes(b"".join(lines))
    before = (tmp_path / "j").read_bytes()
    model = Tiny(torch.float16)
    for attempt in (lambda: replay(model, tmp_path / "j"), lambda: Journal(tmp_path / "j", model, QZO(scales(model)))):
        with pytest.raises(QzoError, match=f"line {line} is damaged"):
            attempt()
    assert (tmp_path / "j").read_bytes() == before


def test_a_journal_of_another_model_seed_or_option_is_refused(tmp_path):
    recorded(tmp_path / "j", 3)
    other = Tiny(torch.float16, seed=1)
    with pytest.raises(QzoError, match="journal of another model"):
        replay(other, tmp_path / "j")
    tuned, _ = recorded(tmp_path / "k", 3)
    with pytest.raises(QzoError, match="journal of another model"):
        replay(tuned, tmp_path / "j")
    for options, message in (
        ({"seed": 1}, "begun with seed=0, not 1"),
        ({"directions": 2}, "begun with estimator="),
        ({"momentum": 0.9}, "other parameter groups or options"),
    ):
        model = Tiny(torch.float16)
        with pytest.raises(QzoError, match=message):
            Journal(tmp_path / "j", model, QZO(scales(model), **options))
    model = Tiny(torch.float16)
    assert Journal(tmp_path / "j", model, QZO(scales(model), lr=1.0, eps=1e-4)).resume() == 3


def test_other_random_numbers_are_noticed(tmp_path, monkeypatch):
    recorded(tmp_path / "j", 3)
    monkeypatch.setattr(sys.modules["qzo.journal.header"], "noise_fingerprint", lambda device, distribution: "other")
    with pytest.raises(QzoError, match="draws other random numbers"):
        replay(Tiny(torch.float16), tmp_path / "j")


def test_every_part_of_the_model_counts_in_its_hash():
    def hash_of(change):
        model = Tiny(torch.float16)
        change(model)
        return model_hash(model, QZO(scales(model)))

    changes = [
        lambda m: None,
        lambda m: m.first.qweight[0, 0].add_(1),
        lambda m: m.first.qzeros[0, 0].add_(1),
        lambda m: m.second.scales[0, 0].mul_(1.01),
        lambda m: m.second.g_idx[0].add_(1),
    ]
    assert len({hash_of(change) for change in changes}) == len(changes)
    assert hash_of(changes[0]) == hash_of(changes[0])


class FullDisk:
    """Stands for os.write: takes some bytes of each call, then says that there is no space."""

    def __init__(self, room):
        self.room, self.write = room, os.write

    def __call__(self, file, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[: self.room]
        self.room -= len(part)
        return self.write(file, part)


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path, monkeypatch):
    whole = state(*recorded(tmp_path / "whole", 10))
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=1e-4)
    journal = Journal(tmp_path / "j", model, optimizer)
    for step in range(10):
        if step == 4:
            monkeypatch.setattr(os, "write", FullDisk(room=50))  # one line and a piece of the next
        optimizer.step(lambda: model.loss(step))  # noqa: B023
        if step in (5, 6):
            with pytest.raises(QzoError, match=r"No space left on device; .* \d line\(s\) wait") as caught:
                journal.record()
            assert "\n" not in str(caught.value)
            assert journal_lines.read(tmp_path / "j").steps == 5 and journal_lines.read(tmp_path / "j").notice is None
        else:
            if step == 7:
                monkeypatch.undo()
            journal.record()
    journal.close()
    assert (tmp_path / "j").read_bytes() == (tmp_path / "whole").read_bytes()
    fresh = Tiny(torch.float16)
    assert same(state(fresh, replay(fresh, tmp_path / "j")[0]), whole)


def test_a_snapshot_that_finds_no_room_leaves_the_old_one(tmp_path, monkeypatch):
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=1e-4)
    journal = Journal(tmp_path / "j", model, optimizer, snapshot_every=2)

    def step():
        optimizer.step(lambda: model.loss(optimizer.steps))
        journal.record()

    step()
    step()
    old = snapshot_path(tmp_path / "j").read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step()
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(QzoError, match="No space left on device"):
        step()
    assert snapshot_path(tmp_path / "j").read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["j", "j.safetensors"]
    journal.close()
    fresh = Tiny(torch.float16)
    again, notices = replay(fresh, tmp_path / "j")
    assert not notices and again.steps == 4 and same(again.truth(), optimizer.truth())


@pytest.mark.parametrize("how", ["flip", "cut", "other"])
def test_a_snapshot_that_does_not_fit_costs_time_only(tmp_path, how):
    _, optimizer = recorded(tmp_path / "j", 7, snapshot_every=3)
    path = snapshot_path(tmp_path / "j")
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-5] ^= 1
    elif how == "cut":
        del data[-100:]
    else:
        recorded(tmp_path / "k", 7, snapshot_every=3, seed=4)
        data = snapshot_path(tmp_path / "k").read_bytes()
    path.write_bytes(data)
    fresh = Tiny(torch.float16)
    again, notices = replay(fresh, tmp_path / "j")
    assert len(notices) == 1 and notices[0].endswith("replaying from the start")
    assert same(again.truth(), optimizer.truth())


def test_misuse_is_explained(tmp_path):
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=1e-4)
    for options in ({"snapshot_every": 0}, {"sync_every": 0}):
        with pytest.raises(QzoError, match="is not positive"):
            Journal(tmp_path / "j", model, optimizer, **options)
    journal = Journal(tmp_path / "j", model, optimizer)
    with pytest.raises(QzoError, match="no new step was taken"):
        journal.record()
    optimizer.step(model.loss)
    journal.record()
    with pytest.raises(QzoError, match="step 0 was taken"):
        journal.record()
    with pytest.raises(QzoError, match="resume\\(\\) comes before"):
        journal.resume()
    optimizer.step(model.loss)
    optimizer.step(model.loss)
    with pytest.raises(QzoError, match="holds 1 steps, and step 2 was taken"):
        journal.record()
    with pytest.raises(QzoError, match="has taken 3 steps"):
        Journal(tmp_path / "k", model, optimizer)
    journal.close()
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model))
    with Journal(tmp_path / "j", model, optimizer) as journal:
        with pytest.raises(QzoError, match="step 2 is not among them"):
            journal.resume(2)
        optimizer.step(model.loss)
        with pytest.raises(QzoError, match="resume\\(\\) first"):
            journal.record()
    with pytest.raises(QzoError, match="exact=True"):
        Journal(tmp_path / "m", model, MeZO(scales(model), exact=False))
    for content, message in ((b"", "not a journal"), (b"hello\n", "not a journal"), (b'{"qzo_journal"', "line 1 is")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(QzoError, match=message):
            journal_lines.read(tmp_path / "x")
    with pytest.raises(QzoError, match="is not a file"):
        journal_lines.read(tmp_path / "nowhere")
    line, _ = journal_lines.seal(json.dumps({"qzo_journal": 2}).replace(" ", ""), 0)
    (tmp_path / "x").write_bytes(line)
    with pytest.raises(QzoError, match="version 2"):
        journal_lines.read(tmp_path / "x")


def test_two_processes_cannot_write_one_journal(tmp_path):
    recorded(tmp_path / "j", 3)
    code = "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    model = Tiny(torch.float16)
    command = [sys.executable, "-c", code, str(tmp_path / "j")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(QzoError, match="is in use by another process"):
            Journal(tmp_path / "j", model, QZO(scales(model)))
    assert Journal(tmp_path / "j", model, QZO(scales(model))).resume() == 3


def test_replaying_a_name_that_the_model_lacks_is_explained(tmp_path):
    model = Tiny(torch.float16)
    optimizer = QZO(list(scales(model).values()))
    with Journal(tmp_path / "j", model, optimizer) as journal:
        optimizer.step(model.loss)
        journal.record()
    with pytest.raises(QzoError, match="trains 0, which the model does not have"):
        replay(Tiny(torch.float16), tmp_path / "j")
    assert qzo.replay is replay


def test_an_option_changed_long_before_a_snapshot_still_counts_after_it(tmp_path):
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=1e-4, momentum=0.9)
    with Journal(tmp_path / "j", model, optimizer, snapshot_every=5) as journal:
        for step in range(8):
            if step == 2:
                optimizer.param_groups[0]["momentum"] = 0.5
            optimizer.step(lambda: model.loss(step))  # noqa: B023
            journal.record()
    for snapshot in (True, False):
        again, _ = replay(Tiny(torch.float16), tmp_path / "j", snapshot)
        assert same(again.truth(), optimizer.truth())


def test_options_are_the_optimizers_own_again_after_a_resume(tmp_path):
    recorded(tmp_path / "j", 3)
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=0.5)
    with Journal(tmp_path / "j", model, optimizer) as journal:
        journal.resume()
    assert optimizer.param_groups[0]["lr"] == 0.5
