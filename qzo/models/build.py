"""The model that a configuration describes, on meta: with the head it names, of a multimodal one the text part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.files.names import TEXT_PARTS
from qzo.models.causal import check_causal, check_decoder, check_whole
from qzo.quiet import quiet_libraries

CAUSAL = "AutoModelForCausalLM"
BUILDS = "mend config.json, or give a causal language model of a kind that transformers builds"
HEADS = {  # what the name of a class ends in -> who knows such classes
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}


def build(folder: Path, dtype: torch.dtype, part: bool) -> tuple[Any, bool]:
    """The model on meta, and whether it is the text part of a multimodal one, which is built where `part` allows it.

    Raises QzoError for a configuration that transformers does not build, and for a model with the head of a language
    model whose tokens see those after them.
    """
    try:
        with quiet_libraries():
            config = config_of(folder)
        text = config.get_text_config()
        for one in (config, text):
            if hasattr(one, "quantization_config"):
                del one.quantization_config
        with quiet_libraries(), torch.device("meta"):
            is_part, kind = part and text is not config, auto_class(config)
            is_causal = kind.__name__ == CAUSAL
            if is_causal:
                check_whole(folder, config)
            if is_part:
                model = _text_part(config, text, folder, dtype)
            else:
                if is_causal:
                    check_decoder(folder, config)
                model = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    except QzoError as error:
        raise QzoError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    except Exception as error:  # transformers raises many kinds; all of them mean that the folder cannot be used
        raise QzoError(f"{folder}: {one_line(error)}; {BUILDS}") from error
    if is_causal:  # a classifier may look both ways
        check_causal(folder, config, model)
    return model, is_part


def config_of(folder: Path) -> Any:
    """The model's config as transformers reads it, without what would have it fetch code, read other files, or change
    its own weights.

    `attn_implementation: owner/name` is code on the hub, `transformers_weights` another file of the folder; RWKV halves
    weights in place every `rescale_every` layers when it is first used, and those of a file written then once more.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0
    config._attn_implementation = None  # of all its parts, as the next
    config._experts_implementation = None
    return config


def auto_class(config: Any) -> Any:
    """Who builds and loads a model of this configuration: causal language models, unless it names another head."""
    import transformers

    name = str(next(iter(getattr(config, "architectures", None) or ()), ""))
    kind = next((kind for end, kind in HEADS.items() if name.endswith(end)), CAUSAL)
    return getattr(transformers, kind)


def _text_part(config: Any, text: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A causal model of the text configuration; where there is no such class the whole without its other parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text._name_or_path = str(folder)
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings  # the whole model asks its own configuration
    if type(text) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM.from_config(text, dtype=dtype, trust_remote_code=False)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        check_decoder(folder, config)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    base = getattr(model, model.base_model_prefix, model)
    for name, child in list(base.named_children()):
        if name not in (*TEXT_PARTS, "lm_head") and any(True for _ in child.parameters()):
            setattr(base, name, None)
    return model
