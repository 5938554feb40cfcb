"""Names for people: all of them, at once, and without a word from a library."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.cases.methods import EXTRA_METHODS, TABLE

ROOT = Path(__file__).parents[3]
HEAVY = ("transformers", "peft", "bitsandbytes", "torchao", "accelerate", "hqq")  # seconds each, and notices
IMPORTED = f"""
import sys
from bench.__main__ import main
for what in ("models", "methods", "gpus", "quantizations"):
    assert main(["list", what]) == 0
assert not (found := set({HEAVY}) & set(sys.modules)), found
"""


@pytest.mark.parametrize(
    ("what", "name"),
    [("models", "llama2-13b"), ("methods", "qzo-2bit"), ("gpus", "rtx-4090"), ("quantizations", "nf4")],
)
def test_lists(what, name, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(name) for line in lines)
    if what == "methods":
        names = [line.split()[0] for line in lines]
        assert names == [method.name for method in TABLE]
        assert [name for name, line in zip(names, lines, strict=True) if "only where asked for" in line] == list(
            EXTRA_METHODS
        )


def test_no_list_imports_what_only_a_run_needs():
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_models_with_their_sizes_are_all_that_is_printed():
    command = [sys.executable, "-m", "bench", "list", "models"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "opt-125m             125,239,296 parameters  architecture  facebook/opt-125m" in done.stdout.splitlines()


def test_a_command_leaves_the_handlers_of_its_caller_as_they_were(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["list", "gpus"]) == 0
    assert signal.getsignal(signal.SIGTERM) == before
