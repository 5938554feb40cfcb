"""All answers to a prompt in one row behind it, each of which sees the prompt and itself: the prompt is read once.

Where candidates are several tokens long, `Encoder.batch` writes each of them out behind its own copy of the prompt. A
model with an attention mask gives the same log-likelihoods, within rounding, from one row an example:

    prompt  answer 0  answer 1  answer 2        positions P, P + 1, ... begin anew in each answer

For C classes that is about a C-th of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qzo.models.loss import IGNORED, last_columns_only
from qzo.models.positions import position_options, text_config
from qzo.tasks.encoding import Batch

MASKED = ("sdpa", "eager")  # implementations of attention that add a mask [R, 1, T, T] to their scores
TRIED = 12, ((5, 6, 7), (8,), (9, 10), (5, 6, 4))  # tokens of a prompt, and answers, by which a model is tried
CLOSE = 0.02  # of a log-likelihood; rounding to bfloat16 makes a tenth of it
MOST_LOGITS = 2**26  # numbers of them at once where no gradient is wanted; 256 MiB in fp32
Rows = Callable[[nn.Module, Batch, Tensor], Tensor]  # losses of rows of their own
_fits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def takes_answers(model: nn.Module, rows: Rows) -> bool:
    """Whether a model scores answers in one row as `rows` does, tried once on made-up tokens, by two forward passes.

    Recurrences, convolutions and attention without a mask of one's own do not.
    """
    if model not in _fits:
        _fits[model] = _is_masked(model) and _agrees(model, rows)
    return _fits[model]


def shares_prompts(model: nn.Module, batch: Batch, rows: Rows) -> bool:
    """Whether `answer_losses` is of use for a batch and right for a model."""
    if batch.targets is None or len(batch.targets) <= len(batch.labels):
        return False
    window = getattr(text_config(model), "sliding_window", None)
    if isinstance(window, int) and batch.input_ids.shape[1] > window:
        return False
    return takes_answers(model, rows) and _prompts(batch) is not None


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each answer token, 0 where there is none, [R, A], as from rows of their own.

    Logits are made for the last column of the prompt and those of the answers, at most 256 MiB of them at once where no
    gradient is wanted. Extra memory: a mask [B, 1, T, T] in the model's dtype, with T of prompt and all answers.
    """
    found = _prompts(batch)
    assert found is not None and batch.targets is not None
    examples, width = len(batch.labels), batch.targets.shape[1]
    targets = _left(batch.targets).view(examples, -1, width)
    size = examples
    if not torch.is_grad_enabled():
        vocabulary = int(getattr(model.get_output_embeddings(), "out_features", 0) or 2**17)  # type: ignore[operator]
        size = max(1, MOST_LOGITS // ((1 + targets[0].numel()) * vocabulary))
    parts = [_losses(model, *(part[start : start + size] for part in (*found, targets)))
             for start in range(0, examples, size)]  # fmt: skip
    right = (batch.targets == IGNORED).sum(1, keepdim=True)  # back to where the answers were
    places = torch.arange(width, device=right.device) - right
    return torch.cat(parts).flatten(0, 1).gather(1, places.clamp_min(0)) * (places >= 0)


def _losses(model: nn.Module, prompt_mask: Tensor, prompt: Tensor, targets: Tensor) -> Tensor:
    """[B, C, A], of prompts [B, P] and answers with -100 behind them."""
    (examples, count, width), columns = targets.shape, prompt.shape[1]
    known = targets != IGNORED
    ids = torch.cat([prompt, targets.masked_fill(~known, 0).flatten(1)], 1)
    places = position_options(model, prompt_mask, columns)["position_ids"]
    behind = places[:, -1:] + 1 + torch.arange(width, device=ids.device).repeat(count)
    keep = 1 + count * width
    with last_columns_only(model, keep):
        output = model(
            input_ids=ids,
            attention_mask=_mask(prompt_mask, known, next(model.parameters()).dtype),
            position_ids=torch.cat([places, behind], 1),
            logits_to_keep=keep,
            use_cache=False,
        )
    logits = output.logits.float()
    own = logits[:, 1:].view(examples, count, width, -1)[:, :, :-1]
    before = torch.cat([logits[:, None, :1].expand(-1, count, -1, -1), own], 2)
    return nn.functional.cross_entropy(before.movedim(-1, 1), targets, ignore_index=IGNORED, reduction="none")


def _prompts(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Mask and tokens of the prompts, [B, P], which end at the same column; None where candidates differ in theirs."""
    assert batch.targets is not None
    answers = (batch.targets != IGNORED).sum(1)
    places = torch.arange(batch.input_ids.shape[1], device=answers.device) - answers[:, None]
    ids = batch.input_ids.gather(1, places.clamp_min(0))
    mask = batch.attention_mask.gather(1, places.clamp_min(0)) * (places >= 0)
    ids = ids.masked_fill(mask == 0, 0)
    count = len(ids) // len(batch.labels)
    of_first = ids[::count], mask[::count]
    if not all(map(torch.equal, (ids, mask), (part.repeat_interleave(count, 0) for part in of_first))):
        return None
    used = int(mask.sum(1).max())
    return of_first[1][:, -used:], of_first[0][:, -used:]


def _left(targets: Tensor) -> Tensor:
    """[R, A] with -100 in front, as it is with -100 behind."""
    width = targets.shape[1]
    places = torch.arange(width, device=targets.device) + (targets == IGNORED).sum(1, keepdim=True)
    return targets.gather(1, places.clamp_max(width - 1)).masked_fill(places >= width, IGNORED)


def _mask(prompt: Tensor, known: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, T], 0 where a column sees another, else the least number: prompts [B, P], answers [B, C, A]."""
    _, count, width = known.shape
    columns = prompt.shape[1]
    total = columns + count * width
    order = torch.arange(total, device=prompt.device)
    owner = torch.where(order < columns, -1, (order - columns) // width)
    sees = (order[:, None] >= order) & ((owner == owner[:, None]) | (owner == -1))
    there = torch.cat([prompt != 0, known.flatten(1)], 1)
    sees = sees & there[:, None, :] | torch.eye(total, dtype=torch.bool, device=prompt.device)  # no row sees nothing
    return torch.zeros(sees.shape, dtype=dtype, device=prompt.device).masked_fill(~sees, torch.finfo(dtype).min)[
        :, None
    ]


def _is_masked(model: nn.Module) -> bool:
    implementation = getattr(text_config(model), "_attn_implementation", None)
    try:
        takes = "position_ids" in position_options(model, torch.ones(1, 2), 2)
    except Exception:  # a model of another kind, which is scored as ever
        return False
    return implementation in MASKED and takes


@torch.no_grad()
def _agrees(model: nn.Module, rows_of: Rows) -> bool:
    """On made-up tokens, both ways."""
    length, answers = TRIED
    width = max(map(len, answers))
    device = next(model.parameters()).device
    vocabulary = int(getattr(model.get_input_embeddings(), "num_embeddings", 16))  # type: ignore[operator]
    rows = [[1 + n * 7 % (vocabulary - 1) for n in range(length)] + list(answer) for answer in answers]
    ids = torch.tensor([[0] * (length + width - len(row)) + row for row in rows], device=device) % vocabulary
    mask = torch.tensor([[0] * (length + width - len(row)) + [1] * len(row) for row in rows], device=device)
    targets = ids[:, -width:].clone()
    for row, answer in enumerate(answers):
        targets[row, : width - len(answer)] = IGNORED
    batch = Batch(ids, mask, torch.zeros(1, dtype=torch.int64, device=device), targets=targets)
    training = model.training
    model.eval()
    try:
        one, other = answer_losses(model, batch).sum(1), rows_of(model, batch, targets).sum(1)
    except Exception:  # whatever a model of another kind makes of such a mask
        return False
    finally:
        model.train(training)
    return bool(torch.allclose(one, other, rtol=CLOSE, atol=CLOSE))
