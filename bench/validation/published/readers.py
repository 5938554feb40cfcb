"""The reader of each source. A row says who ran the step by the repository that it is from, or by `framework`.

What cannot be said is an error that tells what: the row counts as not predicted, and is never predicted as something
else.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.validation.published import fms, litgpt, peft_comparison, qwen, zeroth_order
from bench.validation.published.row import Published, Row
from qzo.errors import QzoError

READERS: dict[str | None, Callable[[Row], Published]] = {
    "huggingface/peft": peft_comparison.read,
    "foundation-model-stack/fms-acceleration": fms.read,
    "litgpt": litgpt.read,
    "QwenLM/Qwen": qwen.read_qwen,
    "modelscope/ms-swift": qwen.read_swift,
    "princeton-nlp/MeZO": zeroth_order.read,
}
ZEROTH_ORDER = ("princeton-nlp/MeZO", "liangyuwang/zo2")  # sources whose rows are no recipes, but for Adam's
# What a source's rows do not state of the step that was measured, or of how; the others' pages, code and data state all
# of it. Of rows that come without a repository a fork's code is known and nothing of the card's other programs.
UNSTATED: dict[str | None, str] = {
    "QwenLM/Qwen": "what its memory was measured by",
    "modelscope/ms-swift": "the lengths of its rows, of which mean and deviation are told",
    "princeton-nlp/MeZO": "how long its prompts are, and bytes other than by a bar's whole GiB",
    "torchtune": "which version ran, and whether memory is reserved or active in most rows",
    None: "what else used the card",
}
ROUNDING_BYTES: dict[str | None, int] = {"princeton-nlp/MeZO": 1 << 29}  # bars of whole GiB


def unstated(row: Row) -> str | None:
    """What of its recipe a row of others does not state; None where it states the whole."""
    if not is_published(row):
        return None
    return UNSTATED.get(row.get("framework") or (row.get("source") or {}).get("repo"))


def rounding_bytes(row: Row) -> int | None:
    """How far a source's number may be from what was measured by its rounding alone; None where that is nothing."""
    return ROUNDING_BYTES.get((row.get("source") or {}).get("repo"))


def is_published(row: Row) -> bool:
    """Whether a row comes with what the archive of the T4 does not have."""
    return "source" in row or "framework" in row


def read(row: Row) -> Published:
    """What a row states. Raises QzoError for what cannot be said."""
    if row.get("compile"):
        raise QzoError("the step was compiled: what lives in it is the compiler's choice, a range and no number")
    repository = (row.get("source") or {}).get("repo")
    reader = READERS.get(row.get("framework") or repository)
    if reader is None:
        raise QzoError(f"how {row.get('framework') or repository or 'it'} runs a step is not known here")
    return reader(row)


def predictor_of(row: Row) -> Callable[[Row], dict[str, int]] | None:
    """The function that predicts a row which no recipe says, a zeroth-order step; None for the others."""
    own = row.get("method", "").startswith("mezo") or (row.get("source") or {}).get("repo") in ZEROTH_ORDER
    return zeroth_order.predictor(row) if own else None
