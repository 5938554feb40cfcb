"""The command line."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from gguf_files import tiny, write_gguf
from task_files import make_model as make_small
from task_files import make_tokenizer, write_task
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import qzo
from qzo import load, quantize, scales
from qzo.checkpoints.load import load_tokenizer
from qzo.checkpoints.save import save
from qzo.commands.main import main


@pytest.fixture
def plain(make_model, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    (tmp_path / "plain/tokenizer.json").write_text("{}")
    return tmp_path / "plain"


def test_quantize_writes_a_checkpoint_and_its_sizes(plain, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", str(plain), str(out), "--group-size", "32", "--bits", "8", "--format", "gptq_v2"]) == 0
    table = capsys.readouterr().out.split()
    n_scales = sum(scale.numel() for scale in scales(load(out)).values())
    assert table[table.index("scale_count") + 1] == f"{n_scales:,}"
    assert (out / "tokenizer.json").read_text() == "{}" and (out / "generation_config.json").exists()


@pytest.fixture
def with_tokenizer(plain):
    """A tokenizer that knows the words w0 ... w95."""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(plain)
    (plain.parent / "text.txt").write_text(" ".join(f"w{number * 7 % 96}" for number in range(400)))
    return plain


def test_gptq_is_calibrated_on_a_text_file(with_tokenizer, tmp_path, capsys):
    options = ["--method", "gptq", "--group-size", "16", "--samples", "12", "--seq-len", "32", "--act-order"]
    text = ["--calibration", str(tmp_path / "text.txt")]
    assert main(["quantize", str(with_tokenizer), str(tmp_path / "out"), *options, *text]) == 0
    assert load(tmp_path / "out").model.layers[0].self_attn.q_proj.act_order
    assert load_tokenizer(tmp_path / "out").encode("w5 w6", add_special_tokens=False) == [5, 6]
    assert "scale_count" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "13"], "holds 400 tokens, 12 sequences of 32; ask for fewer than 13 samples"),
        (["--samples", "0"], "samples=0, seq_len=32: both must be at least 1"),
        (["--calibration", "NOWHERE"], "cannot be read: No such file or directory; give a text file"),
        (["--static-groups"], "static_groups=True has no effect without act_order=True"),
        (["--method", "rtn"], "--calibration needs --method gptq"),
    ],
)
def test_wrong_calibration_is_one_line_and_exit_code_2(with_tokenizer, tmp_path, capsys, options, message):
    given = ["--method", "gptq", "--group-size", "16", "--seq-len", "32", "--samples", "9", "--calibration"]
    command = ["quantize", str(with_tokenizer), str(tmp_path / "out"), *given, str(tmp_path / "text.txt"), *options]
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "out").exists()


def test_gptq_needs_a_tokenizer_that_loads(plain, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("text")
    command = ["quantize", str(plain), str(tmp_path / "out"), "--method", "gptq"]
    assert main([*command, "--calibration", str(tmp_path / "text.txt")]) == 2
    assert "has no tokenizer that loads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["tune"], "invalid choice: 'tune'"),
        (["quantize", "PLAIN"], "required: OUT"),
        (["quantize", "PLAIN", "OUT", "--bits", "5"], "invalid choice: 5"),
        (["quantize", "PLAIN", "OUT"], "in_features=64 is not divisible by group_size=128; choose 32, or -1"),
        (["quantize", "./nowhere", "OUT"], "./nowhere is not a folder"),
        (["quantize", "PLAIN", "PLAIN"], "not an empty folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(plain, tmp_path, capsys, arguments, message):
    paths = {"PLAIN": str(plain), "OUT": str(tmp_path / "out")}
    assert main([paths.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and not captured.out and "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "qzo", "quantize"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_was_closed_before_the_start_is_no_error(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and getattr(sys, name) is None
    assert main(["inspect", "nowhere"]) == 2


@pytest.mark.parametrize("buffering", [1, -1])  # argparse overlooks what fails at once
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "PLAIN"]])
def test_a_full_standard_output_is_one_line_and_exit_code_2(plain, arguments, buffering, capsys, monkeypatch):
    with open("/dev/full", "w", buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main([str(plain) if argument == "PLAIN" else argument for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith("error: standard output could not be written: No space left")


def test_what_libraries_say_does_not_come_before_the_error(plain, tmp_path):
    command = [sys.executable, "-m", "qzo", "quantize", str(plain), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def told(*commands):
    """Lines on stderr of a process that runs commands one after the other, none of which fails."""
    code = f"import sys; from qzo.commands.main import main; sys.exit(any([main(c) for c in {commands!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.replace("\r", "\n").splitlines()


def test_commands_on_models_of_every_kind_of_file_say_nothing_on_stderr(plain, tmp_path):
    """Loading and writing have progress bars in transformers, three of them for three kinds of file."""
    file, out = str(write_gguf(tiny(), tmp_path / "model.gguf", "Q4_1")), str(tmp_path / "gptq")
    commands = [
        ["quantize", file, out, "--group-size", "32"],
        ["inspect", out],
        ["export", file, str(tmp_path / "whole")],
        ["quantize", str(tmp_path / "whole"), str(tmp_path / "again"), "--group-size", "32"],
        ["export", out, str(tmp_path / "copy")],
    ]
    assert told(*commands) == []


@pytest.mark.parametrize("method", ["qzo", "qlora"])
def test_training_and_what_follows_tells_its_own_progress_alone(tmp_path, method):
    """peft imports bitsandbytes, torchao and hqq, which all tell of what they lack."""
    tokenizer = make_tokenizer()
    save(quantize(make_small(len(tokenizer)), 4, 16), tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    task = ["--task", "rotten-tomatoes", "--data", str(write_task(tmp_path / "data", "rotten-tomatoes"))]
    model, run = str(tmp_path / "model"), str(tmp_path / "run")
    options = ["--steps", "2", "--eval-every", "1", "--batch-size", "2", "--method", method, "--out", run]
    commands = [
        ["train", model, *task, *options],
        ["export", run, str(tmp_path / "out")],
        ["eval", model, *task, "--samples", "4", "--split", "validation"],
    ]
    replay = ["replay", model, f"{run}/run.journal", str(tmp_path / "replayed")]
    lines = told(*commands, *([replay] if method == "qzo" else []))
    live = ["measuring how far a step may go, and that the scales are live"] if method == "qzo" else []
    live += ["training all layers, lr "] if method == "qzo" else []
    begun = [f"loading {model}", *live, "testing the model before the first step on 12 examples"]
    begun += ["validation before the first step, 10 examples"]
    heads = [re.sub(r"(training all layers, lr ).*", r"\1", line.split("  ")[0]) for line in lines[:-1]]
    assert heads == [*begun, "step 0", "step 1", "step 2"]
    assert re.fullmatch(r"testing the state of step \d on 12 examples", lines[-1])


def test_what_qzo_warns_of_is_a_notice_of_its_commands(monkeypatch, capsys):
    def warns(_):
        warnings.warn_explicit("lr 4 is too large", UserWarning, str(Path(qzo.__file__).with_name("a.py")), 1)
        warnings.warn_explicit("of others", UserWarning, "b.py", 1)

    monkeypatch.setattr("qzo.commands.inspect.run", warns)
    usual = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given: print(warnings.formatwarning(*given[:4]), end="", file=sys.stderr)
        assert main(["inspect", "nowhere"]) == 0
    assert capsys.readouterr().err == "notice: lr 4 is too large\nb.py:1: UserWarning: of others\n"
    assert warnings.formatwarning is usual
