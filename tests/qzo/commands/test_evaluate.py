"""`qzo eval`."""

import json

import pytest
import torch
from task_files import make_model, make_tokenizer, write_task

from qzo import load, quantize, tasks
from qzo.checkpoints.save import save
from qzo.commands.main import main


@pytest.fixture
def place(tmp_path):
    """A folder with a GPTQ checkpoint of 4 bits and its tokenizer, and two tasks."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), torch.bfloat16)
    quantize(model, group_size=32)
    save(model, tmp_path / "model", checkpoint_format="gptq")
    tokenizer.save_pretrained(tmp_path / "model")
    write_task(tmp_path / "data", "sst2")
    write_task(tmp_path / "data", "copa")
    write_task(tmp_path / "data", "squad")
    return tmp_path


def evaluate(place, *options):
    return main(["eval", str(place / "model"), "--data", str(place / "data"), *options])


def test_eval_prints_a_table_and_writes_what_python_gives(place, capsys):
    file = place / "result.json"
    options = ["--samples", "7", "--seed", "2", "--batch-size", "3", "--dtype", "float32"]
    assert evaluate(place, "--task", "sst2", *options, "--json", str(file)) == 0
    encoder = tasks.Encoder(tasks.get("sst2", place / "data"), make_tokenizer())
    examples = encoder.task.splits(2)["test"][:7]
    expected = tasks.evaluate(load(place / "model", torch.float32), encoder, examples)
    record = json.loads(file.read_text())
    assert {name: record[name] for name in expected} == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-5)}
    assert record["metric"] == "accuracy" and record["prior"] is None and record["seed"] == 2
    table = capsys.readouterr().out
    assert f"accuracy     {100 * expected['accuracy']:.1f} %" in table and "sst2, test split, seed 2" in table
    assert "predictions  terrible " in table and "prior" not in table


def test_eval_of_other_splits_and_with_a_prior(place, capsys):
    assert evaluate(place, "--task", "sst2", "--split", "validation", "--calibrated") == 0
    table = capsys.readouterr().out
    assert "examples     10\n" in table and "prior        -" in table
    assert evaluate(place, "--task", "squad", "--samples", "3") == 0
    table = capsys.readouterr().out
    assert table.index("f1 ") < table.index("em ") and "answered " in table


def test_eval_says_how_many_prompts_were_cut(place, capsys):
    file = place / "result.json"
    assert evaluate(place, "--task", "squad", "--samples", "3", "--max-length", "80", "--json", str(file)) == 0
    table, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["max_length"] == 80 and record["cut"] == 0 and "cut " not in table
    assert evaluate(place, "--task", "sst2", "--samples", "3", "--max-length", "8", "--json", str(file)) == 0
    table, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["cut"] == 3 and "cut          3 prompts, longer than 8 tokens: their texts at the beginning" in table
    assert evaluate(place, "--task", "sst2", "--samples", "3", "--json", str(file)) == 0
    assert json.loads(file.read_text())["max_length"] == 512  # the model's positions


def test_a_model_that_overflows_has_no_accuracy(place, capsys):
    model = load(place / "model", torch.float16)
    model.model.norm.weight.data *= 6e4
    save(model, place / "over", checkpoint_format="gptq")
    make_tokenizer().save_pretrained(place / "over")
    command = ["eval", str(place / "over"), "--data", str(place / "data"), "--task", "sst2"]
    assert main([*command, "--dtype", "float16"]) == 2
    captured = capsys.readouterr()
    assert "the logits are not finite in float16" in captured.err and "--dtype bfloat16" in captured.err
    assert not captured.out
    assert main([*command, "--dtype", "bfloat16"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "has no data file; known are *.jsonl"),
        (["--task", "sst3"], 'unknown task "sst3"; did you mean sst2'),
        (["--task", "rte"], "has no train.jsonl, nor train.jsonl.gz"),
        (["--task", "copa", "--calibrated"], "--calibrated needs a task with label words; copa has none"),
        (["--task", "sst2", "--samples", "0"], "--samples 0 must be at least 1"),
        (["--task", "sst2", "--batch-size", "-1"], "--batch-size -1 must be at least 1"),
        (["--task", "sst2", "--max-length", "3"], "max_length=3 is too short for sst2"),
        (["--task", "sst2", "--max-length", "513"], "--max-length 513 is more than the 512 positions"),
        (["--task", "sst2", "--json", "nowhere/file"], "--json nowhere/file: there is no such folder"),
        (["--task", "sst2", "--split", "dev"], "invalid choice: 'dev'"),
        (["--task", "sst2", "--device", "gpu"], "--device gpu"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(place, capsys, options, message):
    assert evaluate(place, *options) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not captured.out and "Traceback" not in captured.err


def test_a_wrong_label_is_found_before_the_model_is_loaded(place, capsys):
    file = place / "data/sst2/train.jsonl"
    file.write_text(file.read_text().replace('"label": 1', '"label": 3', 1))
    assert evaluate(place, "--task", "sst2") == 2
    assert f'error: {file}, line 2: unknown label 3 in "label"; it must be one of 0, 1\n' in capsys.readouterr().err
    assert main(["eval", "nowhere", "--task", "sst2", "--data", str(place / "data")]) == 2
    assert "line 2" in capsys.readouterr().err
