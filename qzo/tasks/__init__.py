"""Labelled tasks: their texts, prompts, splits, loss and scores.

task = qzo.tasks.get("rotten-tomatoes")
splits = task.splits(seed=0)  # "train", "validation", "test": lists of Example
encoder = qzo.tasks.Encoder(task, tokenizer)
loss = qzo.tasks.loss(model, encoder.batch(splits["train"][:16]))
result = qzo.tasks.evaluate(model, encoder, splits["test"])
"""

from qzo.tasks.catalog import Task, get, names
from qzo.tasks.encoding import Batch, Encoder
from qzo.tasks.evaluation import evaluate, label_prior
from qzo.tasks.example import Example
from qzo.tasks.scoring import loss

__all__ = ["Batch", "Encoder", "Example", "Task", "evaluate", "get", "label_prior", "loss", "names"]
