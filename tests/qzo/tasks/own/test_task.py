"""What is made of a user's rows: kinds, label words, splits, tokens that are learnt, losses and scores."""

import json
import math

import pytest
import torch
from own_files import CHATML, ROWS, lines, write_kind
from task_files import make_model, make_tokenizer

from qzo import QzoError, tasks
from qzo.models.loss import IGNORED
from qzo.tasks.own.classes import asked_by, label_of, labels_of
from qzo.tasks.own.encoding import Tokens
from qzo.tasks.own.kinds import parse_columns
from qzo.tasks.own.scoring import sequence_loss, token_losses
from qzo.tasks.own.sequence import preference_row
from qzo.tasks.source.row import Row

KINDS = ("classes", "completion", "chat", "preference", "text")
COLUMNS = {"text": "body", "label": "queue"}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


def make(folder, kind, **options):
    columns = COLUMNS if kind == "classes" else None
    return tasks.from_data(str(write_kind(folder, kind)), columns=columns, **options)


def prepared(folder, kind, tokenizer, max_length=None):
    """The objective, and the rows of the training split."""
    task = make(folder, kind)
    objective = tasks.objective(task, tokenizer, max_length).fitted(max_length)
    return objective, objective.rows(task.splits()["train"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised_split_trained_and_scored(tmp_path, tokenizer, model, kind):
    task = make(tmp_path, kind)
    assert task.kind.name == kind and task.metric == ("accuracy" if kind in ("classes", "preference") else "loss")
    splits = task.splits(seed=1)
    keys = [{example.key() for example in split} for split in splits.values()]
    assert list(splits) == ["train", "validation", "test"] and not keys[0] & keys[1] and not keys[0] & keys[2]
    assert splits == task.splits(seed=1) and splits != task.splits(seed=2)
    objective, rows = prepared(tmp_path, kind, tokenizer, 64)
    with torch.no_grad():
        assert math.isfinite(float(objective.loss(model, objective.batch(rows[:4]))))
    result = objective.evaluate(model, rows[:5], 2, last=True)
    assert result["count"] == 5 and task.metric in result and math.isfinite(result["loss"])
    assert ("exact_match" in result) == (kind in ("completion", "chat")) and ("confusion" in result) == (
        kind == "classes"
    )
    told = tasks.summary(task, splits, objective, {"train": rows})
    assert told[0].startswith(f"data: {task.name}, ") and told[-1].startswith("an example: ") and "[" in told[-1]


def test_splits_of_ones_own_are_kept_and_nothing_is_cut_from_them(tmp_path):
    for name, numbers in (("train", range(30)), ("validation", range(20, 40)), ("test", range(40, 45))):
        (tmp_path / f"{name}.jsonl").write_text(lines([ROWS["classes"](n) for n in numbers]))
    sizes = {split: len(found) for split, found in tasks.from_data(str(tmp_path)).splits().items()}
    assert sizes == {"train": 20, "validation": 20, "test": 5}  # no text of validation stays in training
    (tmp_path / "test.jsonl").unlink()
    assert list(tasks.from_data(str(tmp_path)).splits()) == ["train", "validation"]
    train, both = str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl")
    assert list(tasks.from_data(train, validation=both, test=both).splits()) == ["train", "validation", "test"]
    with pytest.raises(QzoError, match="all 30 training examples also stand in another split"):
        tasks.from_data(train, test=train).splits()
    few = tasks.from_data(str(tmp_path / "train.jsonl"), sizes={"train": 2, "validation": 3, "test": 4}).splits()
    assert [len(found) for found in few.values()] == [2, 3, 4]


@pytest.mark.parametrize(
    ("value", "label"), [(" a ", "a"), (3, "3"), (2.0, "2"), (True, "true"), (False, "false"), ("1", "1")]
)
def test_labels_are_text_numbers_or_truth(value, label):
    assert label_of(Row("here", {"label": value})) == label


def test_label_words_are_the_labels_or_what_a_file_says(tmp_path):
    rows = [Row("here", {"text": "x", "label": label}) for label in (10, 9, "b", "a", 9)]
    assert labels_of(rows) == ("9", "10", "a", "b")
    assert make(tmp_path, "classes").words == (" billing", " shipping", " very old bills")
    assert make(tmp_path, "classes").splits()["train"][0].ask == "\nQueue:" and asked_by("issue_type") == "Issue type"
    words = tmp_path / "words"
    words.write_text(json.dumps({"billing": "Bills", "shipping": "Parcels", "very old bills": "Old"}))
    assert make(tmp_path, "classes", label_words=str(words)).words == (" Bills", " Parcels", " Old")
    words.write_text("billing\tBills\nshipping\tParcels\nvery old bills\tParcels\n")
    with pytest.raises(QzoError, match='has the words "Parcels" for two labels'):
        make(tmp_path, "classes", label_words=str(words))
    words.write_text("billing\tBills\n")
    with pytest.raises(QzoError, match='has no words for the label "shipping"'):
        make(tmp_path, "classes", label_words=str(words))


def test_confusion_tells_what_was_taken_for_what(tmp_path, tokenizer, model):
    objective, rows = prepared(tmp_path, "classes", tokenizer)
    result = objective.evaluate(model, rows, 8)
    right = sum(counts.get(label, 0) for label, counts in result["confusion"].items())
    assert right / len(rows) == result["accuracy"] and 0 <= result["macro_f1"] <= 1
    assert sum(sum(counts.values()) for counts in result["confusion"].values()) == len(rows)


def learnt(objective, row) -> list[str]:
    """What of each answer is learnt, decoded."""
    return [
        objective.encoder.tokenizer.decode([i for i, counts in zip(t.ids, t.learnt, strict=True) if counts])
        for t in row
    ]


def test_what_is_learnt_is_the_completion_or_the_assistants_turns(tmp_path, tokenizer):
    objective, rows = prepared(tmp_path, "completion", tokenizer)
    assert learnt(objective, rows[0])[0].startswith(" In the barn ") and learnt(objective, rows[0])[0].endswith("</s>")
    objective, rows = prepared(tmp_path, "chat", tokenizer)
    (text,) = learnt(objective, rows[0])
    assert text.startswith("The newt ") and text.endswith("</s>\nA lynx</s>\n") and "Who" not in text
    whole = tokenizer.decode(rows[0][0].ids)
    assert whole.startswith("<s>user\nWho is ") and whole.count("<s>assistant\n") == 2
    objective, rows = prepared(tmp_path, "preference", tokenizer)
    better, worse = learnt(objective, rows[0])
    assert better.startswith(" a heron ") and worse.startswith(" no ")


def test_messages_may_be_prompt_and_completion_and_only_the_latter_is_learnt(tmp_path, tokenizer):
    turns = [{"role": r, "content": c} for r, c in (("user", "a?"), ("assistant", "b"), ("user", "c?"))]
    rows = [{"prompt": turns, "completion": [{"role": "assistant", "content": f"d {n}"}]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    objective = tasks.objective(tasks.from_data(str(tmp_path / "rows.jsonl")), tokenizer)
    (text,) = learnt(objective, objective.rows(objective.task.splits()["train"])[0])
    assert text.startswith("d ") and "b" not in text


def test_a_prompt_that_stands_in_both_answers_is_found():
    pair = preference_row(Row("here", {"chosen": "Q: hue?\nA: blue sky", "rejected": "Q: hue?\nA: bluish"}))
    assert pair.prompt == "Q: hue?\nA:" and pair.answers == (" blue sky", " bluish")


def test_templates_that_are_missing_raise_or_rewrite_are_told_with_the_row(tmp_path, tokenizer):
    plain = make_tokenizer()
    objective = tasks.objective(make(tmp_path, "chat"), plain)
    examples = objective.task.splits()["train"]
    with pytest.raises(QzoError, match="has no chat template"):
        objective.rows(examples)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(QzoError, match=r"chat.jsonl, line \d+: the chat template refuses .*roles must alternate"):
        tasks.objective(objective.task, plain).rows(examples)
    plain.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(
        QzoError, match=r"line \d+: the chat template of this tokenizer writes earlier turns in another"
    ):
        tasks.objective(objective.task, plain).rows(examples)


def test_rows_that_are_too_long_are_cut_counted_and_left_out_where_nothing_is_learnt(tmp_path, tokenizer):
    _, rows = prepared(tmp_path, "completion", tokenizer)
    full = rows[0][0]
    short, cut = prepared(tmp_path, "completion", tokenizer, len(full.ids) - 2)
    tokens = cut[0][0]
    assert tokens.ids == (full.ids[0], *full.ids[3:]) and sum(tokens.learnt) == sum(full.learnt)
    (notice,) = short.notices(short.task.splits())
    assert "rows are longer than" in notice and "prompts of text at their beginning" in notice
    _, rows = prepared(tmp_path, "chat", tokenizer, 24)
    assert all(len(row[0].ids) == 24 and any(row[0].learnt) for row in rows)
    with pytest.raises(QzoError, match="max_length=4 leaves nothing to learn of 32 rows"):
        prepared(tmp_path, "chat", tokenizer, 4)


def test_texts_are_packed_into_rows_of_one_length_and_every_token_is_there(tmp_path, tokenizer):
    objective, rows = prepared(tmp_path, "text", tokenizer, 50)
    texts = [example.answers[0] for example in objective.task.splits()["train"]]
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    packed = [token for row in rows for token in row[0].ids]
    assert packed == ids[: len(packed)] and len(ids) - len(packed) <= 1
    assert {len(row[0].ids) for row in rows[:-1]} == {50}
    assert tasks.objective(objective.task, tokenizer).fitted(8192).encoder.max_length == 128


@pytest.mark.parametrize("kind", ["completion", "chat", "text"])
def test_the_loss_is_that_of_all_logits_of_unpadded_rows(tmp_path, tokenizer, model, kind):
    objective, rows = prepared(tmp_path, kind, tokenizer, 40)
    rows = [rows[0], rows[-1], rows[1]]
    total, count = 0.0, 0
    for (tokens,) in rows:
        ids, keep = torch.tensor([tokens.ids]), torch.tensor(tokens.learnt)
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].detach(), ids[0, 1:], reduction="none")
        total, count = total + float(losses[keep[1:]].sum()), count + int(keep.sum())
    batch = objective.batch(rows)
    with torch.no_grad():
        assert float(objective.loss(model, batch)) == pytest.approx(total / count, rel=1e-5)
    assert int((batch.targets != IGNORED).sum()) == count


def test_logits_are_made_in_parts_where_no_gradient_is_wanted(tmp_path, tokenizer, model, monkeypatch):
    objective, rows = prepared(tmp_path, "completion", tokenizer)
    batch = objective.batch(rows[:5])
    with torch.no_grad():
        whole = token_losses(model, batch)
        monkeypatch.setattr("qzo.tasks.own.scoring.MOST_LOGITS", 2 * (batch.targets.shape[1] + 1) * len(tokenizer))
        counts = []
        handle = model.register_forward_hook(lambda *_: counts.append(1))
        assert torch.allclose(token_losses(model, batch), whole, atol=1e-5) and len(counts) == 3
        handle.remove()
    assert objective.loss(model, batch).requires_grad


def test_a_preference_is_likelihood_and_odds_ratio(tmp_path, tokenizer, model):
    objective, rows = prepared(tmp_path, "preference", tokenizer)
    batch, means = objective.batch(rows[:3]), []
    with torch.no_grad():
        losses = token_losses(model, batch)
        counts = (batch.targets != IGNORED).sum(1)
        means = (losses.sum(1) / counts).double().view(-1, 2)
        p = torch.exp(-means)
        odds = torch.log(p[:, 0] / (1 - p[:, 0])) - torch.log(p[:, 1] / (1 - p[:, 1]))
        likelihood = losses[0::2].sum() / counts[0::2].sum()
        expected = float(likelihood) + float(torch.log1p(torch.exp(-odds)).mean())
        assert float(sequence_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    result = objective.evaluate(model, rows, 4)
    assert 0 <= result["accuracy"] <= 1 and result["count"] == len(rows)


def test_written_answers_are_compared_with_those_of_the_rows(tmp_path, tokenizer, model, monkeypatch):
    objective, rows = prepared(tmp_path, "completion", tokenizer)
    wanted = [objective.encoder.last_answer(row) for row in rows[:4]]
    assert all(text.startswith("In the barn ") for text in wanted)
    monkeypatch.setattr("qzo.tasks.own.scoring.continued", lambda *_: ["in the BARN!", "no"])
    result = objective.evaluate(model, rows[:2], 2, last=True)
    assert result["exact_match"] == 0 and 0 < result["f1"] < 1
    assert "exact_match" not in objective.evaluate(model, rows[:2], 2)


def test_prompts_and_answers_that_do_not_go_into_the_positions_together_are_written_apart(
    tmp_path, tokenizer, model, monkeypatch
):
    objective, _ = prepared(tmp_path, "completion", tokenizer)
    rows = [(Tokens(tuple(range(5, 25)), tuple(column >= begins for column in range(20))),) for begins in (17, 3, 9)]
    scores = [objective.evaluate(model, [row], 1, last=True) for row in rows]
    monkeypatch.setattr(model.config, "max_position_embeddings", 20)
    together = objective.evaluate(model, rows, 3, last=True)
    assert together["f1"] == pytest.approx(sum(score["f1"] for score in scores) / 3)


def test_columns_are_named_by_field():
    assert parse_columns("prompt=question, completion = answer") == {"prompt": "question", "completion": "answer"}
    for text in ("question", "prompt=", "input=x"):
        with pytest.raises(QzoError, match="is not FIELD=COLUMN with a field of chosen"):
            parse_columns(text)


def test_labelled_texts_are_encoded_once_where_they_fit(tmp_path, tokenizer, monkeypatch):
    objective, rows = prepared(tmp_path, "classes", tokenizer)
    lengths = sorted(objective.length(row) for row in rows)
    fitted = objective.fitted(lengths[-1] - 1)
    fitted.rows(rows)
    assert 0 < fitted.encoder.cut(rows) < len(rows)
    monkeypatch.setattr("qzo.tasks.encoding.Encoder._encode", lambda *_: pytest.fail("a text was encoded again"))
    assert objective.fitted(512).rows(rows) == rows
