"""Every option of a recipe has what holds its bytes: a step of the Trainer, another test, or the source of the fact."""

from pathlib import Path

import pytest
import torch
from trainer_steps import OPTIONS, recipe_of
from transformers.training_args import OptimizerNames

from bench.cases.recipes import settings
from bench.cases.recipes.recipe import Recipe
from bench.methods.optimizers.made import optimizer_of
from qzo.errors import QzoError

TESTS = Path(__file__).parents[1]
HELD = {  # option, or field of Recipe -> the test, or the source of what a CPU does not have
    "attention": "worlds/test_sim_cpu.py::test_peaks_agree_with_checkpointing_with_eager_attention_on_long_sequences",
    "activation_offloading": "worlds/test_recipe_options.py::test_options_hold_on_a_cpu_what_is_predicted_for_it",
    "batch_size": "worlds/test_sim_cpu.py::test_predicted_and_measured_peaks_agree",
    "packing": "worlds/test_recipe_options.py::test_options_hold_on_a_cpu_what_is_predicted_for_it",
    "loop": "worlds/test_recipe_options.py::test_options_hold_on_a_cpu_what_is_predicted_for_it",
    "loss": "methods/test_recipe_options.py::test_a_loss_without_logits_has_the_gradients_of_the_whole_one",
    "loss_chunk": "worlds/test_recipe_options.py::test_options_hold_on_a_cpu_what_is_predicted_for_it",
    "peft_class": "methods/test_recipes_measured.py::test_any_peft_method_has_the_bytes_of_a_step_of_the_trainer",
    "use_liger_kernel": "methods/test_recipe_options.py::test_liger_layers_have_the_gradients_of_the_models_own",
    "liger_kernel_config": "methods/test_recipe_options.py::test_liger_layers_hold_less_and_what_is_switched_off_stays",
    "torch_compile": "worlds/test_recipe_options.py::test_a_compiled_step_is_a_range_whose_most_is_the_eager_one",
    "torch_empty_cache_steps": "methods/test_recipe_options.py::test_the_cache_is_emptied_before_the_backward_of_every",
    "versions": "validation/test_recipes.py::test_the_preparation_of_recent_versions_empties_the_cache_after_its_casts",
    "max_shard_size": "source: transformers/modeling_utils.py, caching_allocator_warmup (bench/validation/predict.py)",
    "optimizer_offload": "source: torchao/optim/cpu_offload.py (bench/methods/optimizers/host_states.py)",
    "name": "source: what tables call the recipe, of which no byte depends",
}
OPTIMIZERS = {  # optim -> the one whose code it runs, or the source of what a CPU does not have
    "adamw_torch_8bit": "source: torchao/optim/adam.py (bench/methods/optimizers/low_bit_states.py)",
    "adamw_torch_4bit": "source: torchao/optim/adam.py (bench/methods/optimizers/low_bit_states.py)",
    "adamw_8bit": "adamw_bnb_8bit",
    "ademamix": "lion_32bit",  # the branches of one function in fp32, and of one in 8 bits: bitsandbytes/backends/cpu
    "rmsprop_bnb": "lion_32bit",
    "rmsprop_bnb_32bit": "lion_32bit",
    "lion_8bit": "adamw_bnb_8bit",
    "rmsprop_bnb_8bit": "adamw_bnb_8bit",
    "adagrad": "rmsprop",  # torch's foreach optimizers of one state
}
PAGED = "source: bitsandbytes/functional.py, get_paged: managed memory (bench/methods/optimizers/made.py)"


def stated():
    """What the steps of the Trainer were run with, by the names that users know, and the fields of it."""
    names, fields = set(), set()
    for method, *texts in OPTIONS:
        recipe = recipe_of(method, *texts)
        names |= {text.partition("=")[0] for text in texts} | set(recipe.quantization or {})
        fields |= set(recipe.stated())
    return names, fields


def every_option():
    """All that `--set` takes, by the name that all versions have, and all fields of a recipe."""
    keys = {*settings.ARGUMENTS, *settings.QUANTIZATION, *settings.PREPARATION, *settings.FIELDS}
    return {settings.NEWER.get(key, key) for key in keys} | set(Recipe.__dataclass_fields__)


def test_every_option_has_a_step_of_the_trainer_another_test_or_a_source():
    names, fields = stated()
    without = every_option() - names - (fields - {"name"}) - set(HELD)
    assert not without, f"no step of the Trainer in OPTIONS, and no line in HELD: {sorted(without)}"
    assert set(HELD) <= every_option()


@pytest.mark.parametrize("option", HELD)
def test_what_holds_an_option_is_there(option):
    where = HELD[option]
    if where.startswith("source: "):
        module = where.partition("(")[2].rstrip(")")
        assert not module or (TESTS.parents[1] / module).is_file()
        return
    path, _, name = where.partition("::")
    assert f"def {name}" in (TESTS / path).read_text(encoding="utf-8")


def test_every_optimizer_of_the_trainer_that_is_made_has_one_too():
    run = {recipe_of(*option).arguments.get("optim") for option in OPTIONS}
    for name in sorted({item.value for item in OptimizerNames} - run):
        holder = PAGED if name.startswith("paged_") else OPTIMIZERS.get(name)
        if holder is None:
            with pytest.raises(QzoError, match=f"optim='{name}' cannot be simulated here"):
                optimizer_of(Recipe("any", {"optim": name}), torch.nn.Linear(2, 2, device="meta"))
        assert holder is None or holder.startswith("source: ") or holder in run
