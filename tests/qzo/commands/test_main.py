"""The command line."""

import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from qzo import load, scales
from qzo.checkpoints.load import load_tokenizer
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


def test_torchao_that_transformers_imports_says_nothing_before_the_error(plain, tmp_path):
    command = [sys.executable, "-m", "qzo", "quantize", str(plain), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
    assert len(told) == 1 and told[0].startswith("error: ")


def test_importing_qzo_does_not_import_transformers():
    code = (
        "import sys, qzo, qzo.commands.main; "
        "sys.exit(any(name in sys.modules for name in ('transformers', 'bench', 'reports')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
