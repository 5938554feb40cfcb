"""A run's folder: the model it was begun on, what decides the best state, damage of each file, one process a run."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import standin
import torch
from gguf_files import tiny, write_gguf
from resealed import with_header
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from qzo import QzoError, export, load, scales
from qzo.checkpoints.identity import base_identity
from qzo.checkpoints.inspect import inspect as inspect_files
from qzo.checkpoints.load import load as from_files
from qzo.checkpoints.tokenizer import load_tokenizer as tokenizer_of_files
from qzo.commands.main import main
from qzo.durable import read_tensors, write_tensors
from qzo.training.run import SUMS, _sum, begun_with, read_run
from qzo.training.settings import TrainSettings
from qzo.training.telemetry.metrics import Metrics
from qzo.training.tuned.state import _check_journal

SMALL = [*standin.PAPER, "--batch-size", "4", "--lr", "1e-4", "--eval-every", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of a model and of a run of four steps on it, best after two."""
    place = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", False), dtype=torch.bfloat16).eval()
    source = standin.write_model(model, place / "model", True)
    (source / "README.md").write_text("a model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "qzo.tasks", task := standin.module())
        accuracies = iter([0.0, 0.1, 0.9, 0.2, 0.3])  # the first and the last are tests
        task.evaluate = lambda *_, **__: {"accuracy": next(accuracies), "loss": 1.0, "count": 1}
        assert main(["train", str(source), *SMALL, "--steps", "4", "--out", str(place / "run")]) == 0
    return source, place / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run."""
    return shutil.copytree(trained[1], tmp_path / "run")


@pytest.fixture
def source(trained, tmp_path):
    """A copy of the model."""
    return shutil.copytree(trained[0], tmp_path / "moved")


def says(capsys, code, *command):
    """Run a command that must end with `code`; its one line of error, or all that it printed."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == code, capsys.readouterr()
    shown = capsys.readouterr()
    if not code:
        return shown.out + shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in shown.err
    return lines[0]


def change_about(run, **changes):
    about = json.loads((run / "run.json").read_text())
    about.update(changes)
    (run / "run.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))


def other_numbers(folder, part):
    """Change one bit of a tensor of a model."""
    raw = load_file(folder / "model.safetensors")
    raw[next(name for name in raw if name.endswith(part))].view(torch.uint8).view(-1)[0] ^= 1
    save_file(raw, folder / "model.safetensors", {"format": "pt"})


# the model it was begun on


@pytest.mark.parametrize("part", ["qweight", "qzeros", "norm.weight"])
def test_a_run_is_not_put_together_with_another_model(run, source, tmp_path, capsys, task, part):
    other_numbers(source, part)
    change_about(run, model=str(source))
    train = ["train", source, *SMALL, "--steps", "6", "--out", run, "--resume"]
    commands = {
        "best": ["export", run, tmp_path / "out"],
        "last": ["export", run, tmp_path / "out", "--state", "last"],
        "named": ["export", run, tmp_path / "out", "--model", source],
        "eval": ["eval", run, "--task", "words"],
        "inspect": ["inspect", run],
        "resume": train,
        "replay": ["replay", source, run / "run.journal", tmp_path / "out"],
    }
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    for command in commands.values():
        line = says(capsys, 2, *command)
        assert "begun on" in line or "another model" in line
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_a_model_that_moved_is_named_and_its_content_decides(run, source, trained, tmp_path, capsys, monkeypatch):
    change_about(run, model=str(tmp_path / "gone"))
    assert "is not there any more; name the place it moved to: --model" in says(
        capsys, 2, "export", run, tmp_path / "x"
    )
    monkeypatch.chdir(tmp_path)
    for state in ("best", "last"):
        assert "tuned tensors" in says(capsys, 0, "export", run, state, "--state", state, "--model", "moved")
    for command in (["inspect", run], ["generate", run, "--prompt", "w5"]):
        assert "is not there any more" in says(capsys, 2, *command)
        says(capsys, 0, *command, "--model", "moved")
        assert "moved is none; leave it out" in says(capsys, 2, command[0], "moved", *command[2:], "--model", "moved")
    export(trained[1], tmp_path / "first")
    assert (tmp_path / "best/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()
    assert export(run, "again", model="moved") == len(read_tensors(run / "best.safetensors")[0])


def test_a_run_goes_on_with_its_model_at_another_place(run, source, capsys, task):
    change_about(run, model="/gone/model")
    shown = says(capsys, 0, "train", source, *SMALL, "--steps", "5", "--out", run, "--resume")
    assert "going on after step 4 of 5" in shown and read_run(run)["model"] == str(source)


def test_a_run_of_an_older_version_is_held_to_its_journal(run, source, tmp_path, capsys):
    change_about(run, base=None, model=str(source))
    assert "of step 2 written" in says(capsys, 0, "export", run, tmp_path / "out")
    other_numbers(source, "qweight")
    assert "is the journal of another model" in says(capsys, 2, "export", run, tmp_path / "other")


def test_a_run_of_an_older_version_with_adam_on_a_gpu_is_recognized_without_one(run, source):
    def by_adam(header):
        header.update(device="cuda")
        header["groups"][0]["betas"] = [0.9, 0.99]

    with_header(run / "run.journal", by_adam)
    _check_journal(run, str(source), {"settings": read_run(run)["settings"]}, None, None)
    other_numbers(source, "qweight")
    with pytest.raises(QzoError, match="is the journal of another model"):
        _check_journal(run, str(source), {"settings": read_run(run)["settings"]}, None, None)


# what decides the best state


def test_a_setting_of_a_run_that_is_said_twice_is_refused(tmp_path):
    said = '{"qzo_run": 1, "settings": {"method": "qzo", "seed": 1, "seed": 2}}'
    (tmp_path / "run.json").write_text(said)
    with pytest.raises(QzoError, match=r"run.json: 'seed' stands there twice, with two values"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(said.replace("2}", "1}"))
    assert read_run(tmp_path)["settings"]["seed"] == 1


def test_every_flipped_bit_of_the_metrics_is_told_or_without_consequence(run, trained, task, capsys):
    metrics = Metrics(run / "metrics.jsonl", "accuracy")
    data, dice, silent = (run / "metrics.jsonl").read_bytes(), random.Random(0), 0
    whole = metrics.read(4)
    last = data.rstrip(b"\n").rfind(b"\n") + 1
    for place in range(len(data)):
        flipped = bytes([data[place] ^ 1 << dice.randrange(8)])
        metrics.path.write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            found = metrics.read(4)
        except QzoError as error:
            assert "line " in str(error)
        else:  # without its end the last line is torn, and its validation is done again
            assert found == whole[:-1] and place == len(data) - 1 and metrics.path.stat().st_size == last
            silent += 1
    assert silent == 1


def test_damage_is_one_line_and_nothing_is_cut_off(run, trained, task, capsys):
    path, resume = run / "metrics.jsonl", ["train", trained[0], *SMALL, "--steps", "5", "--out", run, "--resume"]
    lines = path.read_bytes().splitlines(keepends=True)
    numbers = [number for number, line in enumerate(lines) if b"validation" in line]
    cases = {
        "line 2 is damaged": [lines[0], lines[1].replace(b"loss", b"losT"), *lines[2:]],
        "line 3 is damaged": [*lines[:2], *lines[3:]],
        "lacks the validation after 2 steps": lines[: numbers[1]],
        "lacks the validation after 0 steps": [],
        "line 1 lacks 'step'": [b'{"loss": 1}\n'],
        "line 1 cannot be read": [b'{"step": true}\n', *lines],
        "'good' is no number": [b'{"step": 0, "validation": {"accuracy": "good"}}\n'],
        "lacks 'accuracy'": [b'{"step": 0, "validation": {}}\n'],
        "step 1 after step 4": [b'{"step": 4, "loss": 1}\n', b'{"step": 1, "loss": 1}\n'],
    }
    for message, wrong in cases.items():
        path.write_bytes(b"".join(wrong))
        assert message in says(capsys, 2, *resume)
        assert path.read_bytes() == b"".join(wrong)


def test_damaged_facts_are_told_and_gone_ones_are_no_obstacle(run, trained, task, capsys):
    command = ["train", trained[0], *SMALL, "--steps", "4", "--out", run, "--resume"]
    facts = run / "facts.json"
    for damaged in (facts.read_bytes().replace(b'"accuracy": 0.0', b'"accuracy": 0.5'), b"[]", b"{\xff"):
        facts.write_bytes(damaged)
        assert "facts.json is damaged; restore it from a copy, or remove it" in says(capsys, 2, *command)
    facts.unlink()
    says(capsys, 0, *command)


def test_lines_of_an_older_version_are_read_and_new_ones_sealed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "validation": {"accuracy": 0.5}}\n{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    metrics = Metrics(path, "accuracy")
    assert [entry["step"] for entry in metrics.read(1)] == [0, 1] and not metrics.sealed
    metrics.write({"step": 2, "loss": 2.0})
    metrics.write({"step": 2, "validation": {"accuracy": float("nan"), "loss": 1}})
    assert [entry["step"] for entry in metrics.read(2)] == [0, 1, 2, 2]
    first, *rest = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first.replace(b"0.5", b"0.9") + b"".join(rest))
    with pytest.raises(QzoError, match="line 3 is damaged"):
        metrics.read(2)
    body, seal = rest[1].split(b', "crc": ')
    assert seal == b'"%08x"}\n' % zlib.crc32(body + b"}", zlib.crc32(first + rest[0]))


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "other step", "other run"])
def test_a_best_state_that_is_not_the_runs_is_refused(run, trained, tmp_path, task, capsys, how):
    path = run / "best.safetensors"
    tensors, metadata = read_tensors(path)
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[-7] ^= 4
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:-100])
    elif how == "gone":
        path.unlink()
    else:
        write_tensors(path, tensors, {**metadata, **({"step": "3"} if how == "other step" else {"crc": "00000000"})})
    assert "best.safetensors" in says(capsys, 2, "export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if how != "other run":
        line = says(capsys, 2, "train", trained[0], *SMALL, "--steps", "5", "--out", run, "--resume")
        assert "best.safetensors" in line


# what is exported


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "not finite"), ("inf", "not finite"), ("-1", "negative numbers")]
)
def test_scales_that_cannot_be_are_refused_with_their_name(run, tmp_path, capsys, value, message):
    tensors, metadata = read_tensors(run / "best.safetensors")
    name = sorted(tensors)[5]
    tensors[name][0, 3] = float(value)
    write_tensors(run / "best.safetensors", tensors, metadata)
    line = says(capsys, 2, "export", run, tmp_path / "out")
    assert name in line and message in line and not (tmp_path / "out").exists()


