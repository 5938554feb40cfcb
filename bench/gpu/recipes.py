"""Memory of published recipes, as the Trainer of transformers runs them: `python -m bench.gpu.recipes --out FILE`.

Nothing of ours takes part: a checkpoint with random weights is written once, and for each recipe, in a process of its
own, loaded by `from_pretrained`, prepared by PEFT and trained by `Trainer` for a few steps of random tokens. What the
caching allocator says of loading and of each step is written beside the recipe, which is in the libraries' own words:
lines that `bench validate` reads.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.cases.models import resolve
from bench.cases.recipes.recipe import Recipe
from bench.records import nvml
from qzo.durable import replace_file

STEPS = 3
PROCESSES = {True: 3, False: 6}  # side by side, with all weights trained and without: at most 24 and 12 GB each
LIMIT_SECONDS = 120  # of one recipe
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
MIB = 1 << 20
Numbers = dict[str, int]

BF16 = {"bf16": True}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
WIDE = LORA | {"r": 16, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
AGAIN = {"gradient_checkpointing": True}
REENTRANT, NOT_REENTRANT = ({"gradient_checkpointing_kwargs": {"use_reentrant": choice}} for choice in (True, False))
KEPT = {"use_gradient_checkpointing": False}  # of kbit
PREFIX = {"num_virtual_tokens": 32, "task_type": "CAUSAL_LM"}

RECIPES = (
    Recipe("ft, bf16 weights, fused AdamW", BF16 | {"optim": "adamw_torch_fused"}),
    Recipe("ft, bf16 weights, AdamW by foreach", BF16 | {"optim": "adamw_torch"}),
    Recipe("ft, fp32 weights, bf16 autocast", BF16 | {"optim": "adamw_torch_fused"}, dtype="float32"),
    Recipe("ft, 8-bit AdamW", BF16 | {"optim": "adamw_bnb_8bit"}),
    Recipe("ft, paged 8-bit AdamW", BF16 | {"optim": "paged_adamw_8bit"}),
    Recipe("ft, Adafactor", BF16 | {"optim": "adafactor"}),
    Recipe("ft, Lion in 8 bits", BF16 | {"optim": "lion_8bit"}),
    Recipe("ft, SGD, no clipping", BF16 | {"optim": "sgd", "max_grad_norm": 0.0}),
    Recipe("ft, accumulation of 4", BF16 | {"gradient_accumulation_steps": 4}),
    Recipe("ft, checkpointing", BF16 | AGAIN | NOT_REENTRANT),
    Recipe("lora, bf16", BF16, LORA),
    Recipe("lora, bf16 weights without autocast", {}, LORA),
    Recipe("lora, fp16 autocast of fp32 weights", {"fp16": True}, LORA, dtype="float32"),
    Recipe("lora, every linear layer, dropout", BF16, WIDE | {"lora_dropout": 0.05}),
    Recipe("lora, every linear layer, checkpointing", BF16 | AGAIN | NOT_REENTRANT, WIDE),
    Recipe("lora, checkpointing, reentrant", BF16 | AGAIN | REENTRANT, WIDE),
    Recipe("lora, accumulation of 4", BF16 | {"gradient_accumulation_steps": 4}, WIDE),
    Recipe("lora, eager attention", BF16, LORA, attention="eager"),
    Recipe("lora, head trained too", BF16, LORA | {"modules_to_save": ["lm_head"]}),
    Recipe("lora, rows of many lengths", BF16, WIDE, lengths=(200, 900, 450, 1024, 70, 600)),
    Recipe("dora", BF16, WIDE | {"use_dora": True}),
    Recipe("prefix tuning", BF16, PREFIX, "PrefixTuningConfig"),
    Recipe("prompt tuning", BF16, PREFIX, "PromptTuningConfig"),
    Recipe("ia3", BF16, {"task_type": "CAUSAL_LM"}, "IA3Config"),
    Recipe("qlora", BF16, WIDE, quantization=NF4, kbit=KEPT),
    Recipe("qlora, without autocast", {}, WIDE, quantization=NF4, kbit=KEPT),
    Recipe("qlora, not prepared", BF16, WIDE, quantization=NF4),
    Recipe("qlora, nested scales, checkpointing, paged 8-bit AdamW",
           BF16 | AGAIN | NOT_REENTRANT | {"optim": "paged_adamw_8bit"}, WIDE,
           quantization=NF4 | {"bnb_4bit_use_double_quant": True}, kbit={}),
    Recipe("qlora, small shards", BF16, LORA, quantization=NF4, kbit=KEPT, max_shard_size="300MB"),
    Recipe("qlora, rows of many lengths", BF16 | AGAIN | NOT_REENTRANT, WIDE, quantization=NF4, kbit={},
           lengths=(200, 900, 450, 1024, 70, 600)),
    Recipe("lora, 8-bit weights", BF16, WIDE, quantization={"load_in_8bit": True}, kbit=KEPT),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 1 if a recipe failed for another reason than a package that is not there."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.recipes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    parser.add_argument("--model", default="llama3.2-1b", help="a name of `bench list models`, or a folder")
    parser.add_argument("--recipes", nargs="*", metavar="NAME", help="in place of all")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "CHECKPOINT"), help="this one, here, as JSON on stdout")
    parser.add_argument("--out", type=Path, help="file of JSON lines to write")
    options = parser.parse_args(arguments)
    by_name = {recipe.name: recipe for recipe in RECIPES}
    if options.one:
        print(json.dumps(measured(by_name[options.one[0]], options.one[1], options.device)))
        return 0
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    chosen = [by_name[name] for name in options.recipes] if options.recipes else list(RECIPES)
    lines: list[str] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="qzo-recipes-", dir=_shared_memory()) as folder:
        checkpoints = {size: str(Path(folder) / size) for size in {recipe.max_shard_size for recipe in chosen}}
        write_checkpoints(options.model, checkpoints, options.device)
        for whole in (True, False):
            group = [recipe for recipe in chosen if (recipe.peft is None) == whole]
            with ThreadPoolExecutor(PROCESSES[whole] if options.device == "cuda" else 1) as pool:
                for row in pool.map(partial(_in_a_process, options.device, checkpoints), group):
                    print(f"{row['recipe']['name']}: {row.get('message') or 'ok'}", file=sys.stderr, flush=True)
                    failed |= row.get("status") == "error"
                    if "message" not in row:
                        lines.append(json.dumps({"model_id": options.model, "gpu": gpu, **row, "versions": versions()}))
                        replace_file(
                            options.out, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                        )
    return int(failed)


def write_checkpoints(model: str, checkpoints: dict[str, str], device: str) -> None:
    """The architecture in bf16 with random weights, once for each size of its files, each in a folder of its own."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        built = AutoModelForCausalLM.from_config(resolve(model).config, dtype=torch.bfloat16)
    for size, folder in checkpoints.items():
        built.save_pretrained(folder, max_shard_size=size)
    del built
    if device == "cuda":
        torch.cuda.empty_cache()


