"""Options of a recipe in the worlds: the simulated CPU against the measured one, and what the simulated GPU tells."""

import contextlib

import pytest

from bench.cases.case import BenchCase
from bench.cases.recipes.recipe import Recipe
from bench.worlds import cpu, sim, sim_cpu

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
LIGER = {"bf16": True, "use_liger_kernel": True}


def cell(folder, device="sim", arguments=None, **changes):
    recipe = Recipe("any", arguments or {"bf16": True}, peft=LORA, lengths=(64,), **changes)
    gpu = "h100-80gb" if device == "sim" else None
    return BenchCase(str(folder), "lora", device, gpu, 2, 64, recipe=recipe, steps=3)


@pytest.mark.parametrize(
    "options",
    [
        {"arguments": LIGER, "packing": True, "activation_offloading": True, "trained_dtype": "bfloat16"},
        {"loop": "plain", "loss": "chunked", "loss_chunk": 16},
    ],
)
def test_options_hold_on_a_cpu_what_is_predicted_for_it(llama_folder, options):
    case = cell(llama_folder, "cpu", **options)
    assert sim_cpu.run(case)["peak"]["allocated"] == pytest.approx(cpu.run(case)["peak"]["allocated"], rel=0.001)


@pytest.mark.parametrize("options", [{"arguments": LIGER}, {"activation_offloading": True}])
def test_layers_that_are_traced_once_have_the_bytes_of_all(llama_folder, options):
    case = cell(llama_folder, **options)
    whole = sim._run(case, lambda ledger, model: contextlib.nullcontext())
    assert sim.run(case)["peak"] == whole["peak"]


def test_a_compiled_step_is_a_range_whose_most_is_the_eager_one(llama_folder):
    record = sim.run(cell(llama_folder, arguments={"bf16": True, "torch_compile": True}))
    assert record["peak"] == sim.run(cell(llama_folder))["peak"]
    most, least = record["notes"][-2:]
    assert "the eager step, the most" in most
    assert 0 <= float(least.split("least ")[1].split(" GiB")[0]) * 2**30 <= record["peak"]["allocated"]
