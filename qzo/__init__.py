"""Zeroth-order fine-tuning of quantized language models (QZO, arXiv 2505.13430).

qzo.quantize(model)  # in place: low-bit codes, trainable scales
optimizer = qzo.QZO(qzo.scales(model))
loss = optimizer.step(lambda: model(**batch).loss)  # two forward passes, no backward
"""

from qzo import tasks
from qzo.adapters import adapters, add_adapters
from qzo.errors import QzoError
from qzo.journal import Journal
from qzo.linear import QuantLinear
from qzo.load import load
from qzo.loss import label_loss
from qzo.mezo import MeZO
from qzo.optim import QZO
from qzo.quantize import quantize
from qzo.replay import replay
from qzo.scales import scales
from qzo.schedule import Phases, adapters_then_scales
from qzo.trainable import trainable

__all__ = [
    "QZO",
    "Journal",
    "MeZO",
    "Phases",
    "QuantLinear",
    "QzoError",
    "adapters",
    "adapters_then_scales",
    "add_adapters",
    "label_loss",
    "load",
    "quantize",
    "replay",
    "scales",
    "tasks",
    "trainable",
]