def _in_a_process(device: str, checkpoints: dict[str, str], recipe: Recipe) -> dict[str, Any]:
    checkpoint = checkpoints[recipe.max_shard_size]
    command = [sys.executable, "-m", "bench.gpu.recipes", "--device", device, "--one", recipe.name, checkpoint]
    row: dict[str, Any] = {"recipe": asdict(recipe)}
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return row | {"status": "error", "message": f"not ended after {LIMIT_SECONDS} s"}
    if ran.returncode:
        message = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        lacking = message.startswith(("ImportError", "ModuleNotFoundError"))
        return row | {"status": "unsupported" if lacking else "error", "message": message}
    return row | json.loads(ran.stdout.splitlines()[-1])


def measured(recipe: Recipe, checkpoint: str, device: str) -> dict[str, Any]:
    """Bytes of loading and of each step. Run it in a process that has not used the GPU."""
    from transformers import Trainer, TrainingArguments

    meter = Meter(device)
    model = loaded(recipe, checkpoint, device)
    found = {"loading": meter.read(), "parameters": sum(parameter.numel() for parameter in model.parameters())}
    found["trainable"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory(prefix="qzo-recipe-") as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=recipe.batch_size, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=device == "cpu", **recipe.arguments,
        )  # fmt: skip
        data = rows(recipe, model.config.get_text_config().vocab_size, arguments.gradient_accumulation_steps)
        steps = meter.callback()
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=padded, callbacks=[steps]).train()
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}" if device == "cuda" else None
    process = nvml.process_bytes(uuid) if uuid else None
    return {"measured_mib": highest(steps.found[1:], process), **found, "steps": steps.found}


def highest(steps: Sequence[Numbers | None], process: int | None) -> dict[str, float]:
    """The figures of a measurement, as far as there are any."""
    known = [step for step in steps if step is not None]
    found = {name: max(step[name] for step in known) for name in ("peak_allocated", "peak_reserved") if known}
    return {name: nbytes / MIB for name, nbytes in (found | ({"process": process} if process else {})).items()}


def loaded(recipe: Recipe, checkpoint: str, device: str) -> Any:
    """The model as a training script has it before it makes a Trainer: loaded, quantized, prepared, with adapters."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, recipe.dtype), "attn_implementation": recipe.attention}
    if recipe.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**recipe.quantization)
    if recipe.quantization or recipe.peft:  # a script that trains all of a model leaves it to the Trainer to move it
        options["device_map"] = {"": 0 if device == "cuda" else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    model.config.use_cache = False
    if recipe.kbit is not None:
        model = peft.prepare_model_for_kbit_training(model, **recipe.kbit)
    if recipe.peft is not None:
        if recipe.arguments.get("gradient_checkpointing") and recipe.kbit is None:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, getattr(peft, recipe.peft_class)(**recipe.peft))
    return model


def rows(recipe: Recipe, vocabulary: int, accumulated: int) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens for all steps, all of them labels."""
    generator = torch.Generator().manual_seed(0)
    count = STEPS * recipe.batch_size * accumulated
    lengths = [recipe.lengths[index % len(recipe.lengths)] for index in range(count)]
    tokens = [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens]


def padded(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`[rows, longest]`, as the collators of transformers pad."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    pad = torch.nn.utils.rnn.pad_sequence
    return {key: pad([row[key] for row in batch], batch_first=True, padding_value=fill[key]) for key in fill}


class Meter:
    """The caching allocator's figures since they were last read."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.init()

    def read(self) -> Numbers | None:
        """Bytes at the highest and now; the highest starts anew. None on a CPU, which has no such allocator."""
        if not self.on_gpu:
            return None
        found = {
            "peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved(),
            "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
        }  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        return found

    def callback(self) -> Any:
        """A callback of the Trainer that reads before the first step, and after each."""
        from transformers import TrainerCallback

        meter = self

        class Steps(TrainerCallback):
            def __init__(self) -> None:
                self.found: list[Numbers | None] = []

            def on_train_begin(self, *states: Any, **further: Any) -> None:
                self.found.append(meter.read())

            def on_step_end(self, *states: Any, **further: Any) -> None:
                self.found.append(meter.read())

        return Steps()


def versions() -> dict[str, str | None]:
    """Of what a recipe runs on; None for what is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"driver": nvml.driver_version()}


def _shared_memory() -> str | None:
    """Where a checkpoint of a few GB is read fastest."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
