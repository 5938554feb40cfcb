"""The step benchmark, on a model of two layers: that it measures what it says, not how long it takes."""

import json
from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cases.models import resolve
from bench.studies import step as step_seconds
from qzo.errors import QzoError
from qzo.kernels import native


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(step_seconds, "MODEL", str(tmp_path / "tiny"))
    few = {name: step_seconds.FORMATS[name] for name in ("gptq", "gguf-q4_1", "aqlm-2x8")}
    monkeypatch.setattr(step_seconds, "FORMATS", few)
    return tmp_path


def test_every_action_is_timed_in_every_turn(tiny):
    assert step_seconds.main(["--out", str(tiny / "step.json"), "--turns", "2"]) == 0
    (record,) = json.loads((tiny / "step.json").read_text())
    assert record["seconds"].keys() == {"float32", "bfloat16"}
    for taken in record["seconds"].values():
        forwards = {"two forward passes", "two forward passes without the head"}
        ways = {"qzo", step_seconds.PHILOX, *({"qzo by operators"} if native.is_compiled() else ())}
        ways |= {"qzo by panels"} if native.is_compiled() and step_seconds.has_tiles() else set()
        assert taken.keys() == {*forwards, *ways, "mezo", "mezo-reference"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken.values())
    assert record["formats"].keys() == {"gptq", "gguf-q4_1"} and all(map(all, record["formats"].values()))
    memory = record["memory"]
    assert memory["layer"] == 2 * 64 * 128 and memory["peak"] > memory["floor"] > 0 < memory["activations"]


def test_a_record_takes_the_place_of_that_of_its_kind_of_cpu(tiny, monkeypatch):
    command = ["--out", str(tiny / "step.json"), "--turns", "1"]
    monkeypatch.setattr(step_seconds, "seconds", lambda dtype, turns: {})
    monkeypatch.setattr(step_seconds, "formats", lambda turns: {})
    monkeypatch.setattr(step_seconds, "memory", dict)
    none, bf16, tiles = (False, False), (True, False), (True, True)
    for kind, kinds in (
        (none, [none]), (tiles, [tiles, none]), (bf16, [bf16, tiles, none]), (tiles, [bf16, tiles, none]),
    ):  # fmt: skip
        monkeypatch.setattr(step_seconds, "has_bf16", lambda kind=kind: kind[0])
        monkeypatch.setattr(step_seconds, "has_tiles", lambda kind=kind: kind[1])
        assert step_seconds.main(command) == 0
        assert [step_seconds.kind(record) for record in json.loads((tiny / "step.json").read_text())] == kinds


def test_a_cpu_with_tiles_is_timed_with_compiled_products_too(tiny, monkeypatch):
    monkeypatch.setattr(step_seconds, "has_tiles", lambda: True)
    monkeypatch.setattr(native, "is_compiled", lambda: True)
    source = resolve(step_seconds.MODEL)
    batch = step_seconds.text.batch(source, 2, 8, seed=0, step=0)
    asked = []
    monkeypatch.setattr(native, "products_on_tiles", lambda: asked.append(1) or nullcontext())
    step_seconds._steps(source, torch.bfloat16, batch)["qzo by panels"]()
    assert asked == [1]


def test_a_format_whose_library_is_missing_is_left_out(tiny, monkeypatch):
    def quantize(model, name):
        raise QzoError("pip install it")

    monkeypatch.setattr(step_seconds, "quantize_as", quantize)
    assert step_seconds.formats(1) == {}


def test_no_turns_is_an_error(tiny, capsys):
    assert step_seconds.main(["--out", str(tiny / "step.json"), "--turns", "0"]) == 2
    assert "--turns 0 is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "not JSON", "[1]", '[{"model": "other"}]', "[[]]"])
def test_a_file_of_another_kind_is_told_before_anything_is_measured(tiny, capsys, content):
    (tiny / "step.json").write_text(content)
    assert step_seconds.main(["--out", str(tiny / "step.json")]) == 2
    assert "holds no records of this benchmark" in capsys.readouterr().err
    assert (tiny / "step.json").read_text() == content


def test_the_model_is_that_of_the_catalog():
    assert resolve(step_seconds.MODEL).name == "smollm2-135m"
