"""What the README says: its commands run, its example works, its table is that of the committed records."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reports.studies import readme

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def make(*arguments: str) -> subprocess.CompletedProcess:
    """`make` with the Python that runs this test in place of .venv."""
    outer = {"ARGS", "MODEL", "METHODS", "DEVICE", "GPU", "BATCH", "SEQ", "OUT", "BASELINE", "CURRENT", "MFLAGS"}
    environment = {
        name: value for name, value in os.environ.items() if name not in outer and not name.startswith("MAKE")
    }
    command = ["make", *arguments, f"RUN={sys.executable}", "READY="]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_the_two_commands_are_bench_and_test():
    assert blocks("sh")[0].splitlines() == ["make bench MODEL=llama2-13b", "make test"]


def test_the_first_command_prints_the_tables(tmp_path):
    done = make("bench", "MODEL=llama2-13b", f"OUT={tmp_path}")
    assert done.returncode == 0, done.stderr
    for words in ("Breakdown at the peak", "Times smaller", "What fits", "Beside the paper"):
        assert words in done.stdout
    assert (tmp_path / "memory.png").stat().st_size > 20_000


def test_the_second_command_runs_tests():
    done = make("test", "ARGS=tests/bench/cases/test_gpus.py")
    assert done.returncode == 0 and "passed" in done.stdout


def test_help_lists_every_target_with_its_comment():
    listed = make("help").stdout
    for target in ("setup", "bench", "report", "compare", "test", "lint", "gptq-report", "gpu", "help"):
        assert re.search(rf"make {target} +\S", listed)


def test_the_example_trains(tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=100
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    labels = torch.tensor([[-100, -100, 7]])
    batches = [{"input_ids": torch.tensor([[1, 2, 7]]), "labels": labels}] * 3
    code = blocks("python")[0].replace("path/to/model", str(tmp_path))
    exec(compile(code, "README.md", "exec"), {"batches": batches})


@pytest.fixture
def gptq(tmp_path, monkeypatch):
    """A tiny quantized model as "path/to/gptq", where the examples run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import qzo
    from qzo.checkpoints.save import save

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).to(torch.bfloat16)
    save(qzo.quantize(model, 4, 32), tmp_path / "path/to/gptq")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(rows):
    ids = torch.randint(100, (rows, 3), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "labels": torch.where(torch.arange(3) == 2, ids, -100)}


def test_the_loop_with_a_journal_trains_and_resumes(gptq):
    import qzo

    code = compile(blocks("python")[1], "README.md", "exec")
    batches = [batch(rows) for rows in range(1, 6)]
    exec(code, {"batches": batches[:3]})
    names = {"batches": batches}
    exec(code, names)
    assert names["optimizer"].steps == 5
    replayed, _ = qzo.replay(qzo.load("path/to/gptq"), "run.journal")
    assert all(torch.equal(value, names["optimizer"].truth()[name]) for name, value in replayed.truth().items())


def test_the_trainer_trains_and_writes_a_model(gptq):
    import qzo

    rows = [{name: value[0] for name, value in batch(1).items()}] * 16
    code = blocks("python")[2].replace("max_steps=200", "max_steps=2").replace("_steps=50", "_steps=1")
    names = {"train_dataset": rows, "eval_dataset": rows[:2]}
    exec(compile(code.replace("save_steps", "report_to=[], use_cpu=True, save_steps"), "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    written, own = qzo.scales(qzo.load("tuned")), qzo.scales(names["trainer"].model)
    assert all(torch.equal(written[name], own[name]) for name in own)


def test_the_training_commands_parse():
    from qzo.commands.main import _parser

    commands = re.findall(r"^    (qzo (?:train|export|eval|generate) .*)$", TEXT, re.MULTILINE)
    assert len(commands) == 7
    parsed = [_parser().parse_args(shlex.split(command)[1:]) for command in commands]
    assert parsed[0].data and parsed[1].resume and parsed[2].source == parsed[0].out


def test_the_table_is_that_of_the_committed_baselines():
    assert readme.renewed(TEXT, ROOT / "reports" / "baselines") == TEXT


def test_the_table_shows_at_least_eighteen_times_less_than_ft_mixed():
    rows = [line.split("|") for line in TEXT.splitlines() if re.match(r"\| +\S+ \| +qzo", line)]
    found = {(row[1].strip(), row[2].strip()): float(row[6].strip().rstrip("x")) for row in rows}
    for cell in (("opt-6.7b", "qzo"), ("llama2-7b", "qzo"), ("llama2-13b", "qzo"), ("llama3.1-8b", "qzo-full")):
        assert found[cell] >= 18


@pytest.mark.parametrize("path", re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))
def test_what_the_readme_links_to_exists(path):
    assert (ROOT / path).exists()


def test_what_is_said_of_frugal_backpropagation_is_what_the_table_shows():
    rows = [line.split("|") for line in TEXT.splitlines() if re.match(r"\| +\S+ \| +(q|p)\S+", line)]
    peak = {(row[1].strip(), row[2].strip()): float(row[3]) for row in rows if row[1].strip() in readme.MODELS}
    beside = [peak[model, lean] / peak[model, "qzo"] for model in readme.MODELS for lean in ("qlora-lean", "peqa-lean")]
    low, high = re.search(r"allocate (\d\.\d\d) to (\d\.\d\d) times what QZO does", TEXT).groups()
    assert (f"{min(beside):.2f}", f"{max(beside):.2f}") == (low, high)
