"""Options of a recipe: the bytes of the simulated CPU are those of the Trainer of transformers, measured on this CPU.

What holds each option, these steps or another test, and the source of what only CUDA has: test_options_held.py.
"""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from trainer_steps import BATCH, OPTIONS, TOKENS, measured, recipe_of
from transformers import trainer_optimizer

from bench.cases.case import BenchCase
from bench.cases.recipes.table import RECIPES
from bench.methods.optimizers.galore import GaLore
from bench.worlds import sim_cpu

TOLERANCE = 0.003  # the bench holds the batches of both steps, the Trainer those of one and the next: 6 of 4,000 KiB
GALORE_CLASSES = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")


@pytest.fixture
def galore(monkeypatch):
    """The Trainer's own groups and hooks, whose class is ours where the library is not there: same bytes as its."""
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace(**dict.fromkeys(GALORE_CLASSES, GaLoreAdamW)))
    monkeypatch.setattr(trainer_optimizer, "is_galore_torch_available", lambda: True)


class GaLoreAdamW(GaLore):
    """With the options that the library's class takes besides."""

    def __init__(self, params, weight_decay=0.0, **options):
        super().__init__(params, **options)


@pytest.mark.parametrize("option", OPTIONS, ids=", ".join)
@pytest.mark.usefixtures("galore")
def test_the_simulated_step_has_the_bytes_of_a_step_of_the_trainer(option, llama_folder, tmp_path):
    method, recipe = option[0], recipe_of(*option)
    case = BenchCase(
        str(llama_folder), method, gpu="cpu", batch_size=BATCH, seq_len=TOKENS, recipe=recipe,
        gradient_checkpointing=recipe.checkpointing,
    )  # fmt: skip
    simulated = sim_cpu.run(case)["peak"]["allocated"]
    assert simulated == pytest.approx(measured(recipe, llama_folder, tmp_path), rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["IA3Config", "PromptTuningConfig", "VeraConfig", "OFTConfig"])
def test_any_peft_method_has_the_bytes_of_a_step_of_the_trainer(kind, llama_folder, tmp_path):
    own = {"PromptTuningConfig": {"num_virtual_tokens": 6}, "OFTConfig": {"oft_block_size": 32}}.get(kind, {})
    targets = {} if kind == "PromptTuningConfig" else {"target_modules": ["q_proj", "v_proj"]}
    targets |= {"feedforward_modules": []} if kind == "IA3Config" else {}
    options = own | targets | {"task_type": "CAUSAL_LM"}
    recipe = replace(RECIPES["lora"], peft=options, peft_class=kind)
    case = BenchCase(str(llama_folder), "lora", gpu="cpu", batch_size=BATCH, seq_len=TOKENS, recipe=recipe)
    simulated = sim_cpu.run(case)["peak"]["allocated"]
    assert simulated == pytest.approx(measured(recipe, llama_folder, tmp_path), rel=TOLERANCE)
