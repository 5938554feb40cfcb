"""A FIFO, a socket, a device or a folder in the place of a file of a run or a checkpoint: told at once, in one line."""

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path

import hostile
import pytest
import torch
from crash_works import TRAIN, works

from qzo import QzoError
from qzo.commands.main import main
from qzo.durable import read_tensors, write_tensors
from qzo.journal.lines import read
from qzo.training import checkpoints
from qzo.training.telemetry.metrics import MOST_MIB, Metrics

KINDS = {"FIFO": os.mkfifo, "socket": hostile.a_socket, "device": hostile.a_link("/dev/zero"), "folder": Path.mkdir}
READ = {  # file of a run -> commands that read it
    "run.json": ("export", "resume", "eval", "generate"),
    "best.safetensors": ("export", "resume", "eval", "generate"),
    "metrics.jsonl": ("resume",),
    "run.journal": ("export", "resume", "eval", "generate", "replay"),
}


@pytest.fixture(autouse=True)
def watchdog():
    """Ends the process of a test that hangs: in a library's `open` no handler of Python's would run."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model `packed` and the run `trained`."""
    folder = tmp_path_factory.mktemp("regular")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "qzo.tasks", None)  # what is there is put back
        works(folder)
        yield folder


def put(file, kind):
    file.unlink(missing_ok=True)
    KINDS[kind](file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READ)
def test_no_command_waits_for_a_file_of_a_run_that_is_none(name, kind, place, tmp_path, capsys):
    run = shutil.copytree(place / "trained", tmp_path / "run")
    put(run / name, kind)
    commands = {
        "export": ["export", run, tmp_path / "out"],
        "resume": ["train", place / "packed", *TRAIN, "--out", run, "--resume"],
        "eval": ["eval", run],
        "generate": ["generate", run, "--prompt", "a"],
        "replay": ["replay", place / "packed", run / "run.journal"],
    }
    for command in READ[name]:
        assert main([str(word) for word in commands[command]]) == 2, command
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ") and str(run / name) in lines[-1], (command, lines)
        assert f"is a {kind}; only regular files" in lines[-1] or "is not a file" in lines[-1], (command, lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_reader_waits_for_what_is_no_file(kind, tmp_path):
    file = tmp_path / "file"
    put(file, kind)
    for reader in (read_tensors, lambda path: Metrics(path, "loss"), read):
        with pytest.raises(QzoError, match=f"is a {kind}|is not a file"):
            reader(file)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_checkpoint_is_waited_for(kind, sealed, tmp_path):
    for name in checkpoints.READ:
        folder = tmp_path / name / "checkpoint-1"
        folder.mkdir(parents=True)
        write_tensors(folder / checkpoints.TRAINED, {"x": torch.ones(2)}, {})
        for other in (checkpoints.STATE, checkpoints.OPTIMIZER):
            (folder / other).write_text("{}")
        if sealed:
            checkpoints.seal(folder, {"step": 1})
        assert bool(checkpoints.check(folder)) == sealed
        put(folder / name, kind)
        with pytest.raises(QzoError, match=f"{name} is a {kind}; only regular files"):
            checkpoints.check(folder)
        found, notices = checkpoints.newest(folder.parent, lambda *_: None)
        assert found is None and f"is a {kind}" in notices[0]


def test_what_is_far_too_large_is_not_read(tmp_path):
    for name, size in (("metrics.jsonl", MOST_MIB), ("run.json", 8)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size * 2**20 + 1)
    with pytest.raises(QzoError, match="no real file of its kind"):
        Metrics(tmp_path / "metrics.jsonl", "loss")
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    (tmp_path / "run.json").write_text(json.dumps({"qzo_run": 1}))
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2


def test_a_run_is_not_begun_where_its_states_could_not_be_read_again(place, tmp_path, capsys):
    out = tmp_path / "\udcff"  # a byte that is no UTF-8, as Python has it
    assert main(["train", str(place / "packed"), *TRAIN, "--out", str(out)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err and not out.exists()
