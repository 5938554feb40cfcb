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

A reward needs no gradient, and no label: any function of what the model writes, called as TRL's GRPOTrainer does.

def brevity(completions, **columns):
    return [1.0 if text.strip().endswith(".") and len(text.split()) <= 12 else 0.0 for text in completions]

task = qzo.tasks.from_data("questions.jsonl", reward=qzo.tasks.Reward(brevity, max_new_tokens=24))
objective = qzo.tasks.objective(task, tokenizer)
rows = objective.rows(task.splits(seed=0)["train"])
optimizer = qzo.QZO([qzo.scale_group(model)], relative=True, eps=1e-2, lr=1e-4, clip_threshold=None,
                    estimator="population", normalize=True, directions=8)
for step in range(100):
    batch = objective.batch(random.sample(rows, 16), seed=step)  # the same random numbers at all scales of a step
    optimizer.step(lambda: objective.loss(model, batch))
"""

from qzo.tasks.catalog import Task, get, names
from qzo.tasks.encoding import Batch, Encoder
from qzo.tasks.evaluation import evaluate, label_prior
from qzo.tasks.example import Example
from qzo.tasks.objective import objective
from qzo.tasks.own.reward import Reward
from qzo.tasks.own.task import from_data
from qzo.tasks.scoring import loss
from qzo.tasks.summary import summary

__all__ = [
    "Batch",
    "Encoder",
    "Example",
    "Reward",
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
