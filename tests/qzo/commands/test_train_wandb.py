"""`qzo train --wandb`, with a module of the library's interface in its place."""

import json
import sys
import types

import pytest
from standin import SMALL
from told import errors

from qzo.commands.main import main


@pytest.fixture
def library(monkeypatch):
    """A stand-in that keeps what it was told."""
    told = []
    run = types.SimpleNamespace(
        define_metric=lambda *name, **options: told.append(("metric", name, options)),
        log=lambda values: told.append(("log", values)),
        finish=lambda: told.append("finished"),
    )
    made = types.SimpleNamespace(init=lambda **options: told.append(("init", options)) or run, told=told)
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_numbers_and_settings_go_to_one_run_that_a_resume_goes_on_with(task, models, tmp_path, library):
    command = ["train", models["quantized"], *SMALL, "--wandb", "mine", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    (_, begun), *_ = library.told
    assert begun["project"] == "mine" and begun["name"] == "run" and begun["dir"] == str(tmp_path / "run")
    assert begun["config"]["lr"] == 1e-7 and begun["config"]["model"] == models["quantized"]
    logs = [entry[1] for entry in library.told if entry[0] == "log"]
    assert [log["step"] for log in logs if "train/loss" in log] == [1, 2, 3, 4, 5, 6]
    assert [log["step"] for log in logs if "validation/accuracy" in log] == [0, 3, 6]
    assert ("metric", ("*",), {"step_metric": "step"}) in library.told and library.told[-1] == "finished"
    json.dumps(library.told[0][1])
    library.told.clear()
    assert main([*command, "--resume", "--steps", "7"]) == 0
    assert library.told[0][1]["id"] == begun["id"] and library.told[0][1]["resume"] == "allow"


def test_a_library_that_is_missing_or_cannot_begin_is_one_line(task, models, tmp_path, capsys, monkeypatch, library):
    command = ["train", models["quantized"], *SMALL, "--wandb", "mine", "--out", str(tmp_path / "run")]
    library.init = lambda **_: 1 / 0
    assert main(command) == 2
    assert "--wandb: Weights & Biases cannot begin: division by zero; run wandb login, set" in errors(capsys)[0]
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("qzo.training.tuned.start.model_with", lambda *_, **__: pytest.fail("the model was read"))
    assert main(command) == 2
    assert errors(capsys) == ["error: this needs the package wandb; run: pip install wandb"]
