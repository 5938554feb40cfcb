"""The first line of a journal: whose it is, on what machine; damage, unknown words, and two processes at one moment."""

import os
import shutil
import threading

import pytest
import standin
import torch
from resealed import with_header
from safetensors.torch import load_file, save_file
from tiny import Tiny

from qzo import QZO, Journal, QzoError, load, replay, scales
from qzo.commands.main import main
from qzo.durable import read_tensors, write_tensors
from qzo.journal import lines
from qzo.journal.header import device_of
from qzo.journal.snapshot import snapshot_path


def begun(path, steps=3, qzo_options=None, **options):
    model = Tiny(torch.float16)
    optimizer = QZO(scales(model), lr=1e-4, **(qzo_options or {}))
    with Journal(path, model, optimizer, **options) as journal:
        for step in range(steps):
            optimizer.step(lambda: float("nan") if step == 1 else model.loss(step))  # noqa: B023
            journal.record()
    return optimizer


REQUIRED = ("model", "noise", "torch", "device", "dtype", "optimizer", "seed", "estimator", "offsets", "groups")


FINE = [("torch", "nonsense"), ("offsets", [])]  # any version; a run without offsets


@pytest.mark.parametrize("key", REQUIRED)
def test_a_header_that_lacks_something_or_has_unknown_words_is_one_line(tmp_path, key):
    begun(tmp_path / "j", 1)
    whole = (tmp_path / "j").read_bytes()
    for value in ("missing", None, "nonsense", 7, {}, [], [{}], True):
        if (key, value) in FINE:
            continue
        (tmp_path / "j").write_bytes(whole)
        with_header(tmp_path / "j", lambda h: h.pop(key) if value == "missing" else h.update({key: value}))  # noqa: B023
        for use in (lambda m: replay(m, tmp_path / "j"), lambda m: Journal(tmp_path / "j", m, QZO(scales(m), lr=1e-4))):
            with pytest.raises(QzoError) as caught:
                use(Tiny(torch.float16))
            assert "\n" not in str(caught.value)


WRONG = [{"lr": "x"}, {"eps": -1}, {"names": [3]}, {"names": []}, {"names": "ab"}, {"betas": 5}, {"lr": None}]


@pytest.mark.parametrize("change", WRONG)
def test_groups_with_wrong_options_are_one_line(tmp_path, change):
    begun(tmp_path / "j", 1)
    with_header(tmp_path / "j", lambda header: header["groups"][0].update(change))
    with pytest.raises(QzoError):
        replay(Tiny(torch.float16), tmp_path / "j")


