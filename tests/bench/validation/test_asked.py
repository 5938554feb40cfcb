"""`--set`, `--peft-config` and `--recipe` of `bench validate`: which rows they change, and that a variant is told."""

import json
from dataclasses import replace

import pytest

from bench.__main__ import main
from bench.cases.case import BenchCase
from bench.cases.recipes.recipe import Recipe
from bench.cases.recipes.settings import parse_settings
from bench.cases.recipes.table import LORA
from bench.validation import recorded
from bench.validation.asked import AS_STATED, Asked, recipe_of
from bench.validation.compare import compare_row
from bench.validation.recipes import predict_row
from bench.worlds import cpu
from qzo.errors import QzoError

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}
PEFT = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PLAIN = {
    "model_id": "someone/tiny", "gpu": "NVIDIA H100 80GB HBM3", "architecture": SIZES | {"num_kv_heads": 4},
    "measured_mib": {"peak_allocated": 30.0},
}  # fmt: skip
RECIPE = Recipe("any", {"bf16": True}, PEFT, batch_size=1, lengths=(64,))
ROW = PLAIN | {"recipe": RECIPE.stated()}
ARCHIVE = PLAIN | {"method": "lora"}


def in_this_process(rows, options):
    return [compare_row(row, options) for row in rows]


def asked(*settings, **changes):
    return Asked(parse_settings(settings), **changes)


def test_a_setting_predicts_a_row_as_if_it_had_stated_it():
    by_hand = ROW | {"recipe": replace(RECIPE, peft=PEFT | {"r": 64}).stated()}
    found = compare_row(ROW, asked("r=64"))
    assert found["otherwise"] == "r=64"
    assert found["predicted"] == predict_row(by_hand) != predict_row(ROW)
    assert "otherwise" not in compare_row(ROW, asked("load_in_4bit=true"))


def test_another_adapter_is_that_of_rows_which_have_one():
    vera = asked(peft=("VeraConfig", {"r": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}))
    assert vera.changed(RECIPE).peft_class == "VeraConfig"
    assert vera.changed(replace(RECIPE, peft=None)).peft is None


def test_a_row_that_states_no_step_has_that_of_the_file_at_its_own_batch_and_length():
    by_file = Asked(recipe=RECIPE)
    assert recipe_of(by_file.completed(PLAIN)) == RECIPE
    wider = by_file.completed(PLAIN | {"batch_size": 3, "seq_len": 32})
    assert recipe_of(wider) == replace(RECIPE, batch_size=3, lengths=(32,))
    assert by_file.completed(ARCHIVE) == ARCHIVE and AS_STATED.completed(PLAIN) == PLAIN


def test_a_record_is_predicted_with_the_setting_too(llama_folder):
    record = cpu.run(BenchCase(str(llama_folder), "lora", device="cpu", seq_len=16, steps=3))
    more = asked("gradient_checkpointing=true")
    by_hand = BenchCase(
        str(llama_folder), "lora", gpu="cpu", seq_len=16, gradient_checkpointing=True, recipe=more.changed(LORA)
    )  # fmt: skip
    from bench.worlds import sim_cpu

    found = recorded.predict(record, more.changed)
    assert found["allocated"] == sim_cpu.run(by_hand)["peak"]["allocated"] < recorded.predict(record)["allocated"]


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([ROW], ["r=0"], "whole number from 1 on"),
        ([ROW], ["load_in_4bit=true"], "does not concern any; it is for qlora"),
        ([ROW], ["colour=red"], "no option of the Trainer"),
        ([ARCHIVE], ["r=4"], "no row of the file is a recipe"),
    ],
)
def test_what_concerns_no_row_is_told_before_the_work(rows, settings, words):
    with pytest.raises(QzoError, match=words):
        asked(*settings).check(rows)
    asked("r=4").check([ARCHIVE, ROW])


def test_the_command_predicts_rows_by_a_file_with_settings_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "bench.commands.validate.predict_all", lambda rows, asked: [compare_row(r, asked) for r in rows]
    )
    rows, file, out = tmp_path / "rows.jsonl", tmp_path / "sft.yaml", tmp_path / "out.json"
    rows.write_text(json.dumps(PLAIN | {"seq_len": 32}) + "\n")
    file.write_text("model_name_or_path: any\nuse_peft: true\ncolour: red\n")
    main(["validate", str(rows), "--recipe", str(file), "--set", "r=4", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["notes"][-2:] == ["not understood: colour", "1 of 1 rows predicted with r=4"]
    assert report["rows"][0]["status"] == "ok" and report["rows"][0]["case"]["seq_len"] == 32
    assert "1 of 1 rows predicted with r=4" in capsys.readouterr().out
    assert main(["validate", str(rows), "--set", "r=4"]) == 2
    assert "no row of the file is a recipe" in capsys.readouterr().err
