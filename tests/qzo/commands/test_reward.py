"""`qzo train --reward`: a function of what a model writes is trained on, resumed, scored; told what is wrong."""

import json

import pytest
import torch
from crashes import kill_at, operations
from own_files import CHATML, lines
from task_files import make_model, make_tokenizer
from told import errors

from qzo import quantize
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.durable import read_tensors

SCORES = """
def vowels(prompts, completions, animal, **columns):
    assert len(prompts) == len(completions) == len(animal) and "completion_ids" in columns
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in texts]

def constant(completions, **columns):
    return [1] * len(completions)

def broken(prompts, completions):
    return [1 / (not prompt.startswith("Where does finch 7 ")) for prompt in prompts]

def needy(completions, answer):
    return [0.0] * len(completions)

number = 3
"""
SHORT = [
    "--preset",
    "paper",
    "--batch-size",
    "4",
    "--lr",
    "1e-3",
    "--relative",
    "--eps",
    "5e-2",
    "--eval-every",
    "2",
    "--max-new-tokens",
    "3",
]
SPLITS = ["--validation-samples", "4", "--test-samples", "3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a GPTQ checkpoint with a tokenizer that has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("reward") / "model", make_tokenizer()
    tokenizer.chat_template = CHATML
    save(quantize(make_model(len(tokenizer), torch.float32), group_size=32), folder, checkpoint_format="gptq")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A file of prompts with a further column, and beside it one with functions."""
    (tmp_path / "score.py").write_text(SCORES)
    rows = [{"prompt": f"Where does finch {n} sleep?", "animal": "finch"} for n in range(20)]
    (tmp_path / "asked.jsonl").write_text(lines(rows))
    return tmp_path


def command(model, data, out, *more, function="vowels"):
    reward = ["--reward", f"{data / 'score.py'}:{function}"]
    return main(
        ["train", model, "--data", str(data / "asked.jsonl"), *reward, *SPLITS, *SHORT, "--out", str(data / out), *more]
    )


def test_a_reward_is_trained_resumed_to_the_bit_and_scored(model, data, capsys):
    more = ["--estimator", "population", "--normalize", "--directions", "3", "--generations", "2", "--layers", "1-1"]
    assert command(model, data, "whole", *more, "--steps", "4") == 0
    told = capsys.readouterr()
    assert "prompts, whose completions a function scores; metric reward" in told.err
    assert ":vowels of completions, sampled at temperature 1, of up to 3 tokens, 2 for each prompt" in told.err
    assert "\nreward " in told.out and "\ngreedy_reward " in told.out
    assert command(model, data, "run", *more, "--steps", "2") == 0
    assert main(["train", model, "--out", str(data / "run"), "--steps", "4", "--resume"]) == 0
    best = [(data / name / "best.safetensors").read_bytes() for name in ("whole", "run")]
    journals = [(data / name / "run.journal").read_bytes() for name in ("whole", "run")]
    assert best[0] == best[1] and journals[0] == journals[1]
    result = json.loads((data / "run/result.json").read_text())
    assert result["first"]["count"] == 4 and result["test"]["count"] == 3
    assert main(["eval", str(data / "run"), "--json", str(data / "eval.json")]) == 0
    assert json.loads((data / "eval.json").read_text())["reward"] == result["test"]["reward"]
    assert f"\nreward       {result['test']['reward']:.4f}\n" in capsys.readouterr().out


def test_a_reward_run_killed_in_the_midst_of_a_line_of_its_journal_ends_in_the_same_bits(model, data):
    def live(out):
        estimator = ["--estimator", "population", "--directions", "2"]
        return command(model, data, out, *estimator, "--steps", "3", "--resume")

    names = operations(data / "whole", lambda: live("whole"))
    moments = [number for number, name in enumerate(names) if "run.journal, half" in name]  # the header, then the steps
    assert kill_at(data / "run", moments[2], lambda: live("run"))
    assert not (data / "run/result.json").exists()
    assert live("run") == 0
    for name in ("best.safetensors", "run.journal"):
        assert (data / "run" / name).read_bytes() == (data / "whole" / name).read_bytes()


def test_a_model_and_a_run_are_scored_and_a_changed_function_is_told(model, data, capsys):
    assert command(model, data, "run", "--steps", "1") == 0
    result = json.loads((data / "run/result.json").read_text())
    (data / "score.py").write_text(SCORES + "\n")
    capsys.readouterr()
    assert main(["eval", str(data / "run"), "--split", "validation"]) == 0
    assert "score.py:vowels has changed since" in capsys.readouterr().err
    asked = ["--data", str(data / "asked.jsonl"), "--reward", f"{data / 'score.py'}:vowels", "--max-new-tokens", "3"]
    asked += ["--split", "validation", *SPLITS, "--json", str(data / "eval.json")]
    assert main(["eval", model, *asked, "--keep-weights"]) == 0
    assert json.loads((data / "eval.json").read_text())["reward"] == result["first"]["reward"]


def test_a_function_whose_file_changed_does_not_go_on(model, data, capsys):
    assert command(model, data, "run", "--steps", "1") == 0
    (data / "score.py").write_text(SCORES + "\n")
    capsys.readouterr()
    assert command(model, data, "run", "--steps", "2", "--resume") == 2
    assert "the file of the reward has changed since the run was begun" in errors(capsys)[0]


def test_a_reward_that_never_moves_is_told_and_ends_no_run(model, data):
    with pytest.warns(UserWarning, match="10 steps in a row.*a reward") as told:
        assert command(model, data, "run", "--steps", "11", function="constant") == 0
    assert len(told) == 1
    kept = read_tensors(data / "run/best.safetensors")[1]
    assert kept["step"] == "0"


def test_conversations_are_asked_in_the_words_of_the_template(model, data, capsys):
    rows = [{"prompt": [{"role": "user", "content": f"Who is {n}?"}], "animal": "newt"} for n in range(20)]
    (data / "asked.jsonl").write_text(lines(rows))
    assert command(model, data, "run", "--steps", "1", "--temperature", "0") == 0
    told = capsys.readouterr()
    assert "assistant\\n[...]" in told.err and "greedy" in told.err and "greedy_reward" not in told.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "score.py"], 'reward="score.py" is not MODULE:FUNCTION'),
        (["--reward", "gone.py:f"], "there is no file gone.py"),
        (["--reward", "no_such_module:f"], "there is no module no_such_module in"),
        (["--reward", "SCORE:absent"], "has no function absent; it has vowels, constant, broken, needy"),
        (["--reward", "SCORE:number"], "has no function number"),
        (["--reward", "SCORE:needy"], "needy wants answer, and the rows have no such column: they have animal"),
        (["--reward", "SCORE:vowels", "--metric", "f1"], 'metric "f1" is not measured on prompts'),
        (["--reward", "SCORE:vowels", "--temperature", "-1"], "temperature=-1.0 is not 0 or a positive number"),
        (["--reward", "SCORE:vowels", "--temperature", "0", "--generations", "2"], "are all the same text"),
        (["--reward", "SCORE:vowels", "--columns", "prompt=animal,text=prompt"], None),
        (["--generations", "2"], "--generations is for --reward MODULE:FUNCTION"),
        (["--reward", "SCORE:vowels", "--max-length", "3"], "max_length=3 leaves nothing for a prompt"),
        (["--reward", "SCORE:vowels", "--directions", "1"], "needs directions >= 2"),
    ],
)
def test_wrong_input_is_one_line_before_the_model_is_read(model, data, capsys, monkeypatch, options, message):
    monkeypatch.setattr("qzo.training.tuned.start.model_with", lambda *_, **__: pytest.fail("the model was read"))
    options = [option.replace("SCORE", str(data / "score.py")) for option in options]
    defaults = ["--max-new-tokens", "3"] if "--reward" in options else []
    out = ["--out", str(data / "run")]
    assert main(["train", model, "--data", str(data / "asked.jsonl"), *defaults, *options, *out]) == 2
    (error,) = errors(capsys)
    assert (message or "vowels wants animal") in error and not (data / "run").exists()


def test_a_function_that_raises_names_the_row_and_leaves_no_run(model, data, capsys):
    assert command(model, data, "run", "--steps", "1", "--batch-size", "14", function="broken") == 2
    (error,) = errors(capsys)
    assert "asked.jsonl, line 8: " in error and "broken raised ZeroDivisionError in line 11 of" in error
    assert not (data / "run").exists()


def test_a_reward_needs_no_number_by_hand(model, data):
    out = data / "preset"
    reward = ["--reward", f"{data / 'score.py'}:vowels", "--max-new-tokens", "3"]
    few = ["--steps", "1", "--batch-size", "2", *SPLITS, "--out", str(out)]
    assert main(["train", model, "--data", str(data / "asked.jsonl"), *reward, *few]) == 0
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["preset"] == "reward" and settings["estimator"] == "population" and settings["normalize"]