def test_a_journal_of_a_machine_with_a_gpu_says_so_without_one(tmp_path, capsys, monkeypatch):
    begun(tmp_path / "j")
    with_header(tmp_path / "j", lambda header: header.update(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["replay", str(tmp_path / "model"), str(tmp_path / "j")]) == 2
    line = capsys.readouterr().err
    assert "was made on cuda, which this machine does not have" in line and line.count("\n") == 1


def test_a_journal_of_a_gpu_replays_on_a_cpu_where_its_noise_is_that_of_every_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tuned = begun(tmp_path / "j", qzo_options={"noise": "philox", "momentum": 0.5, "directions": 2}).truth()
    header = lines.read(tmp_path / "j").header
    assert header["estimator"]["noise"] == "philox" and header["estimator"]["distribution"] == "binomial"
    with_header(tmp_path / "j", lambda header: header.update(device="cuda"))
    header = lines.read(tmp_path / "j").header
    assert device_of(tmp_path / "j", header) == "cpu"
    again, _ = replay(Tiny(torch.float16), tmp_path / "j")
    assert again.estimator.noise == "philox"
    assert all(torch.equal(value, tuned[name]) for name, value in again.truth().items())


def test_adam_and_the_generator_are_not_repeated_on_another_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, options in (("adam", {"noise": "philox", "betas": (0.9, 0.99)}), ("generator", {})):
        begun(tmp_path / name, qzo_options=options)
        with_header(tmp_path / name, lambda header: header.update(device="cuda"))
        with pytest.raises(QzoError, match="was made on cuda, which this machine does not have"):
            device_of(tmp_path / name, lines.read(tmp_path / name).header)
    with pytest.raises(QzoError, match="made on cuda and this is cpu, where Adam's roots"):
        replay(Tiny(torch.float16), tmp_path / "adam")


def test_a_journal_of_the_generator_says_nothing_that_earlier_versions_do_not_know(tmp_path):
    begun(tmp_path / "j", 1)
    known = {"directions", "distribution", "sides", "normalize"}
    assert lines.read(tmp_path / "j").header["estimator"].keys() == known


def test_threads_and_carrier_are_recorded_and_told_where_they_differ(tmp_path):
    begun(tmp_path / "j")
    header = lines.read(tmp_path / "j").header
    assert header["threads"] == torch.get_num_threads() and header["carrier"] in ("compiled code", "operators")

    def resumed():
        model = Tiny(torch.float16)
        with Journal(tmp_path / "j", model, QZO(scales(model), lr=1e-4)) as journal:
            return journal.resume()

    assert resumed() == 3  # the same machine: not a word
    with_header(tmp_path / "j", lambda header: header.update(threads=999, carrier="abacus"))
    with pytest.warns(
        UserWarning, match=r"journal was begun with threads 999, here \d+; carrier abacus, here .*last bits"
    ):
        resumed()
    for key in ("threads", "carrier"):
        with_header(tmp_path / "j", lambda header: header.pop(key))  # noqa: B023 - of an older version
    assert resumed() == 3


def test_of_two_journals_begun_at_one_moment_one_is_told_and_no_line_is_lost(tmp_path):
    """In threads; each opens the file by itself, which a lock of the process alone would let through."""
    for number in range(12):
        path, barrier, outcomes = tmp_path / f"j{number}", threading.Barrier(2), []

        def begin(path=path, barrier=barrier, outcomes=outcomes):
            model = Tiny(torch.float16)
            optimizer = QZO(scales(model), lr=1e-4)
            barrier.wait()
            try:
                with Journal(path, model, optimizer) as journal:
                    optimizer.step(lambda: 1.0)
                    journal.record()
                    outcomes.append(os.stat(path).st_ino == os.fstat(journal._file.fileno()).st_ino)
            except QzoError as error:
                outcomes.append("in use" in str(error) or "resume() first" in str(error))

        both = [threading.Thread(target=begin) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert outcomes == [True, True] and lines.read(path).steps == 1


def test_every_bit_of_a_snapshot_counts_and_one_of_an_older_version_is_read(tmp_path):
    optimizer = begun(tmp_path / "j", 5, snapshot_every=4)
    path, truth = snapshot_path(tmp_path / "j"), optimizer.truth()
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(8, length, 5), len(data) - 3]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
        again, _ = replay(Tiny(torch.float16), tmp_path / "j")
        counters = (again.steps, again.skipped_steps, again.skipped_in_a_row)
        assert counters == (5, 1, 0) and all(torch.equal(again.truth()[name], truth[name]) for name in truth)
    path.write_bytes(data)
    tensors, metadata = read_tensors(path)
    save_file(tensors, path, {**metadata, "skipped_steps": "77"})  # unsealed; the journal counts
    again, notices = replay(Tiny(torch.float16), tmp_path / "j")
    assert (again.skipped_steps, notices) == (1, [])
    write_tensors(path, tensors, {"steps": "many", "crc": "0"})
    assert "cannot be used" in replay(Tiny(torch.float16), tmp_path / "j")[1][0]


def test_a_journal_knows_the_files_of_its_model_beyond_the_codes(make_model, tmp_path):
    source = standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)
    model = load(source)
    with Journal(tmp_path / "j", model, QZO(scales(model), lr=1e-4)):
        pass
    header = lines.read(tmp_path / "j").header
    assert header["source"] == str(source)
    moved = shutil.copytree(source, tmp_path / "moved")
    assert replay(load(moved), tmp_path / "j")[0].steps == 0
    raw = load_file(moved / "model.safetensors")
    raw["model.norm.weight"][0] += 1
    save_file(raw, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(QzoError, match="the codes are the same, other tensors are not"):
        replay(load(moved), tmp_path / "j")
