"""A stand-in for `qzo.tasks`: sentences of random words, one of which tells the label; and a model folder to train."""

from __future__ import annotations

import json
import random
import types
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import qzo
from qzo import label_loss, quantize
from qzo.checkpoints.save import save

PAPER = ["--preset", "paper", "--task", "words"]  # of `qzo train` with this module in the place of `qzo.tasks`
SMALL = [*PAPER, "--steps", "6", "--eval-every", "3", "--batch-size", "4"]
WORDS = 96  # vocabulary; words 0 and 1 are the labels, 2 and 3 tell them
LENGTH = 8


class Example(list):
    """Numbers of words, the last of which is the label."""

    text, ask, answers = "words", "", ("w0", "w1")

    @property
    def label(self):
        return self[-1]


class Batch(dict):
    """Tensors by name."""

    def to(self, device):
        return Batch({name: tensor.to(device) for name, tensor in self.items()})


class Task:
    name, metric, words = "words", "accuracy", ("w0", "w1")

    def splits(self, seed=0, train=64, validation=16, test=16):
        dice = random.Random(seed)
        sizes = {"train": train, "validation": validation, "test": test}
        return {name: [example(dice) for _ in range(size)] for name, size in sizes.items()}


def example(dice):
    label = dice.randrange(2)
    words = [dice.randrange(5, WORDS) for _ in range(LENGTH - 2)]
    return Example([*words, 2 + label, label])


class Objective:
    """What `qzo.tasks.objective` returns, in the module's own loss and evaluation, which tests exchange."""

    def __init__(self, module, task):
        self.module, self.task = module, task

    def fitted(self, max_length):
        return self

    def rows(self, examples):
        return examples

    def notices(self, splits):
        return []

    def length(self, example):
        return len(example)

    def loss(self, model, batch, centering=0.0):
        return self.module.loss(model, batch, centering)

    def evaluate(self, model, examples, batch_size, watch=None, last=False):
        return self.module.evaluate(model, self, examples, batch_size, watch=watch)

    def batch(self, examples):
        input_ids = torch.tensor(examples)
        labels = torch.full_like(input_ids, -100)
        labels[:, -1] = input_ids[:, -1]
        return Batch(input_ids=input_ids, labels=labels)


def evaluate(model, encoder, examples, batch_size=16, watch=None):
    batch = encoder.batch(examples)
    with torch.no_grad():
        logits = model(batch["input_ids"], logits_to_keep=2).logits[:, 0, :2]
        right = (logits.argmax(-1) == batch["input_ids"][:, -1]).float().mean()
        loss, predicted = float(label_loss(model, **batch)), {"0": 1, "1": len(examples) - 1}
        return {"accuracy": float(right), "loss": loss, "count": len(examples), "predicted": predicted}


def module():
    """What `qzo.tasks` offers, as a module, below which the real one's own modules are found."""
    made = types.ModuleType("qzo.tasks")
    made.__path__ = [str(Path(qzo.__file__).parent / "tasks")]
    made.get = lambda name, data_dir=None: Task()
    made.objective = lambda task, tokenizer, max_length=None: Objective(made, task)
    made.evaluate = evaluate
    made.loss = lambda model, batch, centering=0.0: (1 - centering) * label_loss(model, **batch)
    return made


def write_model(model, folder: Path, quantized: bool, checkpoint_format: str = "gptq") -> Path:
    """A model folder with a tokenizer; GPTQ of group size 32 where `quantized`."""
    if quantized:
        save(quantize(model, 4, 32, symmetric=False), folder, checkpoint_format=checkpoint_format)
    else:
        model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the words."""
    tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics, without times, memory and the seals, which cover them."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = ("seconds", "memory", "crc")
    return [{name: value for name, value in entry.items() if name not in told} for entry in entries]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same tensors, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
