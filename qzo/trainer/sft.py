"""Arguments of TRL's SFTTrainer, for raw rows that QZOTrainer encodes itself: which hold, and which cannot."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError

ENCODED = "rows are encoded by QZOTrainer"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # name -> values that ask for nothing; why, and what to do
    "model_init_kwargs": ((None, {}), "the model is there already; give them to qzo.load"),
    "chat_template_path": ((None,), "set the chat_template of the tokenizer that is given as processing_class"),
    "eos_token": ((None,), "set it on the tokenizer that is given as processing_class"),
    "pad_token": ((None,), "set it on the tokenizer that is given as processing_class"),
    "router_aux_loss_coef": ((None, 0.0), "the loss has no part for the balance of experts; leave it out"),
    "truncation_mode": (("keep_start",), "a prompt of text is cut at its beginning, all else at its end; leave it out"),
    "loss_type": (("nll", "chunked_nll"), 'it is "nll"; mix in TRL\'s trainer for another'),
    "dataset_kwargs": ((None, {}), f"{ENCODED}; give tokenised rows instead, or a data_collator"),
}
WARNED: dict[str, tuple[tuple[Any, ...], str]] = {
    "padding_free": ((False,), "rows are padded, the loss is the same"),
    "activation_offloading": ((False,), "it changes nothing: no activations are kept for a backward pass"),
}
PLAIN = {  # arguments of Trainer that act on what a model returns; values that ask for nothing
    "label_smoothing_factor": (0.0,),
    "compute_loss_func": (None,),
    "compute_metrics": (None,),
    "preprocess_logits_for_metrics": (None,),
}


@dataclass(frozen=True)
class DataOptions:
    """How raw rows are read and encoded.

    Attributes:
        columns: field -> name of the column that holds it.
        label_words: file with what the model is to say for each label, see `qzo.tasks.from_data`.
        max_length: tokens a row may have; None, as many as the model has positions.
        packing: whether texts stand one behind the other in rows of one length; None, texts alone.
        centering: share of the label words' mean that the loss leaves out, see `qzo.tasks.loss`.
        whole_completions: whether prompts are learnt too.
        whole_messages: whether the turns of users are learnt too.
        shuffle: whether rows are shuffled once, by the seed.
        of_config: whether an SFTConfig says so, whose defaults may not fit model or rows.
    """

    columns: Mapping[str, str]
    label_words: str | None = None
    max_length: int | None = None
    packing: bool | None = None
    centering: float = 0.0
    whole_completions: bool = False
    whole_messages: bool = False
    shuffle: bool = False
    of_config: bool = False


ASKED = ("columns", "label_words", "max_length", "packing", "centering")


def data_options(arguments: Any, asked: Mapping[str, Any], given: Mapping[str, Any]) -> DataOptions:
    """What the arguments of a trainer, an SFTConfig among them, say of raw rows; `asked` goes before them.

    Raises QzoError for what cannot be honoured, and warns once of what makes no difference.
    """
    unknown = next((name for name in asked if name not in ASKED), None)
    if unknown is not None:
        raise QzoError(f'data_options has no "{unknown}"; it takes {", ".join(ASKED)}')
    for name, nothing in PLAIN.items():
        value = given.get(name, getattr(arguments, name, nothing[0]))
        if value not in nothing:
            raise QzoError(
                f"{name} is for tokenised rows, and raw ones have the loss and the metrics of their kind; leave it out"
            )
    return DataOptions(**{**{"columns": {}}, **_of_config(arguments), **asked})


def _of_config(arguments: Any) -> dict[str, Any]:
    """Options that an SFTConfig holds; none of other arguments. Raises QzoError."""
    if not hasattr(arguments, "dataset_text_field"):
        if type(arguments).__module__.partition(".")[0] == "trl":
            raise QzoError(
                f"a {type(arguments).__name__} is for TRL's own trainer: mix that in, class Mixed(qzo.QZOTrainer, "
                "trl.DPOTrainer), or give TrainingArguments"
            )
        return {}
    for name, (nothing, reason) in REFUSED.items():
        value = getattr(arguments, name, nothing[0])
        if value not in nothing:
            raise QzoError(f"{name}={value!r} cannot be honoured for raw rows: {reason}")
    for name, (nothing, reason) in WARNED.items():
        value = getattr(arguments, name, nothing[0])
        if value not in nothing:
            warnings.warn(f"{name}={value!r}: {reason}", stacklevel=2)
    if getattr(arguments, "eval_packing", None) not in (None, arguments.packing):
        raise QzoError(
            f"eval_packing={arguments.eval_packing} beside packing={arguments.packing}: both are alike; leave it out"
        )
    if arguments.packing and getattr(arguments, "packing_strategy", "wrapped") != "wrapped":
        warnings.warn('texts are packed as packing_strategy="wrapped" says, into rows of one length', stacklevel=2)
    text = arguments.dataset_text_field
    return {
        "columns": {} if text == "text" else {"text": text},
        "max_length": arguments.max_length,
        "packing": arguments.packing,
        "whole_completions": arguments.completion_only_loss is False,
        "whole_messages": not arguments.assistant_only_loss,
        "shuffle": arguments.shuffle_dataset,
        "of_config": True,
    }
