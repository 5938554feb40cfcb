"""Raw rows in QZOTrainer: recognised, encoded, learnt and scored as `qzo train --data` does it with a file of them."""

import copy
import dataclasses
import types

import pytest
import torch
from own_files import CHATML, ROWS, chat, completion, lines, ticket
from task_files import make_model, make_tokenizer
from trainer_options import OPTIONS
from transformers import TrainingArguments

from qzo import QZO, QzoError, QZOTrainer, quantize, scales, tasks

COUNT = 8
KINDS = {
    **{kind: [make(n) for n in range(COUNT)] for kind, make in ROWS.items()},
    "text": [{"text": f"Chapter {n}. The badger slept" + " in the barn" * (n + 1)} for n in range(COUNT)],
    "completion of a chat": [
        {"prompt": c[:3], "completion": c[3:]} for c in (chat(n)["messages"] for n in range(COUNT))
    ],
    "preference of a chat": [
        {
            "chosen": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": f"heron {n}"}],
            "rejected": [{"role": "user", "content": "Say"}, {"role": "assistant", "content": f"no {n}"}],
        }
        for n in range(COUNT)
    ],
}
STEP = {"learning_rate": 1e-3, "max_steps": 1, "train_sampling_strategy": "sequential", "seed": 5}
RULE = {"relative": True, "eps": 1e-2}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def quantized(tokenizer):
    return quantize(make_model(len(tokenizer)), group_size=32)


@pytest.fixture
def model(quantized):
    return copy.deepcopy(quantized)


@dataclasses.dataclass
class Config(TrainingArguments):
    """What QZOTrainer asks an SFTConfig of TRL."""

    dataset_text_field: str = "text"
    max_length: int | None = 1024
    packing: bool = False
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    shuffle_dataset: bool = False
    truncation_mode: str = "keep_start"
    padding_free: bool = False


def trainer(model, tokenizer, rows, kind=TrainingArguments, asked=None, formatting_func=None, evaluated=None, **more):
    arguments = kind("out", **{**OPTIONS, **STEP, **more})
    return QZOTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        qzo_options=RULE,
        data_options=asked,
        formatting_func=formatting_func,
    )


def of_file(folder, rows, tokenizer):
    """The objective of `qzo train --data` with a file of these rows, and what it makes of them, in their order."""
    (folder / "rows.jsonl").write_text(lines(rows))
    task = tasks.from_data(str(folder / "rows.jsonl"))
    objective = tasks.objective(task, tokenizer).fitted(512)
    return objective, objective.rows(task.pools.source["train"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_an_evaluation_are_those_of_a_data_file_with_the_same_rows(tmp_path, model, tokenizer, kind):
    rows = KINDS[kind]
    objective, encoded = of_file(tmp_path, rows, tokenizer)
    alone = copy.deepcopy(model)
    made = trainer(model, tokenizer, rows, evaluated=rows)
    expected = objective.evaluate(alone, encoded, 8)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected["loss"], rel=1e-6)
    optimizer = QZO(scales(alone), lr=1e-3, seed=5, **RULE)
    loss = optimizer.step(lambda: objective.loss(alone, objective.batch(encoded[:4])))
    made.train()
    assert made.state.log_history[-2]["loss"] == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(scale, scales(alone)[name]) for name, scale in scales(made.model).items())


def test_other_rows_are_predicted_by_their_scores(model, tokenizer):
    made = trainer(model, tokenizer, KINDS["classes"])
    assert {"test_accuracy", "test_macro_f1", "test_loss"} <= made.predict(KINDS["classes"][:2]).metrics.keys()


