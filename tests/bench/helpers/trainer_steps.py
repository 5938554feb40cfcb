"""Steps of the Trainer of transformers on this CPU, and the options that they are run with.

Nothing of ours takes part but PyTorch's allocation events: transformers reads a quantized checkpoint, PEFT adapts the
model, Trainer.train runs two steps.
"""

import gc
import tempfile

import peft
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bench.cases.recipes.settings import apply, parse_settings
from bench.cases.recipes.table import RECIPES
from bench.ledger.events import highest_rise
from bench.ledger.ledger import Ledger
from bench.methods.quantized.int8 import int8_tensors
from bench.methods.quantized.nf4 import nf4_tensors
from bench.simulator.cpu.gemm import fast_bf16

BATCH, TOKENS, STEPS = 2, 64, 2
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
    ("qlora", "bf16=false", "bnb_4bit_use_double_quant=true", "bnb_4bit_quant_type=fp4"),
    ("qlora", "bf16=false", "bnb_4bit_compute_dtype=bfloat16", "use_gradient_checkpointing=true"),
    ("qlora", "prepare_model_for_kbit_training=false"),
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
