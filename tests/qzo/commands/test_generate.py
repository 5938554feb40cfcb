"""`qzo generate`."""

import io
import json
import types

import pytest
import torch
from own_files import CHATML, write_kind
from task_files import make_model, make_tokenizer

from qzo import load, load_tokenizer, quantize
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.kernels import rebuilt
from qzo.tasks.sampled import Sampling, write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("generate") / "model", make_tokenizer()
    tokenizer.chat_template = CHATML
    save(quantize(make_model(len(tokenizer)), group_size=32), folder, checkpoint_format="gptq")
    tokenizer.save_pretrained(folder)
    return str(folder)


def naive(folder, text, count):
    """Greedy, every token from all before it, without a cache."""
    loaded, tokenizer = load(folder), load_tokenizer(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    begun = ids.shape[1]
    while ids.shape[1] < begun + count and (ids.shape[1] == begun or ids[0, -1] != tokenizer.eos_token_id):
        ids = torch.cat([ids, loaded(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, begun:], skip_special_tokens=True)


def test_a_prompt_is_continued_greedily_as_without_a_cache(model, capsys):
    assert main(["generate", model, "--prompt", "The badger slept", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == naive(model, "The badger slept", 12) + "\n"


def test_pieces_add_up_and_samples_are_drawn_by_seed(model):
    loaded, tokenizer = load(model), load_tokenizer(model)

    def drawn(**how):
        return "".join(write(loaded, tokenizer, "The heron", Sampling(max_tokens=9, **how)))

    assert drawn(temperature=2.0, seed=1) == drawn(temperature=2.0, seed=1) != drawn(temperature=2.0, seed=2)
    assert drawn(temperature=2.0, top_p=1e-6, seed=3) == drawn()


def test_no_more_is_written_than_the_model_has_positions(model):
    loaded, tokenizer = load(model), load_tokenizer(model)
    prompt = " barn" * 505
    count = len(tokenizer(prompt).input_ids)
    assert count < 512
    assert len(list(write(loaded, tokenizer, prompt, Sampling(max_tokens=99)))) <= 512 - count


def test_a_chat_answers_each_line_with_the_template_around_it(model, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is it?\n\nAnd?\n"))
    assert main(["generate", model, "--chat", "--max-tokens", "5"]) == 0
    first = naive(model, "<s>user\nWho is it?</s>\n<s>assistant\n", 5)
    second = naive(model, f"<s>user\nWho is it?</s>\n<s>assistant\n{first}</s>\n<s>user\nAnd?</s>\n<s>assistant\n", 5)
    assert capsys.readouterr().out == f"{first}\n{second}\n"


@pytest.mark.parametrize(("name", "keeps"), [("model.gguf", True), ("model", False)])
def test_weights_of_a_gguf_file_are_rebuilt_once_for_all_tokens(monkeypatch, capsys, name, keeps):
    read = types.SimpleNamespace(eval=lambda: None)
    monkeypatch.setattr("qzo.checkpoints.load.load", lambda *_: read)
    monkeypatch.setattr("qzo.checkpoints.load.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("qzo.tasks.sampled.write", lambda *_: [str(rebuilt._kept is not None)])
    assert main(["generate", name, "--prompt", "a"]) == 0
    assert capsys.readouterr().out == f"{keeps}\n"


def test_an_answer_without_a_word_is_told(model, monkeypatch, capsys):
    monkeypatch.setattr("qzo.tasks.sampled.write", lambda *_: iter(()))
    assert main(["generate", model, "--prompt", "a"]) == 0
    told = capsys.readouterr()
    assert told.out == "\n" and "before the first word; it is made for chat, which --chat asks for" in told.err


def test_a_run_answers_before_and_after(model, tmp_path, capsys):
    data = ["--data", str(write_kind(tmp_path, "completion")), "--validation-samples", "4", "--test-samples", "3"]
    steps = ["--steps", "6", "--eval-every", "6", "--batch-size", "4", "--lr", "1e-2", "--relative", "--eps", "1e-2"]
    run = str(tmp_path / "run")
    assert main(["train", model, *data, *steps, "--metric", "loss", "--out", run]) == 0
    best = json.loads((tmp_path / "run/result.json").read_text())["best_step"]
    capsys.readouterr()
    assert main(["generate", run, "--before", "--prompt", "Where does", "--max-tokens", "9"]) == 0
    before, after = capsys.readouterr().out.split("\nafter: ")
    assert before == "before: " + naive(model, "Where does", 9)
    assert best == 0 or after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "x", "--before"], "--before is for a run"),
        (["--prompt", "x", "--system", "y"], "--system is for --chat"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " barn" * 600], "and the model 512 positions; shorten it"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 is not 0 or a positive number"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0 is not in (0, 1]"),
        (["--prompt", "x", "--device", "gpu"], "--device gpu cannot be used"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(model, capsys, options, message):
    assert main(["generate", model, *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and told.count("\n") == 1
