"""Which layers bitsandbytes quantizes when transformers loads a model with it, and what the model is told of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qzo.errors import QzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Build = Callable[[Tensor, Any], nn.Module]


def quantize_layers(model: PreTrainedModel, build: Build) -> None:
    """Put `build(weight [N, K], bias)` in the place of each layer that transformers would quantize.

    Those are nn.Linear itself, no child of it, and GPT-2's Conv1D; not what is tied, the head, the last module, or what
    the architecture keeps in fp32 (replace_with_bnb_linear in transformers/integrations/bitsandbytes.py, with
    get_modules_to_not_convert in quantizers/base.py). Some architectures compute otherwise with a quantized layer, and
    ask their config for it.

    Raises QzoError where that is no layer at all.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    from bench.cases.pretrained import Conv1D, PreTrainedModel

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # type: ignore[arg-type]
    found = [
        (path, layer)
        for path, layer in model.named_modules()
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and should_convert_module(path, kept)
    ]
    if not found:
        linear = {type(module) for module in model.modules() if isinstance(module, nn.Linear)} - {nn.Linear}
        own = sorted(kind.__name__ for kind in linear)
        raise QzoError(
            f"transformers quantizes no layer of {type(model).__name__}: it takes nn.Linear itself, here are "
            f"{', '.join(own) or 'none'}; choose a method that trains 16-bit weights, such as lora"
        )
    for path, layer in found:
        weight: Any = layer.weight
        model.set_submodule(path, build(weight.data.t() if isinstance(layer, Conv1D) else weight.data, layer.bias))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
