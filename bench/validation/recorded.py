"""Records of measured cells as measurements: the same case simulated, and both reduced to the same figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.methods import QUANTIZABLE
from bench.cases.models import resolve
from bench.cases.quantizations import FOLLOW, FORMATS, named
from bench.cases.recipes.recipe import Recipe, parse
from bench.cases.recipes.table import BARE, RECIPES
from bench.records.record import Record
from bench.simulator.cuda.attention import attention_of
from qzo.errors import QzoError
from qzo.kernels import asked

# Figure -> phases of a record that it is the highest of; zeroth-order steps have no backward.
PHASES = {
    "forward": ("forward", "forward-plus", "forward-minus"),
    "backward": ("backward",),
    "step": ("step", "perturb", "update"),
}
SCALED = ("gptq",)  # formats whose group size is a choice of the case


def is_record(row: Mapping[str, Any]) -> bool:
    """Whether a line of a measurement file is one of our records (the others have `measured_mib`)."""
    return "schema_version" in row


def figures(record: Record) -> dict[str, int]:
    """Bytes by the names of `bench.validation.measurement.METRICS`, as far as the record knows them."""
    found = {name: nbytes for name, nbytes in record["peak"].items() if nbytes is not None}
    phases = {phase["name"]: phase["peak_allocated"] for phase in record["phases"]}
    for name, parts in PHASES.items():
        peaks = [phases[part] for part in parts if part in phases]
        if peaks:
            found[name] = max(peaks)
    return found


def simulated_case(record: Record) -> BenchCase:
    """The case that a measured record is compared with. Raises QzoError for a record that is no measurement."""
    if record["status"] != "ok" or record["world"] == "simulated":
        raise QzoError(
            f"a record that is {record['world']} and {record['status']} is no measurement; give one of a cell that "
            "was run and ended well"
        )
    case, quantization = record["case"], record["case"]["quantization"] or {}
    name = named(quantization) if case["method"] in QUANTIZABLE else None
    chosen = name is not None and FORMATS[name].any_group_size
    measured_on_gpu = record["world"] == "measured-cuda"
    stated = case.get("recipe")
    recipe = BARE.get(case["method"]) if "recipe" not in case else stated and parse(stated)
    asked = BenchCase(
        case["model"], case["method"], device="sim", batch_size=case["batch_size"], seq_len=case["seq_len"],
        gpu=gpus.find(case["gpu"]).name if measured_on_gpu else gpus.CPU,
        gradient_checkpointing=case["gradient_checkpointing"],
        group_size=quantization["group_size"] if chosen or quantization.get("format") in SCALED else None,
        quantization=name, recipe=recipe, still_offsets=quantization.get("offsets") != FOLLOW,
    )  # fmt: skip
    capability = gpus.get(asked.gpu).compute_capability if measured_on_gpu and asked.gpu else None
    if case["attention"] == attention_of(asked, resolve(asked.model), capability):
        return asked  # a kernel that nobody asked for may give way to another where it cannot run
    return replace(asked, attention=case["attention"])


def predict(record: Record, change: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> dict[str, int]:
    """The figures of the same case, simulated; `change` makes another recipe of its own, where it has one."""
    from bench.worlds.cell import run

    case = simulated_case(record)
    usual = case.recipe or RECIPES.get(case.method)
    changed = usual and change(usual)
    if usual is not None and changed is not None and changed != usual:
        asked_for = case.gradient_checkpointing and not usual.checkpointing
        case = replace(case, recipe=changed, gradient_checkpointing=changed.checkpointing or asked_for)
    with asked.by_triton(record["environment"].get("kernels") == "triton"):  # whatever is asked for here
        predicted = run(case)
    if predicted["status"] != "ok":
        raise QzoError(f"the simulation did not end: {predicted['message']}; give another record")
    return figures(predicted)
