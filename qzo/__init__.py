"""Zeroth-order fine-tuning of quantized language models (QZO, arXiv 2505.13430).

qzo.quantize(model)  # in place: low-bit codes, trainable scales
optimizer = qzo.QZO(qzo.scales(model))
loss = optimizer.step(lambda: model(**batch).loss)  # two forward passes, no backward
"""

from typing import TYPE_CHECKING, Any

from qzo import tasks
from qzo.checkpoints.load import load
from qzo.errors import QzoError
from qzo.formats.gptq.layer import QuantLinear
from qzo.journal.journal import Journal
from qzo.journal.replay import replay
from qzo.kernels.heap import keep_freed_memory
from qzo.live.adapters import adapters, adapters_then_scales, add_adapters
from qzo.live.adopt import adopt, release
from qzo.live.check import check_live
from qzo.live.scales import scales
from qzo.live.trainable import trainable
from qzo.models.loss import label_loss
from qzo.optim.mezo import MeZO
from qzo.optim.phases import Phases
from qzo.optim.qzo import QZO
from qzo.quantizers.quantize import quantize
from qzo.training.export import export

if TYPE_CHECKING:
    from qzo.training.trainer import QZOTrainer

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
        from qzo.training.trainer import QZOTrainer

        return QZOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
