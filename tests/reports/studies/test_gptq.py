"""The report on GPTQ: what it must show, and that the committed one is that of the committed record."""

import json

from reports.studies.gptq.page import HERE, main, render


def record():
    layers = {f"model.layers.{n}.mlp.up_proj": {"rtn": 0.02, "gptq": 0.01 + 0.005 * n} for n in range(3)}
    return {
        "model": "tiny",
        "n_bits": 4,
        "group_size": 64,
        "symmetric": True,
        "text": "rotten-tomatoes",
        "calibration_tokens": 8192,
        "held_out_tokens": 4096,
        "seq_len": 128,
        "perplexity": {"16-bit": 20.0, "rtn": 25.0, "gptq": 22.0},
        "layers": layers,
        "environment": dict.fromkeys(("torch", "transformers", "python", "platform", "commit"), "x"),
    }


def test_layers_that_gptq_does_not_improve_are_counted():
    text = render(record())
    assert "below that of round-to-nearest on 2 of 3 layers" in text
    assert "0.75 in the median and 1.00 at worst" in text
    assert text.count("model.layers.") == 3 and "22.00" in text


def test_the_committed_report_is_that_of_the_committed_record():
    committed = json.loads((HERE / "gptq.json").read_text())
    assert (HERE / "gptq.md").read_text() == render(committed)


def test_gptq_is_better_on_every_layer_of_smollm2():
    committed = json.loads((HERE / "gptq.json").read_text())
    assert len(committed["layers"]) == 210 and committed["model"] == "smollm2-135m"
    assert all(errors["gptq"] < errors["rtn"] for errors in committed["layers"].values())
    assert committed["perplexity"]["gptq"] < committed["perplexity"]["rtn"]


def test_main_writes_the_report_beside_the_record(tmp_path, monkeypatch):
    (tmp_path / "gptq.json").write_text(json.dumps(record()))
    monkeypatch.setattr("reports.studies.gptq.page.HERE", tmp_path)
    assert main() == 0 and (tmp_path / "gptq.md").read_text().startswith("# tiny: GPTQ")
