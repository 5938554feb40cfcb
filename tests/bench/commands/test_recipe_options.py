"""`--set`, `--peft-config` and `--recipe` of a command line: which methods run, by which recipe, on which rows."""

import json
import shlex
from pathlib import Path

import pytest

from bench.__main__ import main, parser
from bench.cases.case import BenchCase
from bench.cases.recipes.table import RECIPES
from bench.commands.recipe_options import chosen
from qzo.errors import QzoError

README = Path(__file__).parents[3] / "README.md"
FILE = """
model_name_or_path: meta-llama/Llama-3.1-8B
use_peft: true
lora_r: 8
max_length: 700
per_device_train_batch_size: 3
gradient_checkpointing: true
attn_implementation: flash_attention_2
"""


def ask(*arguments):
    return chosen(parser().parse_args(["run", *arguments]))


def test_a_file_gives_method_model_batch_length_and_attention_and_options_win_over_it(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(FILE)
    found = ask("--recipe", str(path))
    assert found.methods == ("lora",) and found.model(None) == "meta-llama/Llama-3.1-8B"
    assert (found.batch_size(None), found.seq_len(None, 128), found.attention(None)) == (3, 700, "flash")
    assert (found.batch_size(5), found.seq_len(64, 128), found.attention("math")) == (5, 64, "math")
    cell = found.cell(BenchCase("opt-125m", "lora"))
    assert cell.gradient_checkpointing and cell.recipe.peft["r"] == 8
    assert ask("--recipe", str(path), "--set", "r=4").recipes["lora"].peft["r"] == 4
    with pytest.raises(QzoError, match="is a recipe of lora; add it to --methods"):
        ask("--recipe", str(path), "--methods", "qzo")


def test_without_options_methods_are_those_of_the_table():
    found = ask("opt-125m", "--methods", "lora,qzo")
    assert not found.recipes and found.cell(BenchCase("opt-125m", "lora")).recipe is None
    assert (found.batch_size(None), found.seq_len(None, 128), found.batch_size(0)) == (1, 128, 0)
    with pytest.raises(QzoError, match="no model"):
        found.model(None)


def test_lengths_say_the_longest_row():
    found = ask("opt-125m", "--methods", "lora,qzo", "--set", "lengths=90x1,40x3")
    assert found.seq_len(None, 128) == 90
    with pytest.raises(QzoError, match="not the longest of the lengths, 90"):
        found.seq_len(64, 128)


def test_a_peft_configuration_takes_the_place_of_loras(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "VERA", "r": 16, "target_modules": ["q_proj"]}))
    found = ask("opt-125m", "--methods", "ft-bf16,lora", "--peft-config", str(path))
    assert found.recipes.keys() == {"lora"} and found.recipes["lora"].peft_class == "VeraConfig"
    assert found.recipes["lora"].arguments == RECIPES["lora"].arguments
    with pytest.raises(QzoError, match="concerns none of the methods"):
        ask("opt-125m", "--methods", "qzo", "--peft-config", str(path))


def test_fit_tells_what_was_asked_in_its_table_and_in_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bench.commands.fit.answer", lambda questions, source: [])
    file = tmp_path / "fit.json"
    main(["fit", "opt-125m", "--gpu", "t4", "--methods", "lora,qzo", "--set", "r=64", "--json", str(file)])
    assert json.loads(file.read_text())["settings"] == {"lora": "r=64"}
    assert "lora, other than in the table: r=64" in capsys.readouterr().out


def test_attention_of_the_command_is_that_of_the_recipe():
    packed = ask("opt-125m", "--methods", "lora", "--set", "packing=true")
    flash, math, own = (packed.cell(BenchCase("opt-125m", "lora", attention=name)) for name in ("flash", "math", None))
    assert (flash.recipe.padded, math.recipe.padded, own.recipe.padded) == (False, True, True)


def test_the_commands_of_the_readme_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(FILE)
    Path("adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    lines = [line.strip() for line in README.read_text(encoding="utf-8").splitlines()]
    options = ("--set", "--peft-config", "--recipe")
    commands = [line for line in lines if line.startswith("python -m bench") and any(word in line for word in options)]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command, comments=True)[3:]
        assert chosen(parser().parse_args(words)).recipes
