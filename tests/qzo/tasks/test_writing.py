"""Answers that a model writes."""

import pytest
import torch
from task_files import make_model, make_tokenizer, write_task
from torch import nn

from qzo import tasks
from qzo.tasks.encoding import MAX_ANSWER
from qzo.tasks.writing import write_answers


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
