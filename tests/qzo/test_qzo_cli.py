"""The command line."""

import subprocess
import sys

import pytest
import torch

from qzo import load, scales
from qzo.cli import main


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["quantize", "PLAIN"], "required: OUT"),
        (["quantize", "PLAIN", "OUT", "--bits", "3"], "invalid choice: 3"),
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


def test_importing_qzo_does_not_import_transformers():
    code = (
        "import sys, qzo, qzo.cli; sys.exit(any(name in sys.modules for name in ('transformers', 'bench', 'reports')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
