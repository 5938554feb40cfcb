"""Replay of a journal: `qzo replay MODEL JOURNAL [OUT]`, and models that it does not belong to."""

import json

import pytest
import torch
from tiny import Tiny

from qzo import QZO, Journal, MeZO, QzoError, label_loss, load, quantize, replay, scales, trainable
from qzo.checkpoints.save import save
from qzo.commands.main import main


@pytest.fixture
def run(make_model, input_ids, tmp_path):
    """A GPTQ checkpoint in the v2 format, tuned for five steps under a journal; returns the tuned scales."""
    save(
        quantize(make_model(dtype=torch.bfloat16), 4, 32, symmetric=False),
        tmp_path / "model",
        checkpoint_format="gptq_v2",
    )
    (tmp_path / "model/tokenizer.json").write_text("{}")
    model = load(tmp_path / "model")
    optimizer = QZO(scales(model), lr=1e-5)
    with Journal(tmp_path / "run.journal", model, optimizer, snapshot_every=3) as journal:
        optimizer.register_step_post_hook(journal.record)
        for step in range(5):
            optimizer.step(lambda: float("nan") if step == 1 else label_loss(model, input_ids, input_ids))  # noqa: B023
    return {name: scale.clone() for name, scale in scales(model).items()}


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("options", [[], ["--no-snapshot"]])
def test_replay_writes_the_tuned_model_in_the_format_it_came_in(run, tmp_path, capsys, options):
    before = files(tmp_path / "model")
    paths = [str(tmp_path / name) for name in ("model", "run.journal", "out")]
    assert main(["replay", *paths, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == ["steps", "5", "skipped", "1"] and not captured.err
    tuned = load(tmp_path / "out")
    assert all(torch.equal(scale, run[name]) for name, scale in scales(tuned).items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert (tmp_path / "out/tokenizer.json").exists() and files(tmp_path / "model") == before


def test_replay_without_out_only_checks(run, tmp_path, capsys):
    assert main(["replay", str(tmp_path / "model"), str(tmp_path / "run.journal")]) == 0
    assert capsys.readouterr().out.split()[:2] == ["steps", "5"]
    assert not (tmp_path / "out").exists()


def test_a_torn_last_line_is_a_notice(run, tmp_path, capsys):
    journal = tmp_path / "run.journal"
    journal.write_bytes(journal.read_bytes()[:-4])
    assert main(["replay", str(tmp_path / "model"), str(journal)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("notice: ") and "the last line, 6, is torn and was dropped" in captured.err
    assert captured.out.split()[:2] == ["steps", "4"]


@pytest.mark.parametrize("case", ["other", "damaged", "missing", "unquantized", "full", "mezo"])
def test_errors_are_one_line_and_exit_code_2(run, make_model, tmp_path, capsys, case):
    model, journal, out = (tmp_path / name for name in ("model", "run.journal", "out"))
    message = "journal of another model"
    if case == "other":
        other = make_model(dtype=torch.bfloat16).requires_grad_(False)
        other.model.layers[0].mlp.up_proj.weight.zero_()
        model = tmp_path / "other"
        save(quantize(other, 4, 32, symmetric=False), model, checkpoint_format="gptq_v2")
    elif case == "damaged":
        journal.write_bytes(journal.read_bytes().replace(b"\n2 0 ", b"\n2 1 "))
        message = "line 4 is damaged"
    elif case == "missing":
        journal, message = tmp_path / "nowhere", "is not a file"
    elif case == "unquantized":
        model, message = tmp_path / "plain", "which the model does not have"
        make_model(dtype=torch.bfloat16).save_pretrained(model)
    elif case == "full":
        out, message = model, "not an empty folder"
    else:
        weights = make_model(dtype=torch.bfloat16)
        journal, message = tmp_path / "mezo.journal", "leave OUT away"
        Journal(journal, weights, MeZO(weights.named_parameters())).close()
    assert main(["replay", str(model), str(journal), str(out)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not captured.out and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_journal_of_offsets_is_refused_by_a_model_without(tmp_path):
    with_offsets = Tiny(torch.float16, offset=True)
    Journal(tmp_path / "j", with_offsets, QZO(trainable(with_offsets, "scales+offsets"))).close()
    with pytest.raises(QzoError, match=r"moves an offset with first\.scales, which has none in this model"):
        replay(Tiny(torch.float16), tmp_path / "j")


def test_a_run_whose_offsets_stayed_is_rebuilt_so_and_goes_on_only_so(tmp_path):
    """As runs of one's own were, before offsets followed by default; and the other way round."""
    for follow, other, remedy in (
        (False, lambda model: scales(model), r"qzo\.trainable\(model, follow=False\)"),
        (True, lambda model: trainable(model, follow=False), r"qzo\.scales\(model\)"),
    ):
        path, model = tmp_path / f"{follow}.journal", Tiny(torch.float16, offset=True)
        before = model.first.offsets.clone()
        optimizer = QZO(trainable(model, follow=follow), lr=1e-3)
        with Journal(path, model, optimizer) as journal:
            optimizer.step(model.loss)
            journal.record()
        again = Tiny(torch.float16, offset=True)
        scales(again)  # binds them
        replay(again, path)
        assert torch.equal(again.first.scales, model.first.scales)
        assert torch.equal(again.first.offsets, model.first.offsets)
        assert torch.equal(again.first.offsets, before) != follow
        fresh = Tiny(torch.float16, offset=True)
        with pytest.raises(QzoError, match=f"make the optimizer of {remedy}"):
            Journal(path, fresh, QZO(other(fresh)))
