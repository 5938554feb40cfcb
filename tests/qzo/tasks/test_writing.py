"""Answers that a model writes."""

from itertools import islice

import pytest
import torch
from task_files import make_model, make_tokenizer, write_task
from torch import nn

from qzo import tasks
from qzo.tasks.encoding import MAX_ANSWER, Batch, padded
from qzo.tasks.sampled import drawn
from qzo.tasks.writing import tokens_behind, write_answers


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def prepare(tmp_path, tokenizer):
    task = tasks.get("squad", write_task(tmp_path, "squad"))
    return tasks.Encoder(task, tokenizer, 256), task.splits(0, 12, 6, 9)


def test_written_answers_are_greedy_and_end_at_a_new_line(tmp_path, tokenizer):
    model = make_model(len(tokenizer))
    encoder, splits = prepare(tmp_path, tokenizer)
    examples = splits["test"][:3]
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 5.0
    naive = []
    for example in examples:
        ids = list(encoder.encode(example).prompt)
        start = len(ids)
        stops = {tokenizer.eos_token_id, *tokenizer.encode("\n")}
        while len(ids) < start + MAX_ANSWER and ids[-1] not in stops:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        naive.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip().split("\n")[0].strip())
    assert write_answers(model, encoder, examples) == naive and len(set(map(len, naive))) > 1


def test_no_token_is_written_once_all_answers_have_ended(tmp_path, tokenizer):
    model = make_model(len(tokenizer))
    encoder, splits = prepare(tmp_path, tokenizer)
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(output.logits))
    (newline,) = tokenizer.encode("\n")
    model.lm_head = nn.Linear(32, len(tokenizer))
    with torch.no_grad():
        model.lm_head.bias.zero_()[newline] = 1e4
    assert write_answers(model, encoder, splits["test"][:3]) == ["", "", ""] and len(calls) == 1


def batch_of(rows, copies=1):
    ids, mask = padded([row for row in rows for _ in range(copies)], 0)
    return Batch(ids, mask, torch.zeros(len(ids), dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cached", [True, False], ids=["keys and values", "another cache"])
def test_copies_of_a_prompt_read_it_once_and_write_what_repeated_prompts_do(
    tokenizer, monkeypatch, temperature, cached
):
    model, rows = make_model(len(tokenizer)), [[5, 6, 7, 8], [9, 5]]
    if not cached:
        monkeypatch.setattr("qzo.tasks.writing._repeated", lambda *_: False)

    def columns(batch, copies):
        dice = torch.Generator().manual_seed(3)
        written = tokens_behind(model, batch, lambda logits: drawn(logits, temperature, dice), copies)
        return torch.stack(list(islice(written, 6)), 1)

    assert torch.equal(columns(batch_of(rows), 3), columns(batch_of(rows, 3), 1))


def test_tokens_are_drawn_by_their_probability_and_stay_where_little_changes():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    first, again = (drawn(logits, 0.5, torch.Generator().manual_seed(0)) for _ in range(2))
    shares = torch.bincount(first, minlength=4) / len(first)
    assert torch.equal(first, again) and torch.allclose(shares, (logits[0] / 0.5).softmax(0), atol=0.01)
    moved = logits + 0.05 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    far = ((moved[0] / 0.5).softmax(0) - (logits[0] / 0.5).softmax(0)).abs().sum() / 2
    differ = (drawn(moved, 0.5, torch.Generator().manual_seed(0)) != first).float().mean()
    assert 0 < differ < 2 * far
