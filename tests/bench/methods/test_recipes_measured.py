"""Options of a recipe: the bytes of the simulated CPU are those of the Trainer of transformers, measured on this CPU.

Nothing of ours takes part in the measured step but PyTorch's allocation events: PEFT adapts the model, Trainer.train
runs two steps.

What holds each option, these steps or another test, and the source of what only CUDA has: test_options_held.py.
"""

import gc
import sys
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments, trainer_optimizer

from bench.cases.case import BenchCase
from bench.cases.recipes.settings import apply, parse_settings
from bench.cases.recipes.table import RECIPES
from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger
from bench.methods.optimizers.galore import GaLore
from bench.methods.quantized.int8 import int8_tensors
from bench.methods.quantized.nf4 import nf4_tensors
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
    ("qlora", "use_gradient_checkpointing=true"),
    ("qlora", "load_in_8bit=true"),
    ("lora", "fp16=true"),
    ("ft-bf16", "optim=adamw_torch"),
    ("ft-bf16", "optim=sgd", "max_grad_norm=0"),
    ("ft-bf16", "optim=rmsprop"),
    ("ft-amp", "optim=adafactor"),
    ("ft-amp", "gradient_accumulation_steps=2"),
    ("ft-bf16", "optim=adamw_bnb_8bit"),
    ("ft-bf16", "optim=ademamix_8bit"),
    ("ft-amp", "optim=lion_32bit"),
    ("ft-bf16", "optim=galore_adamw", "optim_target_modules=all-linear", "optim_args=rank=4"),
    ("ft-amp", "optim=galore_adamw_layerwise", "optim_target_modules=[mlp]", "optim_args=rank=8"),
]


GALORE_CLASSES = ("GaLoreAdamW", "GaLoreAdamW8bit", "GaLoreAdafactor")


class InOrder(Trainer):
    """The Trainer on rows as they stand."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def recipe_of(method, *settings):
    return apply(parse_settings(settings), {method: RECIPES[method]})[method]


def measured(recipe, folder, tmp_path):
    """Bytes at the peak of two steps."""
    model = adapted(recipe, loaded(recipe, folder))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True, **recipe.arguments,
    )  # fmt: skip
    count = STEPS * BATCH * arguments.gradient_accumulation_steps
    trainer = InOrder(model=model, args=arguments, train_dataset=[row(recipe, number) for number in range(count)])
    ledger = Ledger("cpu")
    ledger.assign("weights", [*model.parameters(), *model.buffers()])
    for parts in (nf4_tensors(model), int8_tensors(model)):
        for tensors in parts.values():
            ledger.assign("quantization", tensors)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, fast_bf16():
        trainer.train()
    return ledger.live_bytes() + highest_rise(profiler)


def loaded(recipe, folder):
    """As `from_pretrained` leaves it; quantized weights are those of a checkpoint, read by transformers."""
    config, dtype = AutoConfig.from_pretrained(folder), getattr(torch, recipe.dtype)
    model = LlamaForCausalLM(config).to(dtype)
    if not recipe.quantization:
        return model
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        asked = BitsAndBytesConfig(**recipe.quantization)
        return LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=asked, device_map="cpu")


def adapted(recipe, model):
    model.config.use_cache = recipe.use_cache
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
