"""Whether each token of a model sees those before it alone, as the loss of a language model supposes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qzo.errors import QzoError

BOTH_WAYS = {"xlnet": "a permutation language model", "cpmant": "its context is read in both directions"}
REMEDY = "give a decoder (Llama, GPT-2, OPT, ...)"


def check_causal(place: Path, config: Any, model: nn.Module) -> None:
    """Raise QzoError for a model whose tokens see what comes after them: its loss would be that of copying.

    transformers makes language models of encoders too: BERT, RoBERTa, ELECTRA and their kin are causal only with
    `is_decoder`, XLM only with `causal`, others unless they are told otherwise (`is_causal`,
    `use_bidirectional_attention`). Of these switches the modules of `model` are asked, which may be on meta: a
    configuration names some that its model never reads (GPT-NeoX, `is_decoder`).

    Args:
        place: what is read, for the error.
        config: of the model.
        model: made of it.
    """
    kind = _kind(config)
    why = BOTH_WAYS.get(kind) or _switched_off(config, model)
    if why is not None:
        raise QzoError(
            f'{place}: in this model of model_type "{kind}" tokens see those that come after them ({why}), so it is no '
            f"causal language model; {REMEDY}, or mend config.json if it was trained as one"
        )


def check_whole(place: Path, config: Any) -> None:
    """Raise QzoError for an encoder-decoder, whose decoder transformers would make a language model of.

    To be asked before a model is made, which changes this in its configuration.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise QzoError(
            f'{place}: model_type "{_kind(config)}" is an encoder with a decoder, and neither is a language model '
            f"without the other; {REMEDY}"
        )


def check_decoder(place: Path, config: Any) -> None:
    """Raise QzoError for a model of which transformers makes no causal language model: DistilBERT, CLIP, ViT."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in AutoModelForCausalLM._model_mapping:
        return
    if type(config) in AutoModelForImageTextToText._model_mapping:
        raise QzoError(
            f'{place}: model_type "{_kind(config)}" is a multimodal model, of which transformers makes no causal '
            "language model; give its text model alone, or a quantized one, whose text part is read"
        )
    raise QzoError(
        f'{place}: model_type "{_kind(config)}" has no causal language model in transformers, only an encoder or a '
        f"model of something else; {REMEDY}"
    )


def _kind(config: Any) -> str:
    return str(getattr(config, "model_type", type(config).__name__))


def _switched_off(config: Any, model: nn.Module) -> str | None:
    """The switch by which a model looks ahead; None where there is none."""
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return "is_causal is false"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):  # "vision": among the parts of an image
        return f"use_bidirectional_attention is {text.use_bidirectional_attention}"
    find: Callable[[], Any] | None = getattr(model, "get_decoder", None)
    inner = find() if find is not None and text is not config else model  # not the towers of a multimodal model
    for module in (model if inner is None else inner).modules():
        own = vars(module)
        name = "causal" if "causal" in own else "is_decoder"  # XLM has both, and reads the first
        if own.get(name) is False:
            return f"{name} is false"
    return None
