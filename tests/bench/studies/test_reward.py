"""The study of a reward: what is asked, what is scored, a run of each seed, and what a second call leaves alone."""

import json
from types import SimpleNamespace

import torch
from own_files import CHATML
from task_files import make_model, make_tokenizer

from bench.studies import reward
from bench.studies.yes_or_no import yes_or_no
from qzo import quantize
from qzo.checkpoints.save import save


def test_an_answer_that_begins_with_yes_or_no_as_a_word_is_worth_one():
    texts = ["Yes, dogs can", "No.", "No", "Nobody knows", "yes", " Yes", "The answer is Yes", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert yes_or_no(completions, prompts=[]) == [1, 1, 1, 0, 0, 0, 0, 0]


def test_every_question_is_there_once():
    asked = [row["prompt"][1]["content"] for row in reward.questions()]
    assert len(set(asked)) == len(asked) == 192 and "Can frogs climb trees?" in asked


def test_seeds_that_the_record_lacks_are_trained_and_no_others(tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    save(quantize(make_model(len(tokenizer), torch.bfloat16), group_size=32), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(reward, "gguf_source", lambda _: SimpleNamespace(weights=tmp_path / "model"))
    monkeypatch.setattr(reward, "SIZES", {"validation": 2, "test": 5})
    small = {"batch_size": 2, "directions": 2, "layers": "1-1", "eval_every": 1}
    monkeypatch.setattr(reward, "OPTIONS", {**reward.OPTIONS, **small})
    asked = ["--out", str(tmp_path / "reward.json"), "--work", str(tmp_path / "work"), "--steps", "2"]
    assert reward.main([*asked, "--seeds", "1"]) == 0
    record = json.loads((tmp_path / "reward.json").read_text())
    (entry,) = record["entries"]
    assert entry["before"]["count"] == entry["after"]["count"] == 5 and len(entry["before"]["answers"]) == 4
    assert [point["step"] for point in entry["curve"]] == [0, 1, 2] and len(entry["losses"]) == 2
    monkeypatch.setattr(reward, "measure", lambda source, settings, work: {**entry, "seed": settings.seed})
    assert reward.main([*asked, "--seeds", "0,1"]) == 0
    assert [e["seed"] for e in json.loads((tmp_path / "reward.json").read_text())["entries"]] == [0, 1]
    assert reward.main([]) == 2 and reward.main([*asked, "--seeds", "a"]) == 2 and "--seeds" in capsys.readouterr().err
