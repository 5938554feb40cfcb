"""Labelled tasks and a user's own data: texts, prompts, splits, loss and scores.

task = qzo.tasks.get("rotten-tomatoes")
splits = task.splits(seed=0)  # "train", "validation", "test": lists of Example
encoder = qzo.tasks.Encoder(task, tokenizer)
loss = qzo.tasks.loss(model, encoder.batch(splits["train"][:16]))
result = qzo.tasks.evaluate(model, encoder, splits["test"])

task = qzo.tasks.from_data("tickets.csv", columns={"text": "body", "label": "queue"})
objective = qzo.tasks.objective(task, tokenizer, max_length=512)  # of a task from `get` too
rows = objective.rows(task.splits(seed=0)["train"])
loss = objective.loss(model, objective.batch(rows[:16]))
"""

from qzo.tasks.catalog import Task, get, names
from qzo.tasks.encoding import Batch, Encoder
from qzo.tasks.evaluation import evaluate, label_prior
from qzo.tasks.example import Example
from qzo.tasks.objective import objective
from qzo.tasks.own.task import from_data
from qzo.tasks.scoring import loss
from qzo.tasks.summary import summary

__all__ = [
    "Batch",
    "Encoder",
    "Example",
    "Task",
    "evaluate",
    "from_data",
    "get",
    "label_prior",
    "loss",
    "names",
    "objective",
    "summary",
]
