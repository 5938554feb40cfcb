"""`qzo train`: stopped and resumed, what it shows and writes, wrong input."""

import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import standin
import torch
from standin import PAPER, SMALL, metrics, same
from task_files import make_model as make_small
from task_files import make_tokenizer, write_task
from told import errors

import qzo
from qzo.checkpoints.load import load
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.durable import read_tensors
from qzo.journal import lines as journal_lines

METHODS = {"qzo": "quantized", "qlora": "quantized", "mezo": "plain", "lora": "plain", "ft": "plain"}


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_the_scheduled_rate_is_that_of_the_recorded_steps(task, models, tmp_path, method):
    command = ["train", models[METHODS[method]], *SMALL, "--method", method, "--scheduler", "linear", "--lr", "6e-5"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    rates = [entry.lrs[0] for entry in journal_lines.read(tmp_path / "run/run.journal").entries]
    assert rates == pytest.approx([6e-5, 5e-5, 4e-5, 3e-5, 2e-5, 1e-5])


@pytest.mark.parametrize("method", METHODS)
def test_a_command_stopped_and_resumed_ends_as_one_never_stopped(task, models, tmp_path, capsys, method):
    command = ["train", models[METHODS[method]], *SMALL, "--method", method, "--lr", "1e-3", "--seed", "3"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    table = capsys.readouterr().out.split()
    assert table[table.index("steps") + 1] == "6" and "test" in table
    calls, loss = 0, task.loss

    def interrupted(model, batch, centering):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return loss(model, batch, centering)

    task.loss = interrupted
    out = ["--out", str(tmp_path / "cut")]
    calls = {"qzo": -3, "mezo": 0}.get(method, 4)  # three are of the check that scales are live
    assert main([*command, *out]) == 130
    assert errors(capsys) == ["error: stopped after 4 steps; go on with --resume"]
    assert main([*command, *out, "--resume"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert (tmp_path / "cut/result.json").read_bytes() == (tmp_path / "whole/result.json").read_bytes()
    names = ("best.safetensors",) if method in ("qzo", "mezo") else ("best.safetensors", "last.safetensors")
    for name in names:
        saved = [read_tensors(tmp_path / run / name) for run in ("cut", "whole")]
        assert same(saved[0][0], saved[1][0]) and saved[0][1] == saved[1][1]
    if method in ("qzo", "mezo"):
        journals = [(tmp_path / name / "run.journal").read_bytes() for name in ("cut", "whole")]
        assert journals[0] == journals[1]


def test_a_finished_run_can_be_given_more_steps(task, models, tmp_path, capsys):
    command = ["train", models["quantized"], *SMALL, "--lr", "1e-4", "--out"]
    assert main([*command, str(tmp_path / "whole"), "--steps", "9"]) == 0
    assert main([*command, str(tmp_path / "cut")]) == 0
    assert main([*command, str(tmp_path / "cut"), "--steps", "9", "--resume"]) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_finished_run_whose_lr_fell_to_0_goes_on_from_its_height(task, models, tmp_path, capsys, monkeypatch):
    command = ["train", models["quantized"], *SMALL, "--scheduler", "linear", "--lr", "6e-5", "--out"]
    for name in ("whole", "cut"):
        assert main([*command, str(tmp_path / name)]) == 0
    assert main([*command, str(tmp_path / "whole"), "--resume", "--steps", "9"]) == 0
    assert "the lr falls anew from step 6 on, over 3 steps" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(task, "loss", stopping(task.loss, after=5))  # three are of the check that scales are live
        assert main([*command, str(tmp_path / "cut"), "--resume", "--steps", "9"]) == 130
    plain = ["train", models["quantized"], *PAPER, "--out", str(tmp_path / "cut"), "--resume"]
    assert main(plain) == 0  # steps and the rest are those of the run
    rates = [entry.lrs[0] for entry in journal_lines.read(tmp_path / "cut/run.journal").entries]
    assert rates == pytest.approx([6e-5, 5e-5, 4e-5, 3e-5, 2e-5, 1e-5, 6e-5, 4e-5, 2e-5])
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    capsys.readouterr()
    assert main([*plain, "--steps", "8"]) == 2
    assert "the lr of the run falls over 9 steps, so it cannot end after 8; give --steps 9 or more" in errors(capsys)[0]


def stopping(loss, after):
    """A loss that Ctrl-C meets after so many calls."""
    calls = itertools.count(1)

    def stopped(*given):
        if next(calls) > after:
            raise KeyboardInterrupt
        return loss(*given)

    return stopped


def test_what_a_resume_does_not_name_is_as_it_was_unless_it_was_changed(task, models, tmp_path, capsys):
    options = ["--lr", "1e-4", "--layers", "1-1", "--clip-threshold", "inf", "--batch-size", "3"]
    command = ["train", models["quantized"], *PAPER, "--out", str(tmp_path / "run")]
    assert main([*command, *options, "--steps", "2"]) == 0
    assert main([*command, "--resume", "--steps", "3"]) == 0
    run = tmp_path / "run/run.json"
    run.write_text(run.read_text().replace('"batch_size": 3', '"batch_size": 7'))
    capsys.readouterr()
    assert main([*command, "--resume", "--steps", "3"]) == 2
    assert "the run was begun with batch_size=7, not 16" in errors(capsys)[0]


def test_the_run_tells_what_it_was(task, models, tmp_path):
    out = tmp_path / "run"
    assert main(["train", models["quantized"], *SMALL, "--clip-threshold", "inf", "--out", str(out)]) == 0
    about = json.loads((out / "run.json").read_text())
    assert about["model"] == models["quantized"] and about["task"] == "words" and about["settings"]["lr"] == 1e-7
    assert about["settings"]["clip_threshold"] is None and about["versions"]["torch"] == torch.__version__
    assert journal_lines.read(out / "run.journal").header["groups"][0]["clip_threshold"] is None
    result = json.loads((out / "result.json").read_text())
    assert result["steps"] == 6 and result["test"]["count"] == 16


def test_the_run_records_data_sizes_and_peaks_of_memory(task, models, tmp_path):
    out = tmp_path / "run"
    assert main(["train", models["quantized"], *SMALL, "--out", str(out)]) == 0
    facts = json.loads((out / "facts.json").read_text())
    assert facts["data"]["splits"]["train"] == {"rows": 64, "texts": 64, "median": 8, "longest": 8}
    assert sum(facts["data"]["labels"].values()) == 64 and facts["data"]["example"][:7] == "words[w"
    scales = sum(tensor.numel() for tensor in read_tensors(out / "best.safetensors")[0].values())
    assert facts["model"]["trained"] == scales and facts["device"] == {"type": "cpu", "name": "cpu"}
    assert facts["model"]["packed"] == {"layer": "QuantLinear", "type": "QuantLinear", "bits": 4, "group_size": 32}
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    peaks = [entry["memory"] for entry in entries if "validation" in entry]
    resident = facts["model"]["weights"] + facts["model"]["quantization"]
    assert all(peak["process"] > resident and peak["optimizer"] == 4 * scales for peak in peaks)  # masters in fp32
    sizes = (out / "best.safetensors").stat().st_size
    assert sizes < sum(scale.nbytes for scale in qzo.scales(load(models["quantized"])).values()) + 4096


def test_tensorboard_scalars_are_written_where_it_is_installed(task, models, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    assert main(["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert written[0] == (str(tmp_path / "run/tensorboard"), 1) and written[-1] == "closed"
    for name in ("train/loss", "train/d", "train/clipped", "train/lr"):
        assert [entry[1] for entry in written if entry[0] == name] == [1, 2, 3, 4, 5, 6]
    assert [entry[1] for entry in written if entry[0] == "validation/accuracy"] == [0, 3, 6]


def test_the_bar_shows_loss_d_clipping_and_validation_on_a_terminal(task, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    for words in ("6/6", "loss ", " d ", "clipped 0%", "accuracy 0.", "0:00:00"):
        assert words in shown


def test_without_a_terminal_each_validation_is_a_line(task, models, tmp_path, capsys):
    assert main(["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["0", "3", "6"] and lines[0].endswith("best")


@pytest.fixture
def real(tmp_path):
    """`qzo train` on a task of its own files with a model of 100 positions: (options) -> exit code."""
    tokenizer = make_tokenizer()
    model = make_small(len(tokenizer))
    model.config.max_position_embeddings = 100
    save(qzo.quantize(model, 4, 16), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_task(tmp_path / "data", "rte")
    rows = (data / "rte/train.jsonl").read_text().splitlines()
    long = [json.loads(row) for row in rows[:4]]
    rows[:4] = [json.dumps({**row, "premise": f"{row['premise']} {'And so on. ' * 200}"}) for row in long]
    (data / "rte/train.jsonl").write_text("\n".join(rows))
    task = ["--task", "rte", "--data", str(data), "--steps", "1", "--batch-size", "2", "--out", str(tmp_path / "run")]
    return lambda *options: main(["train", str(tmp_path / "model"), *task, *options])


def test_prompts_that_are_cut_are_told_and_a_length_that_cannot_be_is_refused(real, capsys):
    assert real("--max-length", "101") == 2
    assert "--max-length 101 is more than the 100 positions of" in errors(capsys)[0]
    assert real("--max-length", "12") == 2
    assert "max_length=12 is too short for rte" in errors(capsys)[0]
    assert real("--max-length", "0") == 2
    assert "max_length=0 is not a positive whole number" in errors(capsys)[0]
    assert real() == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")]
    assert len(told) == 1 and "prompts are longer than max_length=100 tokens" in told[0]
    assert "their texts at the beginning, questions and answers are whole" in told[0]


def test_a_run_of_the_version_that_cut_at_256_tokens_goes_on_so(task, models, tmp_path, monkeypatch):
    lengths, sizes, evaluate = [], [], task.evaluate
    monkeypatch.setattr(standin.Objective, "fitted", lambda own, most: (lengths.append(most), own)[1])
    task.evaluate = lambda *given, **more: (sizes.append(given[3]), evaluate(*given, **more))[1]
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", models["quantized"], *SMALL, *out]) == 0
    assert lengths == [2048] and set(sizes) == {16}
    about = json.loads((tmp_path / "run/run.json").read_text())
    del about["settings"]["max_length"], about["settings"]["eval_batch_size"]
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    lengths.clear(), sizes.clear()
    assert main(["train", models["quantized"], *SMALL, *out, "--resume", "--max-length", "300"]) == 2
    assert main(["train", models["quantized"], *SMALL, *out, "--resume", "--steps", "9"]) == 0
    assert lengths == [256] and set(sizes) == {4}


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_layers_that_are_not_named_stay_as_they_were(task, models, tmp_path, method):
    command = ["train", models[METHODS[method]], *SMALL, "--method", method, "--lr", "1e-3", "--layers", "1-1"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    tuned = read_tensors(tmp_path / "run/best.safetensors")[0]
    assert tuned and all(".layers.1." in name for name in tuned)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tuned"), "--state", "last"]) == 0
    before, after = (
        load(source, torch.bfloat16).state_dict() for source in (models[METHODS[method]], tmp_path / "tuned")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and moved <= set(tuned)


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_dtype_and_noise_asked_for_are_those_of_run_and_replay(task, models, tmp_path, capsys, method):
    command = ["train", models[METHODS[method]], *SMALL, "--method", method, "--lr", "1e-3", "--noise", "philox"]
    command += ["--dtype", "float32"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    header = journal_lines.read(tmp_path / "run/run.journal").header
    assert header["dtype"] == "float32" and header["estimator"]["noise"] == "philox"
    assert main([*command, "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tuned"), "--state", "last"]) == 0
    assert main([*command[:-1], "bfloat16", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "the run was begun with dtype=float32, not bfloat16" in errors(capsys)[0]


@pytest.mark.parametrize("method", ["qzo", "mezo"])
def test_one_sided_directions_take_one_evaluation_more_than_they_are(task, models, tmp_path, method):
    calls, loss, seen = 0, task.loss, set()

    def counted(model, batch, centering):
        nonlocal calls
        calls += 1
        seen.add(centering)
        return loss(model, batch, centering)

    task.loss = counted
    options = ["--method", method, "--directions", "3", "--estimator", "one-sided", "--centering", "0.5"]
    assert main(["train", models[METHODS[method]], *SMALL, *options, "--out", str(tmp_path / "run")]) == 0
    entries = journal_lines.read(tmp_path / "run/run.journal").entries
    assert len(entries) == 6 and all(len(entry.applied[0]) == 3 for entry in entries)
    live = 3 if method == "qzo" else 0  # evaluations of the check that the scales are live
    assert calls == 6 * 4 + live and seen == {0.5}


def test_a_run_of_a_version_without_a_setting_goes_on_with_its_default(task, models, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", models["quantized"], *SMALL, *out]) == 0
    about = json.loads((tmp_path / "run/run.json").read_text())
    del about["settings"]["centering"], about["settings"]["estimator"], about["settings"]["noise"]
    (tmp_path / "run/run.json").write_text(json.dumps(about))
    assert main(["train", models["quantized"], *SMALL, *out, "--resume", "--steps", "7"]) == 0
    assert main(["train", models["quantized"], *SMALL, *out, "--resume", "--centering", "0.5"]) == 2


# wrong input


@pytest.mark.parametrize("where", ["new", "empty"])
def test_a_run_that_fails_before_its_first_validation_leaves_its_place_free(task, models, tmp_path, capsys, where):
    command = ["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run")]
    if where == "empty":
        (tmp_path / "run").mkdir()
    evaluate = task.evaluate
    task.evaluate = lambda *given, **named: evaluate(*given, **named) | {"loss": float("nan")}
    assert main(command) == 2 and "before the first step" in errors(capsys)[0]
    assert not (tmp_path / "run").exists()
    task.evaluate = evaluate
    assert main([*command, "--dtype", "float32"]) == 0  # what the message says would help


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("plain", [], "is not quantized, and qzo needs that; first run: qzo quantize"),
        ("plain", ["--method", "qlora"], "is not quantized, and qlora needs that"),
        ("quantized", ["--method", "mezo"], "is quantized, and mezo needs an unquantized model; choose method qzo"),
        ("quantized", ["--lr", "0"], "lr=0.0 is not a positive number; choose e.g. 1e-06"),
        ("quantized", ["--lr", "nan"], "lr=nan is not a positive number"),
        ("quantized", ["--eps", "-1"], "eps=-1.0 is not a positive number; choose e.g. 0.001"),
        ("quantized", ["--clip-threshold", "0"], "clip_threshold=0.0 is not a positive number"),
        ("quantized", ["--steps", "0"], "steps=0 is not a positive whole number"),
        ("quantized", ["--layers", "1-"], 'layers="1-" is not a range of decoder layers; choose e.g. 14-24'),
        ("quantized", ["--layers", "4-2"], 'layers="4-2" is not a range'),
        ("quantized", ["--layers", "7-9"], "there are no layers 7 ... 9; this model has layers 0 ... 1"),
        ("quantized", ["--layers", "0-2"], "there are no layers 0 ... 2; this model has layers 0 ... 1, a range must"),
        (
            "plain",
            ["--method", "mezo", "--layers", "1-9"],
            "there are no layers 1 ... 9; this model has layers 0 ... 1",
        ),
        ("quantized", ["--eps", "0.3"], "eps=0.3 is larger than the scales of 14 of 14 tensors, e.g. model.layers."),
        ("quantized", ["--relative", "--eps", "2"], "eps=2 is more than each number itself"),
        ("plain", ["--method", "ft", "--layers", "0-1"], 'layers=0-1 is for qzo and mezo, not for "ft"'),
        ("quantized", ["--centering", "1"], "centering=1.0 is not in [0, 1); choose e.g. 0.7, or 0 for none"),
        ("plain", ["--method", "ft", "--estimator", "one-sided"], "estimator=one-sided is for qzo and mezo, not for"),
        ("plain", ["--method", "ft", "--noise", "philox"], 'noise=philox is for qzo and mezo, not for "ft"'),
        ("quantized", ["--patience", "0"], "patience=0 is not a positive whole number"),
        ("plain", ["--method", "mezo", "--relative"], 'relative=True is for qzo, not for "mezo"'),
        ("plain", ["--method", "ft", "--eps", "1e-2"], 'eps=0.01 is for qzo and mezo, not for "ft"'),
        ("plain", ["--method", "lora", "--clip-threshold", "9"], "clip_threshold=9.0 is for qzo and mezo"),
        ("quantized", ["--out", "FULL"], "is not empty; choose another --out, or go on with --resume"),
        ("quantized", ["--out", "FULL", "--resume"], "is not the folder of a run (run.json is missing"),
        ("quantized", ["--out", "FULL/file"], "is a file; choose a folder for --out"),
        ("quantized", ["--out", "FULL/file/run"], "cannot be written"),
        ("quantized", ["--out", "/proc/run"], "choose another --out"),
        ("./nowhere", [], "./nowhere is not a folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(task, models, tmp_path, capsys, model, options, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    given = [option.replace("FULL", str(full)) for option in options]
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    assert main(["train", models.get(model, model), *SMALL, *out, *given]) == 2
    lines = errors(capsys)
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists() and [file.name for file in full.iterdir()] == ["file"]


def test_a_run_is_held_to_what_it_was_begun_with(task, make_model, models, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--lr", "1e-4"]
    assert main(["train", models["quantized"], *SMALL, *out]) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    other = make_model(dtype=torch.bfloat16)
    other = str(standin.write_model(other, tmp_path / "other", True))
    cases = {
        "the run was begun on another model": [other, *SMALL],
        "was begun with eps=0.001, not 0.01": [models["quantized"], *SMALL, "--eps", "0.01"],
        "was begun with method=qzo, not mezo": [models["plain"], *SMALL, "--method", "mezo"],
        "was begun with task=words, not other": [models["quantized"], *SMALL, "--task", "other"],
    }
    for message, options in cases.items():
        capsys.readouterr()
        assert main(["train", *options, *out, "--resume"]) == 2
        lines = errors(capsys)
        assert len(lines) == 1 and message in lines[0]
        assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_what_a_kill_left_before_there_was_a_run_is_no_obstacle(task, models, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.run.json.part").write_text("{")
    assert main(["train", models["quantized"], *SMALL, "--out", str(tmp_path / "run"), "--resume"]) == 0


def test_a_model_that_moved_is_still_the_same(task, models, tmp_path):
    command = ["--out", str(tmp_path / "run"), "--resume"]
    assert main(["train", models["quantized"], *SMALL, *command]) == 0
    Path(models["quantized"]).rename(tmp_path / "moved")
    assert main(["train", str(tmp_path / "moved"), *SMALL, *command, "--steps", "7"]) == 0
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["model"] == str(tmp_path / "moved") and about["settings"]["steps"] == 7
