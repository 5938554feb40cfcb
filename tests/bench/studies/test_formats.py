"""The record of all formats: sizes, one training, and what a second call leaves alone."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cases.quantizations import quantize_as
from bench.studies import formats
from qzo import QZO, scales


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_bytes_and_weights_are_those_of_the_quantized_layers():
    model = tiny()
    quantize_as(model, "gptq-4", 32)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    found = formats.sizes(model)
    assert (found["layers"], found["weights"], found["scales"]) == (14, weights, weights // 32)
    codes, zeros, groups = weights // 2, weights // 32 // 2, 2 * (6 * 64 + 128) * 4
    assert found["quantized_bytes"] == codes + zeros + weights // 32 * 4 + groups


def test_a_watched_step_holds_the_model_the_masters_and_no_second_model():
    model = tiny()
    quantize_as(model, "gptq-4", 32)
    optimizer = QZO(scales(model), relative=True)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(state["master"].nbytes for state in optimizer.state.values())
    input_ids = torch.randint(0, 96, (1, 8))
    value, peak = formats.watched(model, optimizer, lambda: model(input_ids, labels=input_ids).loss)
    assert value > 0 and held < peak < 2 * held


def test_only_what_the_record_lacks_is_measured_again(tmp_path, monkeypatch):
    calls = []

    def measure(name, settings):
        calls.append(name)
        if name == "hqq-4":
            raise formats.QzoError("no hqq here")
        return {"format": name, "steps": settings.steps}

    monkeypatch.setattr(formats, "measure", measure)
    file = tmp_path / "record.json"
    options = ["--out", str(file), "--formats", "nf4,awq,hqq-4"]
    assert formats.main(options) == 0
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [entry["format"] for entry in record["entries"]] == ["awq", "nf4", "hqq-4"]
    assert record["entries"][-1] == {"format": "hqq-4", "missing": "no hqq here"}
    assert formats.main(options) == 0 and calls == ["nf4", "awq", "hqq-4", "hqq-4"]
    assert formats.main([*options, "--steps", "3"]) == 0 and len(calls) == 7
    assert len(json.loads(file.read_text(encoding="utf-8"))["entries"]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--formats", "nf5"], "unknown format 'nf5'; did you mean nf4"), (["--steps", "1"], "at least 2 steps")],
)
def test_wrong_options_are_one_line(tmp_path, capsys, options, words):
    assert formats.main(["--out", str(tmp_path / "record.json"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_every_format_but_drawn_codes_is_in_a_default_run():
    assert formats.NAMES[0] == formats.STRAIGHT and "nf4" in formats.NAMES and "aqlm-1x16" not in formats.NAMES
    assert len(formats.NAMES) == len(set(formats.NAMES))
