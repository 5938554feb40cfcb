"""`bench fit`: the reported sizes fit and the next ones do not, reasons and remedies are true, bad input is told."""

import json
from dataclasses import replace

import pytest

from bench.__main__ import main
from bench.capacity.capacity import POSITIONS, Question, capacity
from bench.capacity.remedies import Sizes, cheapest, further_questions, key
from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.commands.fit import parse_memory
from bench.worlds import sim

GIB = 1 << 30


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A Llama of 4 layers with 256 positions."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model") / "small"
    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def process(case: BenchCase, **changes) -> int:
    return sim.run(replace(case, **changes))["peak"]["process"]


def ask(model: str, method: str, memory: int, longest: int | None = 256, **options) -> tuple[Question, dict]:
    case = BenchCase(model, method, **{"gpu": "t4", "seq_len": 128, **options})
    question = Question(case, memory, longest)
    return question, capacity(question)


@pytest.mark.parametrize("method", ["ft-mixed", "lora", "qlora", "mezo", "qzo"])
def test_the_reported_batch_fits_and_the_next_one_does_not(small, method):
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    question, found = ask(small, method, 400 << 20)
    batch = found["batch"]["largest"]
    assert found["status"] == "fits"
    assert process(question.case, batch_size=batch) == found["batch"]["process"] <= 400 << 20
    assert process(question.case, batch_size=batch + 1) == found["batch"]["next_process"] > 400 << 20
    assert found["sequence"]["largest"] == 256
    assert found["sequence"]["limited_by"] == POSITIONS


def test_the_reported_sequence_fits_and_the_next_one_does_not(small):
    question, found = ask(small, "ft-amp", 350 << 20, longest=1 << 16)
    tokens = found["sequence"]["largest"]
    assert 128 < tokens < 1 << 16
    assert process(question.case, seq_len=tokens) == found["sequence"]["process"] <= 350 << 20
    assert process(question.case, seq_len=tokens + 1) == found["sequence"]["next_process"] > 350 << 20
    assert found["sequence"]["limited_by"] in ("activations", "temporaries")


def test_llama2_13b_in_24_gib_qzo_fits_as_reported_and_no_more():
    question, found = ask("llama2-13b", "qzo", 24 * GIB, longest=4096, seq_len=512, gpu="rtx-4090")
    batch = found["batch"]["largest"]
    assert process(question.case, batch_size=batch) <= 24 * GIB < process(question.case, batch_size=batch + 1)


def test_weights_that_do_not_fit_take_one_simulation(small, monkeypatch):
    asked = []
    run = sim.run
    monkeypatch.setattr(sim, "run", lambda case: asked.append(case) or run(case))
    _, found = ask(small, "ft-bf16", 5 << 20)
    assert len(asked) == 1
    assert (found["status"], found["message"]) == ("does not fit", "weights do not fit")
    assert found["batch"] is None and found["sequence"] is None


def test_a_batch_that_does_not_fit_may_leave_room_for_a_shorter_sequence(small):
    question, wide = ask(small, "ft-bf16", 1 << 40, longest=200)
    memory = process(question.case) - 1
    _, found = ask(small, "ft-bf16", memory)
    assert found["batch"] is None and found["status"] == "fits"
    assert 2 <= found["sequence"]["largest"] < 128
    assert wide["sequence"]["largest"] == 200


def test_a_method_that_cannot_be_simulated_is_reported_with_its_reason(small):
    _, found = ask(small, "qzo", GIB, group_size=96)
    assert found["status"] == "unsupported"
    assert "group_size=96" in found["message"]
    assert found["batch"] is None


def remedy_of(small: str, method: str, memory: int, **options) -> dict:
    question, found = ask(small, method, memory, **options)
    known = {key(found): found}
    known |= {key(item): item for item in map(capacity, further_questions([question], known))}
    return cheapest(question, known, Sizes(4, 2000))


def test_checkpointing_is_the_remedy_of_a_first_order_method_and_reaches_the_batch_it_says(small):
    remedy = remedy_of(small, "lora", 400 << 20)
    assert (remedy["change"], remedy["checked"]) == ("gradient checkpointing", "simulated")
    case = BenchCase(small, "lora", gpu="t4", seq_len=128, gradient_checkpointing=True)
    batch = remedy["batch"]
    assert process(case, batch_size=batch) <= 400 << 20 < process(case, batch_size=batch + 1)


def test_with_checkpointing_fewer_logits_are_the_remedy_and_the_arithmetic_is_told(small):
    remedy = remedy_of(small, "lora", 400 << 20, gradient_checkpointing=True)
    assert remedy["change"] == "logits only at labels"
    assert "10 bytes x 2,000 x 127 tokens" in remedy["checked"]


def test_weights_that_do_not_fit_have_a_smaller_format_as_remedy(small):
    question, _ = ask(small, "mezo", GIB)
    memory = process(replace(question.case, method="qzo")) + (1 << 20)
    assert process(question.case) > memory
    remedy = remedy_of(small, "mezo", memory)
    assert (remedy["change"], remedy["checked"]) == ("qzo", "simulated")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * GIB), ("24gb", 24 * 10**9), ("24576MiB", 24 * GIB), ("1.5", 3 * GIB // 2), ("100 MB", 10**8)],
)
def test_memory_is_read_with_and_without_unit(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["opt-125m"], ["--memory 24GiB", "--gpu"]),
        (["opt-125m", "--memory", "24TB"], ["memory='24TB'", "24GiB"]),
        (["opt-125m", "--memory", "0"], ["memory='0'"]),
        (["opt-125m", "--memory=-1"], ["memory='-1'"]),
        (["opt-125n", "--memory", "8"], ["opt-125n", "opt-125m"]),
        (["opt-125m", "--memory", "8", "--methods", "lorra"], ["lorra", "lora"]),
        (["opt-125m", "--gpu", "rtx-409"], ["rtx-409", "rtx-4090"]),
        (["opt-125m", "--memory", "8", "--seq-len", "4000"], ["seq_len=4000", "2048"]),
        (["opt-125m", "--memory", "8", "--json", "/dev/null/x"], ["/dev/null"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(["fit", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert all(word in printed.err for word in words)


def test_the_command_prints_a_table_writes_json_and_tells_by_its_exit_code(small, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("QZO_BENCH_WORKERS")
    file = tmp_path / "fit.json"
    arguments = ["fit", small, "--methods", "qzo,mezo", "--gpu", "t4", "--seq-len", "64", "--json", str(file)]
    assert main(arguments) == 0
    out, told = capfd.readouterr()
    assert all(part.startswith("[") for part in told.strip().split("\r")), told  # workers' libraries say nothing
    report = json.loads(file.read_text())
    assert report["memory"] == gpus.get("t4").memory_bytes
    for row in report["methods"]:
        assert row["batch"]["process"] <= report["memory"] < row["batch"]["next_process"]
        assert f"{row['batch']['largest']:,}" in out
    assert main([*arguments, "--methods", "qzo-2bit", "--memory", "100MiB"]) == 1
    assert "weights do not fit" not in capfd.readouterr().out  # 141 MiB of CUDA context alone are too much