def test_what_is_written_is_told_as_it_is(run, trained, tmp_path, capsys):
    assert "a copy of" in says(capsys, 0, "export", trained[0], tmp_path / "copy")
    line = says(capsys, 2, "export", run, tmp_path / "out.gguf")
    assert "out.gguf names a .gguf file, and" in line and "is no such file" in line
    tensors, _ = read_tensors(run / "best.safetensors")
    write_tensors(run / "best.safetensors", tensors, {"step": "0"})
    shown = says(capsys, 0, "export", run, tmp_path / "zero")
    assert "the best validation was the one before the first step" in shown and "of step 0" in shown
    with pytest.warns(UserWarning, match="is the model untouched"):
        export(run, tmp_path / "warned")
    modes = {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "zero").iterdir()}
    assert modes == {oct(0o666 & ~current_umask())}


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_link_out_of_the_models_folder_is_not_followed(run, source, tmp_path, capsys):
    (tmp_path / "secret").write_text("mine alone")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "again.md").symlink_to("README.md")  # within the folder: the model's own
    for command in (["export", run, tmp_path / "out", "--model", source], ["export", source, tmp_path / "out"]):
        assert "notes.txt is a link out of the model's folder" in says(capsys, 2, *command)
    assert not (tmp_path / "out").exists()
    (source / "notes.txt").unlink()
    says(capsys, 0, "export", source, tmp_path / "out")
    assert (tmp_path / "out/again.md").read_text() == "a model" and not (tmp_path / "out/again.md").is_symlink()
    snapshot = tmp_path / "hub/models--x/snapshots/abc"
    (tmp_path / "hub/models--x/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(source.iterdir()):
        shutil.copyfile(file, tmp_path / f"hub/models--x/blobs/{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    says(capsys, 0, "export", snapshot, tmp_path / "from-hub")
    assert not any(file.is_symlink() for file in (tmp_path / "from-hub").iterdir())


@pytest.mark.parametrize("missing", ["model", "settings", "method", "step", "trained"])
def test_a_run_or_checkpoint_that_lacks_something_is_one_line(run, tmp_path, capsys, missing):
    about = json.loads((run / "run.json").read_text())
    place = run
    if missing == "method":
        del about["settings"]["method"]
    elif missing in about:
        del about[missing]
    elif missing == "trained":
        place = tmp_path / "checkpoint-2"
        place.mkdir()
        save_file({"a.scales": torch.ones(2)}, place / "trained.safetensors")
    else:
        about["settings"]["dtype"] = "float99"
    (run / "run.json").write_text(json.dumps(about))
    assert "checkpoint-2" in (line := says(capsys, 2, "export", place, tmp_path / "out")) or "run" in line


@pytest.mark.parametrize("wrong", [{"legs": None}, {"layers": 7}, {"eps": []}, {"centering": "x"}, {"preset": []}])
def test_settings_of_the_wrong_kind_are_one_line_though_their_sum_fits(run, wrong):
    about = json.loads((run / "run.json").read_text())
    about["settings"] |= wrong
    about[SUMS]["settings"] = _sum(about["settings"])
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(QzoError, match=r"run\.json: settings: .*; restore the file from a copy"):
        begun_with(run)
    assert type(TrainSettings.from_json({"eps": 10**30})["eps"]) is float
    (run / "run.json").write_text(json.dumps({**about, "data": [7]}))
    with pytest.raises(QzoError, match=r"run\.json: data is missing or not known; restore"):
        read_run(run)


# a run where a model is asked for


def test_a_run_is_evaluated_and_inspected_like_a_model(run, trained, tmp_path, task, capsys):
    export(run, tmp_path / "out")
    results = []
    for place in (run, tmp_path / "out"):
        says(capsys, 0, "inspect", place, "--json", tmp_path / "inspected.json")
        results.append(json.loads((tmp_path / "inspected.json").read_text()))
    assert results[0]["trainable"] == results[1]["trainable"] and results[0]["run"]["step"] == 2
    assert str(run) in says(capsys, 0, "inspect", run)


# one process at a time


def test_a_second_process_is_kept_out_of_a_run(trained, run, task, capsys):
    code = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], 0); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        line = says(capsys, 2, "train", trained[0], *SMALL, "--steps", "5", "--out", run, "--resume")
        other.stdin.close()
    assert "is in use by another process" in line
    for left in (".run.json.part", ".tmpAb12cd"):
        (run / left).write_text("half")
    (run / ".best.safetensors.0123456789ab.part").mkdir()
    says(capsys, 0, "train", trained[0], *SMALL, "--steps", "5", "--out", run, "--resume")
    assert not list(run.glob(".*")) and Path(run / "run.json").stat().st_mode & 0o777 == 0o666 & ~current_umask()


