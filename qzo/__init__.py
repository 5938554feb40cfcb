"""Zeroth-order fine-tuning of quantized language models (QZO, arXiv 2505.13430).

qzo.quantize(model)  # in place: low-bit codes, trainable scales
optimizer = qzo.QZO(qzo.scales(model))
loss = optimizer.step(lambda: model(**batch).loss)  # two forward passes, no backward
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qzo import tasks
    from qzo.checkpoints.save import save
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
    from qzo.optim.ranks import Ranks
    from qzo.quantizers.quantize import quantize
    from qzo.trainer.trainer import QZOTrainer
    from qzo.training.tuned.export import export
    from qzo.training.tuned.models import inspect, load, load_tokenizer

__all__ = [
    "QZO",
    "Journal",
    "MeZO",
    "Phases",
    "QZOTrainer",
    "QuantLinear",
    "QzoError",
    "Ranks",
    "adapters",
    "adapters_then_scales",
    "add_adapters",
    "adopt",
    "check_live",
    "export",
    "inspect",
    "keep_freed_memory",
    "label_loss",
    "load",
    "load_tokenizer",
    "quantize",
    "release",
    "replay",
    "save",
    "scales",
    "tasks",
    "trainable",
]

# Where each name is from, as above for type checkers: imported when it is first asked for, so that `import qzo` and
# `qzo --help` wait neither for PyTorch nor for transformers.
_PLACES = {
    "QZO": "qzo.optim.qzo",
    "Journal": "qzo.journal.journal",
    "MeZO": "qzo.optim.mezo",
    "Phases": "qzo.optim.phases",
    "QZOTrainer": "qzo.trainer.trainer",
    "QuantLinear": "qzo.formats.gptq.layer",
    "QzoError": "qzo.errors",
    "Ranks": "qzo.optim.ranks",
    "adapters": "qzo.live.adapters",
    "adapters_then_scales": "qzo.live.adapters",
    "add_adapters": "qzo.live.adapters",
    "adopt": "qzo.live.adopt",
    "check_live": "qzo.live.check",
    "export": "qzo.training.tuned.export",
    "inspect": "qzo.training.tuned.models",
    "keep_freed_memory": "qzo.kernels.heap",
    "label_loss": "qzo.models.loss",
    "load": "qzo.training.tuned.models",
    "load_tokenizer": "qzo.training.tuned.models",
    "quantize": "qzo.quantizers.quantize",
    "release": "qzo.live.adopt",
    "replay": "qzo.journal.replay",
    "save": "qzo.checkpoints.save",
    "scales": "qzo.live.scales",
    "trainable": "qzo.live.trainable",
}


def __getattr__(name: str) -> Any:
    """A public name when it is first asked for; afterwards the module has it."""
    if name == "tasks":
        return import_module("qzo.tasks")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, and not the parts that have been imported meanwhile."""
    return sorted({*__all__, "__version__", "__all__", "__doc__", "__name__", "__path__", "__file__"})
