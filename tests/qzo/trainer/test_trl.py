"""QZOTrainer mixed with the trainers of TRL, where it is installed: messages, completions, packed text, preferences."""

import random

import pytest
import standin
import torch
from gguf_files import tiny, write_gguf
from trainer_options import OPTIONS as SHORT
from transformers import AutoTokenizer

from qzo import QzoError, QZOTrainer, load

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
datasets = pytest.importorskip("datasets", reason="TRL needs datasets, which is not installed")
DICE = random.Random(0)
OPTIONS = SHORT | {"bf16": False}


class QZOSFT(QZOTrainer, trl.SFTTrainer):
    """Supervised fine-tuning by TRL, with the steps of QZO."""


class QZODPO(QZOTrainer, trl.DPOTrainer):
    """Direct preference optimization by TRL, with the steps of QZO."""


def words(count):
    return " ".join(f"w{DICE.randrange(5, 96)}" for _ in range(count))


ROWS = [[DICE.randrange(5, 96) for _ in range(length)] for length in (4, 9, 6, 7, 5, 8, 9, 3)]


def said(role, count):
    return {"role": role, "content": words(count)}


DATA = {  # rows, and what of the arguments is not the default
    "tokens": ([{"input_ids": row, "labels": row} for row in ROWS], {"max_length": None}),
    "messages": ([{"messages": [said("user", 4), said("assistant", 3 + i % 3)]} for i in range(8)], {}),
    "completions": ([{"prompt": f"{words(4)} ", "completion": words(3 + i % 3)} for i in range(8)], {}),
    "completions of a chat": (
        [{"prompt": [said("user", 4)], "completion": [said("assistant", 3 + i % 3)]} for i in range(8)],
        {},
    ),
    "packed text": ([{"text": words(4 + i % 5)} for i in range(32)], {"packing": True, "max_length": 16}),
    "wrapped text": (
        [{"text": words(4 + i % 5)} for i in range(32)],
        {"packing": True, "max_length": 16, "packing_strategy": "wrapped"},
    ),
}
PREFERENCES = [{"prompt": f"{words(4)} ", "chosen": words(3 + i % 3), "rejected": words(3 + i % 2)} for i in range(8)]


@pytest.fixture
def folder(make_model, tmp_path):
    return standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True)


def tokenizer_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = "w4"
    ending = "{% if add_generation_prompt %}w3 {% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}w3 {{{{ m['content'] }}}} w4 {{% endfor %}}{ending}"
    return tokenizer


def trained(make, lives=("first", "second")):
    """Two lives of the same training; the first one, and whether both ended in the same bits."""
    made = [make(life) for life in lives]
    for trainer in made:
        trainer.train()
    first, second = (trainer.zeroth_order.truth() for trainer in made)
    assert made[0].zeroth_order.steps == 2 and made[0].zeroth_order.skipped_steps == 0
    return made[0], all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", DATA)
def test_a_mixture_trains_the_same_twice_and_names_its_metrics_as_of_training(folder, tmp_path, kind):
    rows, own = DATA[kind]

    def make(life):
        arguments = trl.SFTConfig(str(tmp_path / life), **own, **OPTIONS)
        data = datasets.Dataset.from_list(rows)
        return QZOSFT(load(folder), arguments, train_dataset=data, processing_class=tokenizer_of(folder))

    trainer, is_same = trained(make)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert is_same and len(logs) == 2 and not [name for name in logs[0] if name.startswith("eval_")]
    assert "mean_token_accuracy" in logs[0] and logs[0]["directional_derivative"] != 0


def test_a_packed_gguf_file_with_a_tied_vocabulary_is_mixed_too(folder, tmp_path):
    file = write_gguf(tiny(), tmp_path / "model.gguf", "Q4_0")

    def make(life):
        arguments = trl.SFTConfig(str(tmp_path / life), **OPTIONS)
        data = datasets.Dataset.from_list(DATA["completions"][0])
        model = load(file, dequantize=False)
        return QZOSFT(model, arguments, train_dataset=data, processing_class=tokenizer_of(folder))

    assert trained(make)[1]


@pytest.mark.parametrize("reference", ["given", "precomputed", None])
def test_preferences_take_a_reference_that_qzo_loaded(folder, tmp_path, reference):
    def make(life):
        precomputed = {"precompute_ref_log_probs": True} if reference == "precomputed" else {}
        arguments = trl.DPOConfig(str(tmp_path / life), **precomputed, **OPTIONS)
        model, data = load(folder), datasets.Dataset.from_list(PREFERENCES)
        other = load(folder) if reference == "given" else None
        return QZODPO(model, other, arguments, train_dataset=data, processing_class=tokenizer_of(folder))

    if reference is None:
        with pytest.raises(QzoError, match=r"ref_model=None: .* give ref_model=qzo\.load\(\.\.\.\)"):
            make("first")
        return
    trainer, is_same = trained(make)
    assert is_same and abs(trainer.state.log_history[0]["loss"] - 0.6931) < 0.01  # log 2: they began as one


TEXTS = [{"text": f"{words(4 + i % 5)} "} for i in range(32)]  # to each of which TRL adds the last word by itself
PAIRS = [{"prompt": f"{words(4)} ", "completion": f"{words(3 + i % 3)} "} for i in range(8)]
SHAPES = {  # raw rows, and what of the arguments is not the default
    "text": (TEXTS[:8], {}),
    "completions": (PAIRS, {}),
    "completions, prompts learnt too": (PAIRS, {"completion_only_loss": False}),
    "completions of a chat": (DATA["completions of a chat"][0], {}),
    "messages": (DATA["messages"][0], {}),
    "wrapped text": (TEXTS, DATA["wrapped text"][1]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_raw_rows_is_that_of_trls_own_trainer(make_model, folder, tmp_path, shape):
    rows, own = SHAPES[shape]
    arguments = trl.SFTConfig(str(tmp_path / "out"), **own, **OPTIONS)
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer_of(folder)}
    model = load(folder).float()
    losses = []
    for kind in (QZOTrainer, QZOSFT):
        made = kind(model, arguments, **given)
        inputs = made.data_collator([made.train_dataset[number] for number in range(len(made.train_dataset))])
        with torch.no_grad():
            losses.append(float(made.compute_loss(model, dict(inputs))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
