"""A file as users of TRL, axolotl or LLaMA-Factory publish it leaves the record of the same options written by hand."""

from pathlib import Path

import pytest

from bench.__main__ import parser
from bench.commands.recipe_options import chosen
from bench.commands.run import cells_of
from bench.worlds import cell

FILES = Path(__file__).parents[1] / "cases" / "recipes" / "files"
COMMON = ("--device", "sim", "--gpu", "h100-80gb", "--seq-len", "64")
QLORA = ("--methods", "qlora", "--attention", "flash")
NOT_REENTRANT = ("gradient_checkpointing=true", "gradient_checkpointing_kwargs={use_reentrant: false}")
NESTED = (
    "bnb_4bit_use_double_quant=true", "bnb_4bit_compute_dtype=bfloat16", "prepare_model_for_kbit_training=false",
    "packing=true",
)  # fmt: skip
LIGER = (
    "{rope: false, rms_norm: true, layer_norm: false, swiglu: true, cross_entropy: false, "
    "fused_linear_cross_entropy: true}"
)
BY_HAND = {
    "trl_sft.yaml": (
        (*QLORA, "--batch-size", "4"),
        ("r=32", "lora_alpha=16", "lora_dropout=0.0", "target_modules=q_proj,k_proj,v_proj,o_proj", *NESTED,
         *NOT_REENTRANT, "gradient_accumulation_steps=2", "optim=paged_adamw_8bit", "loss=tiled",
         "trained_dtype=bfloat16"),
    ),
    "axolotl_qlora.yml": (
        (*QLORA, "--batch-size", "2"),
        ("r=32", "lora_alpha=16", "lora_dropout=0.05", "target_modules=all-linear", *NESTED, *NOT_REENTRANT,
         "gradient_accumulation_steps=4", "optim=paged_adamw_32bit", "use_liger_kernel=true",
         f"liger_kernel_config={LIGER}"),
    ),
    "llama_factory_lora.yaml": (
        ("--methods", "lora"),
        ("r=16", "lora_alpha=32", "lora_dropout=0.0", "target_modules=all-linear", "trained_dtype=float32",
         "gradient_accumulation_steps=8", "gradient_checkpointing=true",
         "gradient_checkpointing_kwargs={use_reentrant: true}"),
    ),
}  # fmt: skip


def cell_of(folder, *arguments):
    """The cell of a `bench run`."""
    options = parser().parse_args(["run", str(folder), *COMMON, *arguments])
    _, (only,) = cells_of(options, chosen(options))
    return only


def record_of(case):
    """The record, without the name of its recipe and the note that tells what the recipe shows."""
    record = cell.run(case)
    assert record["status"] == "ok", record["message"]
    record["notes"] = [note for note in record["notes"] if not note.startswith("other than in the table")]
    recipe = record["case"]["recipe"]
    del recipe["name"]
    recipe["arguments"].setdefault("optim", "adamw_torch_fused")  # the Trainer's default, which the table states
    return record


@pytest.mark.parametrize("name", BY_HAND)
def test_a_published_file_leaves_the_record_of_the_options_by_hand(name, llama_folder):
    further, settings = BY_HAND[name]
    words = [word for text in settings for word in ("--set", text)]
    by_hand, by_file = cell_of(llama_folder, *further, *words), cell_of(llama_folder, "--recipe", str(FILES / name))
    if by_file.method == "qlora":
        pytest.importorskip("bitsandbytes")
    assert record_of(by_file) == record_of(by_hand)
    assert cell_of(llama_folder, *further, *words[:-2]).recipe != by_hand.recipe
