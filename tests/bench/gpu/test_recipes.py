"""Recipes as the Trainer of transformers runs them: the dry run, and that each recipe is one its libraries know."""

import dataclasses
import json

import peft
import pytest
import torch
from transformers import BitsAndBytesConfig, TrainingArguments

from bench.gpu import recipes


def test_the_dry_run_writes_each_recipe_beside_what_came_of_it(llama_folder, tmp_path):
    arguments = ["--device", "cpu", "--model", str(llama_folder), "--out", str(tmp_path / "cpu.jsonl")]
    assert recipes.main([*arguments, "--recipes", "lora, rows of many lengths"]) == 0
    (row,) = map(json.loads, (tmp_path / "cpu.jsonl").read_text().splitlines())
    assert len(row["steps"]) == recipes.STEPS + 1  # before the first, and after each
    assert 0 < row["trainable"] < row["parameters"] and row["measured_mib"] == {} and row["versions"]["peft"]
    assert row["recipe"]["lengths"] == [200, 900, 450, 1024, 70, 600]


def test_a_recipe_states_options_that_the_libraries_have():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len({recipe.name for recipe in recipes.RECIPES}) == len(recipes.RECIPES)
    for recipe in recipes.RECIPES:
        assert set(recipe.arguments) <= known
        assert recipe.peft is None or getattr(peft, recipe.peft_class)(**recipe.peft)
        assert recipe.quantization is None or BitsAndBytesConfig(**recipe.quantization)


def test_rows_are_padded_on_the_right_to_the_longest_of_their_batch():
    data = recipes.rows(recipes.Recipe("", lengths=(3, 5)), 10, 1)
    batch = recipes.padded(data[:2])
    assert batch["input_ids"].shape == (2, 5)
    assert batch["labels"][0, 3:].tolist() == [-100, -100] and batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert torch.equal(batch["input_ids"][0, :3], data[0]["input_ids"])


@pytest.mark.parametrize("error, status", [("ImportError: no bitsandbytes", "unsupported"), ("ValueError: x", "error")])
def test_a_recipe_without_its_package_is_unsupported_and_another_failure_is_an_error(monkeypatch, error, status):
    ran = type("Ran", (), {"returncode": 1, "stderr": error})
    monkeypatch.setattr(recipes.subprocess, "run", lambda *_, **__: ran)
    row = recipes._in_a_process("cpu", {"50GB": "."}, recipes.Recipe("any"))
    assert (row["status"], row["message"]) == (status, error)
