"""Zeroth-order fine-tuning of quantized language models (QZO, arXiv 2505.13430).

qzo.quantize(model)  # in place: low-bit codes, trainable scales
optimizer = qzo.QZO(qzo.scales(model))
loss = optimizer.step(lambda: model(**batch).loss)  # two forward passes, no backward
"""

from qzo.errors import QzoError
from qzo.linear import QuantLinear
from qzo.load import load
from qzo.loss import label_loss
from qzo.mezo import MeZO
from qzo.optim import QZO
from qzo.quantize import quantize
from qzo.scales import scales

__all__ = ["QZO", "MeZO", "QuantLinear", "QzoError", "label_loss", "load", "quantize", "scales"]
