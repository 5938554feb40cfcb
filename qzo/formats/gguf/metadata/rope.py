"""Rotary positions of a GGUF file, in the words of transformers, so that a config.json carries them on.

llama.cpp turns pair i of a head at position p by p base^(-2i/D) / f_i, and multiplies cosine and sine by a. With s the
factor of the file, r_i its divisor of pair i in `rope_freqs.weight` (1 without one) and m_i the share of pair i that
YaRN leaves as it was,

    linear    f_i = r_i s                             a = attn_factor
    yarn      f_i = r_i / (m_i + (1 - m_i) / s)       a = attn_factor (1 + 0.1 ln s)
    longrope  f_i of `rope_factors_short.weight`, and of `rope_factors_long.weight` for texts beyond the original length

What has a name in transformers gets it; what has none is a longrope whose short and long factors are the same.
Source: `rope_yarn` and `llama_context` of llama.cpp, `ROPE_INIT_FUNCTIONS` of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qzo.errors import QzoError
from qzo.formats.gguf.metadata.keys import Metadata

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (FREQS, LONG, SHORT)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of every Llama 3.1, 3.2 and 3.3
KINDS = ("none", "linear", "yarn", "longrope")
Rope = dict[str, Any]


@dataclass(frozen=True)
class Turning:
    """What the rotary positions of a model are made from.

    Args:
        base: of the wavelengths.
        dims: of a head that are turned, D.
        context: the longest text.
        factors: of the file's own tensors, by name.
        names_all: whether the model knows every kind of transformers; else only "default" and "longrope".
    """

    base: float
    dims: int
    context: int
    factors: dict[str, list[float]]
    names_all: bool = True


def rope_parameters(meta: Metadata, turning: Turning) -> Rope:
    """The `rope_parameters` of a config, without partial_rotary_factor. Raises QzoError for what has no meaning."""
    kind = meta.get("rope.scaling.type", "linear")
    if kind not in KINDS:
        raise meta.refused("rope.scaling.type", "is not known here")
    factor = meta.number("rope.scaling.factor", 0.0) or meta.number("rope.scale_linear", 0.0) or 1.0
    meta.number("rope.scale_linear", 0.0)
    original = meta.whole("rope.scaling.original_context_length", turning.context)
    if turning.base <= 1 or original < 2:
        what = f"rope.freq_base = {turning.base:g} and {original} positions"
        raise QzoError(f"{meta.path}: its config says {what}; need more than 1 of each")
    if kind == "longrope" or LONG in turning.factors or SHORT in turning.factors:
        return _longrope(meta, turning, kind, factor, original)
    extension = meta.number("rope.scaling.yarn_ext_factor", None)
    yarn = {
        name: meta.number(f"rope.scaling.yarn_{name}", default) or default
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    attention = meta.number("rope.scaling.attn_factor", 1.0) or 1.0
    stretch = extension if extension is not None else float(kind == "yarn")
    factor = 1.0 if kind == "none" else factor
    if stretch and factor < 1:
        raise meta.refused("rope.scaling.factor", "and YaRN needs one that is not below 1")
    plain = turning.factors.get(FREQS, [1.0] * (turning.dims // 2))
    if stretch and factor > 1:
        scale = 1 + 0.1 * math.log(factor)
        meta.must_be("rope.scaling.yarn_attn_factor", scale, "that of YaRN")
        if stretch == 1 and turning.names_all and set(plain) == {1.0}:
            named = {"attention_factor": attention * scale} if attention != 1 else {}
            return _named("yarn", turning, factor=factor, original_max_position_embeddings=original, **yarn, **named)
        kept = _kept(turning, original, **yarn)
        stretched = [1 / (m * stretch + (1 - m * stretch) / factor) for m in kept]
        return _expressed(turning, [r * f for r, f in zip(plain, stretched, strict=True)], attention * scale)
    meta.must_be("rope.scaling.yarn_attn_factor", 1.0, "no factor at all")
    return _expressed(turning, [r * factor for r in plain], attention)


def _longrope(meta: Metadata, turning: Turning, kind: str, factor: float, original: int) -> Rope:
    absent = [name for name in (LONG, SHORT) if name not in turning.factors]
    if absent or FREQS in turning.factors or kind == "yarn":
        what = f"no {absent[0]}" if absent else f"{LONG} beside other factors"
        raise QzoError(f"{meta.path} has {what}, so that its rotary positions are not known; convert it again")
    if factor != 1:
        raise meta.refused("rope.scaling.factor", f"beside {LONG}, whose factors are the whole of it")
    ratio = turning.context / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0  # what converters write
    return _named(
        "longrope",
        turning,
        short_factor=turning.factors[SHORT],
        long_factor=turning.factors[LONG],
        attention_factor=meta.number("rope.scaling.attn_factor", usual) or 1.0,
        original_max_position_embeddings=original,
    )


def _expressed(turning: Turning, divisors: list[float], attention: float) -> Rope:
    """Divisors f_i in the kind of transformers that means them."""
    if attention == 1 and set(divisors) == {1.0}:
        return _named("default", turning)
    if attention == 1 and turning.names_all:
        if len(set(divisors)) == 1:
            return _named("linear", turning, factor=divisors[0])
        found = _llama3(turning, divisors)
        if found is not None:
            return found
    options = {"short_factor": divisors, "long_factor": divisors, "attention_factor": float(attention)}
    return _named("longrope", turning, **options, original_max_position_embeddings=turning.context)


def _named(kind: str, turning: Turning, **options: Any) -> Rope:
    return {"rope_type": kind, "rope_theta": turning.base, **options}


def _llama3(turning: Turning, divisors: list[float]) -> Rope | None:
    """The parameters of Llama 3.1 of which the divisors follow; None where they do not."""
    factor = max(divisors)
    for original in (8192, turning.context, *(2**n for n in range(4, 22))):
        expected = [_llama3_divisor(turning, i, factor, original) for i in range(len(divisors))]
        if all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, divisors, strict=True)):
            return _named("llama3", turning, factor=factor, original_max_position_embeddings=original, **LLAMA3)
    return None


def _llama3_divisor(turning: Turning, pair: int, factor: float, original: int) -> float:
    turns = original * turning.base ** (-2 * pair / turning.dims) / (2 * math.pi)  # within the original length
    low, high = LLAMA3.values()
    share = min(1.0, max(0.0, (turns - low) / (high - low)))
    return 1 / ((1 - share) / factor + share)


def _kept(turning: Turning, original: int, beta_fast: float, beta_slow: float) -> list[float]:
    """m_i: 1 for pairs that turn more than beta_fast times within the original length, 0 below beta_slow times."""

    def pair_of(turns: float) -> float:
        return turning.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(turning.base))

    low = max(0, math.floor(pair_of(beta_fast)))
    high = min(turning.dims - 1, math.ceil(pair_of(beta_slow)))
    ramp = [(i - low) / max(0.001, high - low) for i in range(turning.dims // 2)]
    return [1 - min(1.0, max(0.0, share)) for share in ramp]
