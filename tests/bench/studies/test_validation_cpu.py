"""The comparison of the simulated with the measured CPU: what its table says, and one run of it."""

import pytest
from transformers import OPTConfig

from bench.records.record import build_record, failed_record
from bench.studies.validation_cpu import TITLE, document, error_percent, main, section

CASE = {
    "model": "tiny", "method": "mezo", "batch_size": 1, "seq_len": 8, "dtype": None, "attention": None,
    "gradient_checkpointing": False, "optimizer": None, "quantization": None, "gpu": None,
}  # fmt: skip
EMPTY = dict.fromkeys(("torch", "transformers", "python", "platform", "gpu", "driver", "commit", "dirty"))


def record(allocated: int, world: str = "measured-cpu") -> dict:
    held = {"weights": allocated}
    return build_record(
        CASE, world, EMPTY, total=1, trainable=1, allocated=allocated, at_peak=held, floor=1, phases={}
    )  # fmt: skip


def test_the_error_is_that_of_the_prediction_and_signed():
    assert error_percent((record(102), record(100))) == pytest.approx(2)
    assert error_percent((record(99), record(100))) == pytest.approx(-1)


def test_the_table_has_statistics_and_a_failed_cell_its_reason():
    failed = failed_record(CASE, "simulated", EMPTY, status="error", message="no such layer")
    text = section([(record(2_000), record(1_000)), (record(990), record(1_000)), (failed, record(1_000))])
    row = next(line for line in text.splitlines() if line.startswith("| tiny"))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["tiny", "mezo", "2,000", "1,000", "+100.0000"]
    assert "no such layer" in text
    assert "mean 50.5000" in text and "mean signed +49.5000; 2 of 3 cells" in text


def test_one_small_model_is_simulated_and_run(tmp_path, capsys):
    OPTConfig(
        hidden_size=256, word_embed_proj_dim=256, ffn_dim=512, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=500, architectures=["OPTForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    table = tmp_path / "table.md"
    options = ["--models", str(tmp_path), "--methods", "qzo", "--seq-len", "16", "--out", str(table)]
    assert main(options) == 0
    assert table.read_text(encoding="utf-8").strip() == f"{TITLE}\n{capsys.readouterr().out.strip()}"
    assert "1 of 1 cells" in table.read_text(encoding="utf-8")


def test_a_section_takes_the_place_of_that_of_its_kind_of_cpu():
    tiles, none = "## A CPU with AMX\n\nsome\n", "## A CPU with no bf16 instructions\n\nother\n"
    text = document(document(TITLE, tiles), none)
    assert text == f"{TITLE}\n{tiles}\n{none}"
    changed = tiles.replace("some", "new")
    assert document(text, changed) == f"{TITLE}\n{changed}\n{none}"


def test_an_unknown_model_is_one_line_and_exit_code_two(tmp_path, capsys):
    assert main(["--models", "opt-126m", "--out", str(tmp_path / "table.md")]) == 2
    assert capsys.readouterr().err.startswith("error: unknown model 'opt-126m'")
