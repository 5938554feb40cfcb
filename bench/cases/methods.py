"""The methods of the bench as a table: one row a method, in the order in which they are run and shown.

What a method's step is stands in `bench.methods`, one function under the same name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What the rest of the bench has to know about a method.

    Attributes:
        name: as `--methods` and records spell it.
        first_order: a step runs a backward pass.
        trains: "weights", "adapters" or "scales".
        quantizable: the format of its quantized layers is a choice (`--quantization`).
        by_default: part of a run that names no methods.
        baseline: full fine-tuning with AdamW, which the other methods are compared with.
        checkpointed: its layers are recomputed in backward whatever the case says.
        streamable: its layers can come and go, for it keeps no gradient or moment of a whole layer.
        smaller: the method of the same kind that holds less, the nearest; None where there is none.
        change: how a switch to it is told to someone short of memory; None tells its name.
    """

    name: str
    first_order: bool
    trains: str
    quantizable: bool = False
    by_default: bool = True
    baseline: bool = False
    checkpointed: bool = False
    streamable: bool = False
    smaller: str | None = None
    change: str | None = None


TABLE = (
    # AdamW in 8, 12 and 16 bytes a parameter
    Method("ft-bf16", first_order=True, trains="weights", baseline=True, smaller="ft-sgd"),
    Method("ft-mixed", first_order=True, trains="weights", baseline=True, smaller="ft-bf16"),
    Method("ft-amp", first_order=True, trains="weights", baseline=True, smaller="ft-mixed"),
    Method("ft-sgd", first_order=True, trains="weights", smaller="lora"),
    Method("lora", first_order=True, trains="adapters", streamable=True, smaller="qlora"),
    Method("lora-fa", first_order=True, trains="adapters", by_default=False, smaller="qlora"),
    Method("dora", first_order=True, trains="adapters", by_default=False, smaller="lora"),
    Method("prefix", first_order=True, trains="adapters", by_default=False),
    Method("qlora", first_order=True, trains="adapters", streamable=True, smaller="qlora-lean"),
    Method("qlora-lean", first_order=True, trains="adapters", checkpointed=True, streamable=True),
    Method("peqa", first_order=True, trains="scales", by_default=False, smaller="peqa-lean"),
    Method("peqa-lean", first_order=True, trains="scales", checkpointed=True),
    Method("mezo", first_order=False, trains="weights", streamable=True, smaller="qzo"),
    Method("qzo", first_order=False, trains="scales", quantizable=True, streamable=True, smaller="qzo-full"),
    Method("qzo-full", first_order=False, trains="scales", quantizable=True, streamable=True, smaller="qzo-2bit",
           change="qzo-full: embeddings and head in 8 bits"),
    Method("qzo-2bit", first_order=False, trains="scales", streamable=True),
    # as their authors released them
    Method("mezo-reference", first_order=False, trains="weights", by_default=False),
    Method("qzo-reference", first_order=False, trains="scales", by_default=False),
    Method("qzo-2bit-reference", first_order=False, trains="scales", by_default=False),  # and what is not quantized
)  # fmt: skip

BY_NAME = {method.name: method for method in TABLE}
METHODS = tuple(method.name for method in TABLE if method.by_default)
EXTRA_METHODS = tuple(method.name for method in TABLE if not method.by_default)  # run only where they are asked for
ZEROTH_ORDER = tuple(method.name for method in TABLE if not method.first_order)
BASELINES = tuple(method.name for method in TABLE if method.baseline)
QUANTIZABLE = tuple(method.name for method in TABLE if method.quantizable)


def smaller_methods(name: str) -> tuple[str, ...]:
    """The methods of the same kind that hold less than the one of that name, the nearest first."""
    nearest = BY_NAME[name].smaller
    return () if nearest is None else (nearest, *smaller_methods(nearest))
