"""Zeroth-order fine-tuning of quantized language models (QZO, arXiv 2505.13430).

qzo.quantize(model)  # in place: low-bit codes, trainable scales
optimizer = qzo.QZO(qzo.scales(model))
loss = optimizer.step(lambda: model(**batch).loss)  # two forward passes, no backward
"""

from typing import TYPE_CHECKING, Any

from qzo import tasks
from qzo.adapters import adapters, add_adapters
from qzo.adopt import adopt, release
from qzo.errors import QzoError
from qzo.export import export
from qzo.heap import keep_freed_memory
from qzo.journal import Journal
from qzo.linear import QuantLinear
from qzo.live import check_live
from qzo.load import load
from qzo.loss import label_loss
from qzo.mezo import MeZO
from qzo.optim import QZO
from qzo.quantize import quantize
from qzo.replay import replay
from qzo.scales import scales
from qzo.schedule import Phases, adapters_then_scales
from qzo.trainable import trainable

if TYPE_CHECKING:
    from qzo.trainer import QZOTrainer

__all__ = [
    "QZO",
    "Journal",
    "MeZO",
    "Phases",
    "QZOTrainer",
    "QuantLinear",
    "QzoError",
    "adapters",
    "adapters_then_scales",
    "add_adapters",
    "adopt",
    "check_live",
    "export",
    "keep_freed_memory",
    "label_loss",
    "load",
    "quantize",
    "release",
    "replay",
    "scales",
    "tasks",
    "trainable",
]


def __getattr__(name: str) -> Any:
    """QZOTrainer is imported when asked for: it needs transformers, which takes seconds."""
    if name == "QZOTrainer":
        from qzo.trainer import QZOTrainer

        return QZOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