@pytest.mark.parametrize("kind", ["classes", "completion"])
def test_micro_batches_make_up_the_step_of_all_their_rows(model, tokenizer, kind):
    rows = KINDS[kind]
    if kind == "completion":
        rows = [row | {"completion": row["completion"] * (n + 1)} for n, row in enumerate(rows)]
    losses = []
    for size, count in ((8, 1), (2, 4)):
        made = trainer(
            copy.deepcopy(model),
            tokenizer,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        made.train()
        losses.append(made.zeroth_order.last.loss_plus)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def learnt(made, number=0):
    """What is learnt of a training row, decoded."""
    tokens = made.train_dataset[number][0]
    kept = [token for token, counts in zip(tokens.ids, tokens.learnt, strict=True) if counts]
    return made.processing_class.decode(kept)


def test_an_sft_configuration_says_what_is_learnt_packed_and_cut(model, tokenizer):
    chats, texts = KINDS["chat"], [{"body": row["text"]} for row in KINDS["text"]]
    assert "Who is 0?" in learnt(trainer(model, tokenizer, chats, Config))
    assert "Who is 0?" not in learnt(trainer(model, tokenizer, chats, Config, assistant_only_loss=True))
    assert learnt(trainer(model, tokenizer, KINDS["completion"], Config)).startswith(" In the barn 0")
    whole = trainer(model, tokenizer, KINDS["completion"], Config, completion_only_loss=False)
    assert learnt(whole).startswith("here does finch") or learnt(whole).startswith(" does finch")
    alone = trainer(model, tokenizer, texts, Config, dataset_text_field="body")
    assert len(alone.train_dataset) == COUNT and learnt(alone).endswith("in the barn</s>")
    packed = trainer(model, tokenizer, texts, Config, dataset_text_field="body", packing=True, max_length=16)
    lengths = [len(row[0].ids) for row in packed.train_dataset.rows]
    assert set(lengths[:-1]) == {16} and len(lengths) > COUNT
    with pytest.warns(UserWarning, match="are longer than max_length=20 tokens and are cut"):
        cut = trainer(model, tokenizer, chats, Config, max_length=20)
    assert {len(row[0].ids) for row in cut.train_dataset.rows} == {20}


def test_rows_of_a_data_set_are_formatted_named_and_grouped_by_length(model, tokenizer):
    class Named(list):
        features = types.MappingProxyType({"label": types.SimpleNamespace(names=["bad", "good"]), "text": None})

    rows = Named({"text": f"film {n}", "label": n % 2} for n in range(COUNT))
    made = trainer(model, tokenizer, rows, asked={"columns": {"label": "label"}, "centering": 0.5})
    assert made.train_dataset[1].answers == (" bad", " good") and made.train_dataset[1].label == 1
    asked = {"columns": {"prompt": "question", "completion": "answer"}}
    other = [{"question": "Who?", "answer": f" the newt {n}"} for n in range(COUNT)]
    assert learnt(trainer(model, tokenizer, other, asked=asked)) == " the newt 0</s>"
    text = trainer(model, tokenizer, other, Config, formatting_func=lambda row: f"{row['question']} {row['answer']}")
    assert learnt(text).endswith("the newt 0</s>")
    grouped = trainer(model, tokenizer, KINDS["completion"], train_sampling_strategy="group_by_length")
    assert sorted(grouped._get_train_sampler()) == list(range(COUNT))
    several = trainer(model, tokenizer, other, asked=asked, evaluated={"a": other[:2], "b": other[:3]})
    assert {"eval_a_loss", "eval_b_perplexity"} <= several.evaluate().keys()


def test_the_metric_of_the_best_state_is_measured(model, tokenizer):
    made = trainer(model, tokenizer, KINDS["completion"], evaluated=KINDS["completion"][:2], metric_for_best_model="f1")
    assert {"eval_f1", "eval_exact_match", "eval_loss", "eval_perplexity"} <= made.evaluate().keys()


def test_rows_that_are_tokenised_and_collators_of_ones_own_are_left_alone(model, tokenizer):
    ready = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    assert trainer(model, tokenizer, ready).train_dataset is ready
    own = QZOTrainer(
        model, TrainingArguments("out", **OPTIONS), data_collator=lambda rows: rows, train_dataset=[ticket(0)]
    )
    assert own.train_dataset == [ticket(0)]


BROKEN = [completion(n) for n in range(3)] + [{"prompt": "a", "completion": 3}]
WRONG = {
    "a wrong row": ({"rows": BROKEN}, 'train_dataset, row 4: field "completion" is 3; it must be of type str or list'),
    "no known field": ({"rows": [{"question": "a"}]}, 'train_dataset, row 1 has the fields "question"; needed are'),
    "a row of another kind": ({"rows": [completion(0), 3]}, "train_dataset, row 2 is 3; it must be a dictionary"),
    "an unseen label": (
        {"rows": [ticket(0), ticket(1)], "evaluated": [ticket(0), {"text": "a", "label": "b"}]},
        'eval_dataset, row 2: no training row has the label "b"',
    ),
    "no rows by name": (
        {"rows": KINDS["chat"], "evaluated": {"chats": [{"messages": []}]}},
        'eval_dataset "chats", row 1: "messages" is empty',
    ),
    "packed chats": ({"rows": KINDS["chat"], "kind": Config, "packing": True}, "packing=True is for plain text"),
    "a long row": (
        {"rows": KINDS["chat"], "asked": {"max_length": 600}},
        "max_length=600 is more than the 512 positions",
    ),
    "an unknown option": ({"rows": KINDS["chat"], "asked": {"length": 6}}, 'data_options has no "length"; it takes'),
    "smoothing": ({"rows": KINDS["chat"], "label_smoothing_factor": 0.1}, "label_smoothing_factor is for tokenised"),
    "the end kept": (
        {"rows": KINDS["chat"], "kind": Config, "truncation_mode": "keep_end"},
        "truncation_mode='keep_end' cannot be honoured for raw rows: a prompt of text is cut at its beginning",
    ),
    "formatting tokens": (
        {"rows": [{"input_ids": [1, 2]}], "formatting_func": str},
        "data_options and formatting_func are for raw rows",
    ),
    "formatting that fails": (
        {"rows": KINDS["chat"], "formatting_func": lambda row: row["text"]},
        "train_dataset, row 1: formatting_func raises KeyError: 'text'",
    ),
    "formatting to a list": (
        {"rows": KINDS["chat"], "formatting_func": lambda row: [1]},
        r"train_dataset, row 1: formatting_func returns \[1\]; it must return the text",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_and_options_are_one_line(model, tokenizer, case):
    options, message = WRONG[case]
    with pytest.raises(QzoError, match=message):
        trainer(model, tokenizer, **options)


def test_a_stream_and_a_model_without_a_tokenizer_are_told(model, tokenizer):
    class Stream:
        def __iter__(self):
            yield ticket(0)

    with pytest.raises(QzoError, match=r"train_dataset is a Stream without a length.*list\(dataset.take"):
        trainer(model, tokenizer, Stream())
    with pytest.raises(QzoError, match="raw rows need the tokenizer of the model; give it as processing_class"):
        trainer(model, None, KINDS["chat"])
    with pytest.warns(UserWarning, match="padding_free=True: rows are padded, the loss is the same"):
        trainer(model, tokenizer, KINDS["chat"], Config, padding_free=True)