def test_a_run_is_not_taken_for_the_files_of_a_model(run, tmp_path, capsys):
    told = r"holds tuned tensors without their model; give that model, or what qzo export .*run OUT writes"
    assert re.search(told, says(capsys, 2, "export", run, tmp_path / "out", "--model", run))
    for reads in (from_files, tokenizer_of_files, inspect_files):
        with pytest.raises(QzoError, match=told):
            reads(run)


@pytest.mark.parametrize(("kind", "negative"), [("Q4_1", False), ("Q4_0", True)])
def test_a_run_on_a_gguf_file_becomes_a_file_of_the_name_given(run, tmp_path, capsys, kind, negative):
    file = write_gguf(tiny(), tmp_path / "base.gguf", kind)
    tensors = {name: scale.clone() for name, scale in scales(load(file, dequantize=False)).items()}
    name = min(tensors)
    tensors[name].view(-1)[0] = -1 if negative else 1
    change_about(run, **base_identity(file))
    (run / "run.journal").unlink()
    write_tensors(run / "best.safetensors", tensors, {"step": "2"})
    says(capsys, 0, "export", run, tmp_path / "tuned.gguf")
    again = scales(load(tmp_path / "tuned.gguf", dequantize=False))
    assert all(torch.equal(again[key], value) for key, value in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "run", "tuned.gguf"]
    assert "tuned.gguf exists; choose another name" in says(capsys, 2, "export", run, tmp_path / "tuned.gguf")
    says(capsys, 0, "export", run, tmp_path / "folder")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["base.gguf"]
    tensors[name].view(-1)[0] = float("nan") if negative else -1
    write_tensors(run / "best.safetensors", tensors, {"step": "2"})
    assert name in says(capsys, 2, "export", run, tmp_path / "wrong.gguf") and not (tmp_path / "wrong.gguf").exists()
