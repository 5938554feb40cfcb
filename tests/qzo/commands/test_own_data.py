"""`qzo train --data` and `qzo eval` on a user's own files: trained, resumed, scored, exported; told what is wrong."""

import json

import pytest
import torch
from own_files import CHATML, ROWS, lines, write_kind
from task_files import make_model, make_tokenizer
from told import errors

from qzo import load, quantize
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.durable import read_tensors

KINDS = ("classes", "completion", "chat", "preference", "text")
RELATIVE = ["--relative", "--eps", "1e-2"]
SHORT = ["--preset", "paper", *RELATIVE, "--steps", "4", "--eval-every", "2", "--batch-size", "4", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a GPTQ checkpoint with a tokenizer that has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("own") / "model", make_tokenizer()
    tokenizer.chat_template = CHATML
    save(quantize(make_model(len(tokenizer), torch.bfloat16), group_size=32), folder, checkpoint_format="gptq")
    tokenizer.save_pretrained(folder)
    return str(folder)


def command(model, folder, kind, out, *more):
    columns = ["--columns", "text=body,label=queue"] if kind == "classes" else []
    length = ["--max-length", "32"] if kind == "text" else []
    data = ["--data", str(write_kind(folder, kind)), "--validation-samples", "4", "--test-samples", "3"]
    return main(["train", model, *data, *columns, *length, *SHORT, "--out", str(out), *more])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_resumes_and_is_scored_as_a_run(model, tmp_path, capsys, kind):
    assert command(model, tmp_path, kind, tmp_path / "whole") == 0
    told = capsys.readouterr()
    assert (
        "data: " in told.err
        and "an example: " in told.err
        and "\n                    before         best       before         best\n" in told.out
    )
    assert command(model, tmp_path, kind, tmp_path / "run", "--steps", "2") == 0
    assert main(["train", model, "--out", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 0
    best = [read_tensors(tmp_path / name / "best.safetensors")[0] for name in ("whole", "run")]
    assert best[0].keys() == best[1].keys() and all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["first"]["count"] and result["first_test"]["count"] == result["test"]["count"]
    assert result["first_test"] == json.loads((tmp_path / "whole/result.json").read_text())["first_test"]
    assert main(["eval", str(tmp_path / "run"), "--json", str(tmp_path / "eval.json")]) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["split"] == "test" and record["loss"] == pytest.approx(result["test"]["loss"], rel=1e-3)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tuned")]) == 0 and load(tmp_path / "tuned")


def test_a_run_without_a_number_by_hand_measures_them_once(model, tmp_path, capsys, monkeypatch):
    data = ["--data", str(write_kind(tmp_path, "completion")), "--validation-samples", "4", "--test-samples", "3"]
    train = ["train", model, *data, "--steps", "4", "--eval-every", "2", "--out"]
    assert main([*train, str(tmp_path / "whole")]) == 0
    told = capsys.readouterr().err
    assert "training all layers, lr " in told and ", 16 rows a step; " in told and "measured by " in told
    found = json.loads((tmp_path / "whole/run.json").read_text())["found"]
    assert (
        found["layers"] is None
        and found["batch_size"] == 16
        and all(found[name] > 0 for name in ("lr", "eps", "clip_threshold"))
    )
    with monkeypatch.context() as patch:
        patch.setattr("qzo.training.loop._validate", stopped_at(2))
        assert main([*train, str(tmp_path / "run")]) == 130
    assert "go on with --resume" in errors(capsys)[0]
    monkeypatch.setattr("qzo.training.auto.settle.probe", None)  # what is known is not measured again
    monkeypatch.setattr("qzo.training.auto.settle.chosen_rows", None)
    assert main([*train, str(tmp_path / "run"), "--resume"]) == 0
    best = [read_tensors(tmp_path / name / "best.safetensors")[0] for name in ("whole", "run")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    run = tmp_path / "run/run.json"
    run.write_text(run.read_text().replace('"eps": ' + str(found["eps"]), '"eps": -1'))
    capsys.readouterr()
    assert main([*train, str(tmp_path / "run"), "--resume"]) == 2
    assert "found: eps=-1 is not a positive number" in errors(capsys)[0]


def stopped_at(step):
    """In place of a validation: Ctrl-C at the one after `step` steps."""
    from qzo.training import loop

    validate = loop._validate

    def stopping(learner, *rest):
        if learner.steps == step:
            raise KeyboardInterrupt
        validate(learner, *rest)

    return stopping


def test_a_run_goes_on_with_its_own_rows_alone(model, tmp_path, capsys):
    assert command(model, tmp_path, "completion", tmp_path / "run", "--steps", "2") == 0
    file, run = tmp_path / "completion.jsonl", str(tmp_path / "run")
    file.write_text(lines([ROWS["completion"](n) for n in range(1, 41)]))
    data = ["--data", str(file), "--validation-samples", "4", "--test-samples", "3"]
    capsys.readouterr()
    assert main(["train", model, *data, *SHORT, "--out", run, "--resume"]) == 2
    assert "the run was begun with rows=" in errors(capsys)[0]
    assert main(["eval", run]) == 2
    assert "has other rows than" in errors(capsys)[0]
    assert main(["train", model, *data, "--test-samples", "5", *SHORT, "--out", run, "--resume"]) == 2
    assert "the run was begun with sizes=" in errors(capsys)[0]
    assert main(["eval", run, "--data", str(file), "--split", "validation", "--samples", "2"]) == 0
    assert "examples     2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what to train on is missing: --data FILE of your own, or --task NAME"),
        (["--task", "sst2", "--columns", "text=a"], "--columns is for --data without --task"),
        (["--data", "FILE", "--test-samples", "0"], "--test-samples 0 must be at least 1"),
        (["--data", "FILE", "--columns", "txt=a"], '--columns "txt=a" is not FIELD=COLUMN'),
        (["--data", "FILE", "--metric", "accuracy"], 'metric "accuracy" is not measured on conversations'),
        (["--data", "FILE", "--label-words", "w"], "label words are for texts with labels"),
        (["--data", "FILE", "--centering", "0.5"], "centering=0.5 is for label words, and chat.jsonl has none"),
        (["--data", "FILE", "--max-length", "3"], "max_length=3 leaves nothing to learn of"),
        (["--data", "FILE", "--device", "gpu"], "--device gpu cannot be used"),
        (["--data", "nowhere.csv"], "nowhere.csv cannot be read"),
    ],
)
def test_wrong_input_is_one_line_before_the_model_is_read(model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("qzo.training.tuned.start.model_with", lambda *_, **__: pytest.fail("the model was read"))
    file = str(write_kind(tmp_path, "chat"))
    options = [file if option == "FILE" else option for option in options]
    assert main(["train", model, *options, "--out", str(tmp_path / "run")]) == 2
    (error,) = errors(capsys)
    assert message in error and not (tmp_path / "run").exists()
