"""Signal and curvature of each layer against direct computation."""

import json

import pytest
import torch

import qzo
from bench.studies import layer_signal as signal
from bench.studies.accuracy import GPTQ, Models
from qzo import tasks
from qzo.checkpoints.load import load, load_tokenizer


@pytest.fixture
def parts(work):
    path = Models(work, 0).path(GPTQ)
    task = tasks.get("rotten-tomatoes")
    examples = task.splits(0)["train"][:6]
    return load(path, torch.float32).eval(), tasks.Encoder(task, load_tokenizer(str(path))), examples


def test_signal_and_curvature_are_what_their_definitions_say(parts):
    model, encoder, examples = parts
    found = signal.measure(model, encoder, examples)
    margins, gradients = [], []
    for example in examples:
        margin = signal._margins(model, encoder, [example])[0]
        name = next(iter(found))
        leaf = model.get_submodule(name.removesuffix(".scales")).scales
        gradients.append(torch.autograd.grad(margin, leaf)[0] * leaf.detach())
        margins.append(margin.detach())
    labels = torch.tensor([float(example.label) for example in examples])
    margins = torch.stack(margins)
    p = torch.sigmoid(margins - signal.balanced_prior(margins, labels))
    pairs = [
        float(((p[i] - labels[i]) * gradients[i] * (p[j] - labels[j]) * gradients[j]).sum())
        for i in range(6) for j in range(6) if i != j
    ]  # fmt: skip
    assert found[name]["signal"] == pytest.approx(sum(pairs) / 30, rel=1e-3)
    curvature = sum(float(p[i] * (1 - p[i]) * gradients[i].square().sum()) for i in range(6)) / 6
    assert found[name]["curvature"] == pytest.approx(curvature, rel=1e-3)
    alike = sum(float((gradients[i] * gradients[j]).sum()) for i in range(6) for j in range(6) if i != j) / 30
    assert found[name]["common"] == pytest.approx(float((p * (1 - p)).mean()) * alike, rel=1e-3)


def test_the_prior_that_is_taken_off_balances_the_predictions():
    margins, labels = torch.tensor([1.0, 2.0, 5.0, 1.5]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    prior = signal.balanced_prior(margins, labels)
    assert float(torch.sigmoid(margins - prior).mean()) == pytest.approx(0.5, abs=1e-6)


def test_the_command_writes_a_record(work, capsys):
    path, out = Models(work, 0).path(GPTQ), work / "signal.json"
    assert signal.main([str(path), "--out", str(out), "--samples", "3"]) == 0
    record = json.loads(out.read_text())
    assert record["layers"].keys() == qzo.scales(load(path)).keys() and record["samples"] == 3
    assert signal.main([str(path), "--out", str(out), "--samples", "1"]) == 2
    assert "--samples 1 is too few" in capsys.readouterr().err
