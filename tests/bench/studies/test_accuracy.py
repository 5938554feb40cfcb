"""The runs behind the learning report, on a model of two layers and real reviews."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import qzo
from bench.cases import weights
from bench.cases.models import ModelSource
from bench.studies import accuracy
from bench.studies.accuracy import GGUF, GPTQ, RTN, SIXTEEN, Models, Row

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
ZEROTH = {"lr": 1e-3, "layers": "1-1", "directions": 4}


def run(work, *options):
    return accuracy.main(["--out", str(work / "record.json"), "--work", str(work), "--seeds", "1", *options])


def test_every_kind_of_row_is_run_once_and_recorded(work, monkeypatch):
    rows = (
        Row("zero-shot GPTQ, calibrated", GPTQ, calibrated=True),
        Row("QZO GPTQ", GPTQ, "qzo", options=ZEROTH),
        Row("MeZO 16-bit", SIXTEEN, "mezo", options=ZEROTH),
        Row("full fine-tuning", SIXTEEN, "ft", options={"lr": 1e-4}),
    )
    monkeypatch.setattr(accuracy, "ROWS", rows)
    assert run(work) == 0
    record = json.loads((work / "record.json").read_text())
    assert [entry["row"] for entry in record["entries"]] == [row.name for row in rows]
    zero, tuned, mezo, full = record["entries"]
    assert all(entry["test"]["count"] == 1000 and entry["seed"] == 1 for entry in record["entries"])
    assert zero["settings"] is None and zero["forward_passes"] == 0
    assert tuned["forward_passes"] == mezo["forward_passes"] == 16 and tuned["steps"] == 2 and full["steps"] == 3
    assert [point["step"] for point in tuned["curve"] if "accuracy" in point] == [0, 1, 2]
    assert tuned["settings"]["layers"] == "1-1" and tuned["settings"]["dtype"] == "float32"

    def never(*arguments):
        raise AssertionError("run again")

    monkeypatch.setattr(accuracy, "measure", never)
    assert run(work) == 0  # all of it is there


def test_a_row_whose_settings_changed_is_run_again(work, monkeypatch):
    ran = []
    monkeypatch.setattr(
        accuracy, "measure", lambda row, seed, *rest: ran.append(row.name) or entry(row.name, seed, row.settings(seed))
    )
    for lr in (1e-3, 1e-3, 2e-3):
        monkeypatch.setattr(accuracy, "ROWS", (Row("QZO GPTQ", GPTQ, "qzo", options={"lr": lr}),))
        assert run(work) == 0
    assert ran == ["QZO GPTQ"] * 2 and len(accuracy.read(work / "record.json")) == 1


def entry(name, seed, settings):
    return {"row": name, "seed": seed, "settings": settings.to_json()}


def test_the_committed_record_lacks_nothing(tmp_path, monkeypatch):
    """Entries of before an option came count as made with its default."""
    committed = Path(accuracy.__file__).parents[2] / "reports" / "studies" / "accuracy" / "record.json"
    shutil.copy(committed, tmp_path / "record.json")

    def never(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(accuracy, "measure", never)
    assert accuracy.main(["--out", str(tmp_path / "record.json"), "--work", str(tmp_path)]) == 0


def test_the_models_are_those_that_the_rows_name(work):
    models = Models(work, 1)
    layers = {name: qzo.load(models.path(name)).model.layers[0].mlp.up_proj for name in (SIXTEEN, RTN, GPTQ)}
    assert not isinstance(layers[SIXTEEN], qzo.QuantLinear)
    assert layers[RTN].group_size == layers[GPTQ].group_size == 32
    assert not torch.equal(layers[RTN].qweight, layers[GPTQ].qweight)
    assert models.path(RTN) == Models(work, 2).path(RTN) and models.path(GPTQ) != Models(work, 2).work / "models/gptq"


def test_the_gguf_row_trains_the_models_own_file(work, monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    monkeypatch.setattr(weights, "resolve", lambda _: ModelSource("m", LlamaConfig(**HEADS), weights=file))
    assert Models(work, 1).path(GGUF) == file
    monkeypatch.setattr(weights, "resolve", lambda _: ModelSource("m", LlamaConfig(**HEADS)))
    with pytest.raises(qzo.QzoError, match="needs its GGUF"):
        Models(work, 1).path(GGUF)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "qzo"], 'unknown row "qzo"; rows are zero-shot-16-bit'),
        (["--seeds", "a"], '--seeds "a" is not a comma-separated list'),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(work, capsys, options, message):
    assert run(work, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
