"""Options of a recipe: the bytes of the simulated CPU are those of the Trainer of transformers, measured on this CPU.

Nothing of ours takes part in the measured step but PyTorch's allocation events: PEFT adapts the model, Trainer.train
runs two steps.

What bitsandbytes does on a CPU is not what it does on a GPU, whose facts are taken from its source: int8 layers
(bench/methods/quantized/int8.py), 8-bit and paged states (bench/methods/optimizers/made.py; their bytes in
tests/bench/validation/test_recipes.py). Losses, Liger's kernels, packing, offloading and emptied caches are in
test_recipe_options.py here and in tests/bench/worlds, low-rank and offloaded states in optimizers/test_made.py.
"""

import gc
from dataclasses import replace

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench.cases.case import BenchCase
from bench.cases.recipes.settings import apply, parse_settings
from bench.cases.recipes.table import RECIPES
from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger
from bench.methods.quantized.nf4 import nf4_tensors, to_nf4
from bench.simulator.cpu.gemm import fast_bf16
from bench.worlds import sim_cpu

BATCH, TOKENS, STEPS = 2, 64, 2
TOLERANCE = 0.003  # the bench holds the batches of both steps, the Trainer those of one and the next: 6 of 4,000 KiB
OPTIONS = [
    ("lora", "r=16", "target_modules=all-linear"),
    ("lora", "target_modules=.*mlp\\..*_proj", "lora_alpha=32", "use_rslora=true"),
    ("lora", "modules_to_save=lm_head"),
    ("lora", "lora_dropout=0.1", "use_dora=true"),
    ("lora", "autocast_adapter_dtype=false"),
    ("lora", "bf16=false"),
    ("lora", "dtype=float32"),
    ("lora", "trained_dtype=bfloat16", "target_modules=[q_proj, o_proj]"),
    ("lora", "lengths=64x1,40x1", "use_cache=true"),
    ("lora", "gradient_accumulation_steps=3"),
    ("lora", "gradient_checkpointing=true"),
    ("lora", "gradient_checkpointing=true", "gradient_checkpointing_kwargs={use_reentrant: true}"),
    ("lora", "masked=true"),
    ("prefix", "num_virtual_tokens=5"),
    ("qlora", "r=4"),
    ("qlora", "bf16=false", "bnb_4bit_use_double_quant=true"),
    ("qlora", "prepare_model_for_kbit_training=false"),
    ("ft-bf16", "optim=adamw_torch"),
    ("ft-bf16", "optim=sgd", "max_grad_norm=0"),
    ("ft-bf16", "optim=rmsprop"),
    ("ft-amp", "optim=adafactor"),
    ("ft-amp", "gradient_accumulation_steps=2"),
]


class InOrder(Trainer):
    """The Trainer on rows as they stand."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def recipe_of(method, *settings):
    return apply(parse_settings(settings), {method: RECIPES[method]})[method]


def measured(recipe, folder, tmp_path):
    """Bytes at the peak of two steps."""
    model = adapted(recipe, LlamaForCausalLM(AutoConfig.from_pretrained(folder)).to(getattr(torch, recipe.dtype)))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, **recipe.arguments,
    )  # fmt: skip
    count = STEPS * BATCH * arguments.gradient_accumulation_steps
    trainer = InOrder(model=model, args=arguments, train_dataset=[row(recipe, number) for number in range(count)])
    ledger = Ledger("cpu")
    ledger.assign("weights", [*model.parameters(), *model.buffers()])
    for tensors in nf4_tensors(model).values():
        ledger.assign("quantization", tensors)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, fast_bf16():
        trainer.train()
    return ledger.live_bytes() + highest_rise(profiler)


def adapted(recipe, model):
    model.config.use_cache = recipe.use_cache
    if recipe.quantization:
        model = to_nf4(model, nested=recipe.quantization.get("bnb_4bit_use_double_quant", False))
    if recipe.kbit is not None:
        model = peft.prepare_model_for_kbit_training(model, **recipe.kbit)
    if recipe.peft is None:
        return model
    if recipe.arguments.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    usual = {"target_modules": ["q_proj", "v_proj"]} if recipe.peft_class == "LoraConfig" else {}
    config = getattr(peft, recipe.peft_class)(**usual | recipe.peft)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=recipe.autocast_adapter_dtype)
    for parameter in adapted.parameters():
        if recipe.trained_dtype and parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, recipe.trained_dtype))
    return adapted


def row(recipe, number):
    tokens = torch.randint(1000, (TOKENS,), generator=torch.Generator().manual_seed(number))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[-1] = 0 if recipe.masked else 1
    if len(set(recipe.lengths)) > 1:  # as collators pad them
        length = recipe.lengths[number % len(recipe.lengths)]
        mask[length:], labels[length:] = 0, -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("option", OPTIONS, ids=", ".join)
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
