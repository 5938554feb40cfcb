"""Answers of several tokens behind one prompt: the log-likelihoods of rows of their own, in one row an example."""

import inspect

import pytest
import torch
from own_files import write_kind
from task_files import make_model, make_tokenizer

from qzo import tasks
from qzo.models.loss import IGNORED
from qzo.models.prefix import SharedPrefix
from qzo.tasks import answers
from qzo.tasks.scoring import candidate_scores, loss, row_losses


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def objective(tmp_path, tokenizer):
    task = tasks.from_data(str(write_kind(tmp_path, "classes")), columns={"text": "body", "label": "queue"})
    return tasks.objective(task, tokenizer)


@pytest.fixture
def batch(objective):
    """Five examples of unequal length, three answers of unequal length each."""
    rows = sorted(objective.rows(objective.task.splits()["train"]), key=objective.length)
    made = objective.batch([*rows[:3], *rows[-2:]])
    assert len(set((made.targets != IGNORED).sum(1).tolist())) > 1 and not made.attention_mask.all()
    return made


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_losses_are_those_of_rows_of_their_own(tokenizer, batch, monkeypatch, dtype, rtol):
    model = make_model(len(tokenizer), dtype)
    wanted = row_losses(model, batch, batch.targets)
    assert answers.shares_prompts(model, batch, row_losses)
    found = answers.answer_losses(model, batch)
    assert torch.allclose(found, wanted, rtol=rtol, atol=rtol)
    assert torch.equal(found == 0, wanted == 0)
    monkeypatch.setattr(answers, "MOST_LOGITS", 1)  # example by example
    assert torch.allclose(answers.answer_losses(model, batch), wanted, rtol=rtol, atol=rtol)


def test_the_prompt_is_read_once_for_all_answers_and_below_trained_layers_once_a_step(tokenizer, objective, batch):
    model = make_model(len(tokenizer))
    objective.prepare(model)
    counts = []
    handle = model.model.layers[0].register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[:2]))
    with torch.no_grad():
        shared = SharedPrefix(model, lambda b: objective.loss(model, b), 1)
        first = shared(batch)
        assert [rows for rows, _ in counts] == [5] and counts[0][1] > batch.input_ids.shape[1]
        assert shared(batch) == shared(batch) == first and shared.shares
    handle.remove()


def test_gradients_are_those_of_rows_of_their_own(tokenizer, batch, monkeypatch):
    model, found = make_model(len(tokenizer)), []
    weight = model.model.layers[0].self_attn.k_proj.weight
    for shares in (True, False):
        monkeypatch.setitem(answers._fits, model, shares)
        found.append(torch.autograd.grad(loss(model, batch), weight)[0])
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


@torch.no_grad()
def test_models_that_would_read_such_a_row_otherwise_are_given_rows_of_their_own(tokenizer, batch, monkeypatch):
    model = make_model(len(tokenizer))
    wanted, forward = candidate_scores(model, batch), model.forward
    flash = make_model(len(tokenizer))
    flash.config._attn_implementation = "flash_attention_2"
    assert not answers.takes_answers(flash, row_losses)
    window = make_model(len(tokenizer))
    window.config.sliding_window = batch.input_ids.shape[1] - 1
    assert not answers.shares_prompts(window, batch, row_losses)

    def without_mask(attention_mask, **options):
        return forward(attention_mask=None if attention_mask.dim() == 4 else attention_mask, **options)

    other = make_model(len(tokenizer))
    monkeypatch.setattr(other, "forward", without_mask)
    other.forward.__signature__ = inspect.signature(forward)
    assert not answers.takes_answers(other, row_losses)
    assert torch.allclose(candidate_scores(other, batch), wanted, rtol=1e-5)
    batch.input_ids[1, -9] += 1  # candidates whose prompts differ
    assert not answers.shares_prompts(model, batch, row_losses)
