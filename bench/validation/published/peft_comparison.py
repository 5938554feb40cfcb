"""huggingface/peft, method_comparison/MetaMathQA: a loop of its own, without autocast, the cache kept on."""

from __future__ import annotations

from torch import nn

from bench.cases.recipes.recipe import Recipe
from bench.validation.published.row import DTYPES, Change, Published, Row, checkpointing, model_of
from qzo.errors import QzoError
from qzo.quiet import quiet_libraries

RENAMED = {"BONE": "MISS"}  # by PEFT, in version 0.18
# Rows are sorted within buckets, longest first. How long the longest batch is, is not printed; by LoRA of rank 32 it
# has 689 tokens, where rows are cut at 768.
LONGEST = {768: 689}
AROUND = (64, 640)  # tokens of the batch before the longest, which ends a bucket, and of the one after it

FROM_VALUES = {  # of weights or masks, which a simulated model does not have
    "SHIRA": "SHiRA looks for its indices in a mask",
    "UNILORA": "Uni-LoRA counts how often each of its indices is drawn",
    "FROD": "FRoD decomposes the weights",
    "ADAMSS": "AdaMSS clusters the weights' singular vectors",
}


def freeze_first(model: nn.Module) -> None:
    """LoRA-FA trains the second matrix of each adapter alone (peft/optimizers/lorafa.py)."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


# What each does to the model. LoRA-FA's moments are AdamW's; the r x r inverse that it makes of each first matrix is
# left out.
OPTIMIZERS: dict[str, tuple[Change, ...]] = {"adamw": (), "lora-fa": (freeze_first,)}


def read(row: Row) -> Published:
    """The recipe of a row. Raises QzoError for what the installed PEFT does not have."""
    with quiet_libraries():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    config = dict(row["peft_config"])
    kind = config.pop("peft_type", None)
    kind = RENAMED.get(kind, kind)
    if kind == "OFT" and config.get("r"):
        config.setdefault("oft_block_size", 0)  # the one follows from the other
    if kind is not None and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise QzoError(f"the PEFT method {kind} is not in the installed version of PEFT")
    if kind == "OFT" and str(row.get("versions", {}).get("peft")).startswith("0.15"):
        raise QzoError("OFT is another computation since PEFT 0.16")
    if kind in FROM_VALUES:
        raise QzoError(f"{FROM_VALUES[kind]}: its adapters follow from values, and nothing is simulated with values")
    longest = LONGEST.get(row["max_seq_len"])
    if longest is None:
        raise QzoError(f"the longest batch of rows cut at {row['max_seq_len']} tokens is not known")
    if row["optimizer"] not in OPTIMIZERS:
        raise QzoError(f"the optimizer {row['optimizer']} is not known")
    size = row["batch_size"]
    arguments = {"optim": "adamw_torch", "torch_empty_cache_steps": 1} | checkpointing(row)
    recipe = Recipe(
        row["experiment"], arguments, config | {"task_type": "CAUSAL_LM"} if kind else None,
        PEFT_TYPE_TO_CONFIG_MAPPING[kind].__name__ if kind else "", dtype=DTYPES[row["base_dtype"]], batch_size=size,
        lengths=(AROUND[0],) * size + (longest,) * size + (AROUND[1],) * size, loop="plain",
        use_cache=row["use_cache"], masked=True,
    )  # fmt: skip
    return Published(recipe, model_of(row), changes=OPTIMIZERS[row["optimizer"]])
