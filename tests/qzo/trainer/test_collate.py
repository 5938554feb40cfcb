"""Rows of different lengths with QZOTrainer."""

import random

import pytest
import standin
import torch
from trainer_options import OPTIONS
from transformers import TrainingArguments, default_data_collator

from qzo import QZOTrainer, load
from qzo.trainer.collate import padding

DICE = random.Random(0)
ROWS = [[DICE.randrange(5, 96) for _ in range(length)] for length in (4, 9, 6, 7, 5, 8, 9, 3)]


@pytest.fixture
def model(make_model, tmp_path):
    return load(standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / "model", True))


def test_short_rows_are_filled_up_and_the_filling_is_masked():
    rows = [
        {"input_ids": [7, 8, 9], "labels": [-100, 8, 9], "weight": 2.0},
        {"input_ids": [5], "labels": [5], "weight": 1.0},
    ]
    batch = padding(default_data_collator, 3)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9], [5, 3, 3]] and batch["labels"].tolist()[1] == [5, -100, -100]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["weight"].tolist() == [2.0, 1.0]
    left = padding(default_data_collator, 3, left=True)([{"input_ids": torch.tensor(row["input_ids"])} for row in rows])
    assert left["input_ids"].tolist() == [[7, 8, 9], [3, 3, 5]] and left["attention_mask"].tolist()[1] == [0, 0, 1]


def test_rows_of_one_length_and_labels_of_classes_are_left_alone():
    rows = [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3, 4], "labels": 0}]
    assert padding(default_data_collator, 0)(rows).keys() == {"input_ids", "labels"}
    longer = padding(default_data_collator, 0)([rows[0], {"input_ids": [3, 4, 5], "labels": 0}])
    assert longer["labels"].tolist() == [1, 0] and longer["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_the_trainer_takes_rows_of_different_lengths(model, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = QZOTrainer(model, TrainingArguments(str(tmp_path / "out"), **OPTIONS), train_dataset=data)
    trainer.train()
    assert trainer.zeroth_order.steps == 2 and trainer.zeroth_order.skipped_steps == 0
    mine = QZOTrainer(model, TrainingArguments(str(tmp_path / "out"), **OPTIONS), default_data_collator)
    assert mine.data_collator is default_data_collator
