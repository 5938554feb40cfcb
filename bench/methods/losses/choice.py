"""Which loss a recipe has, in the place of the model's own head and loss.

Labels are taken to be tokens of the loss all of them, as the rows of the bench are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from bench.methods.activations.checkpointing import checkpoint_options
from bench.methods.losses.chunked import ChunkedLoss
from bench.methods.losses.fused import FusedLoss
from bench.methods.losses.tiled import TiledLoss
from bench.methods.world import World

CHUNK = 256  # tokens, TRL's _CHUNKED_LM_HEAD_CHUNK_SIZE

HeadLoss = Callable[[Tensor, Any, Tensor, Any], Tensor]  # (hidden [B, T, H], head, labels [B, T], tokens) -> loss


def loss_of(recipe: Recipe) -> str:
    """The recipe's loss; `use_liger_kernel` fuses it with the head unless `liger_kernel_config` says otherwise."""
    liger = recipe.arguments.get("use_liger_kernel")
    chosen = (recipe.arguments.get("liger_kernel_config") or {}).get("fused_linear_cross_entropy", True)
    return "fused" if recipe.loss == "full" and liger and chosen else recipe.loss


def replace_loss(recipe: Recipe, model: nn.Module, world: World) -> None:
    """Give `model` (with adapters or without) a forward that ends in the recipe's loss, and no logits."""
    kind = loss_of(recipe)
    if kind == "full":
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    bends: dict[str, Any] = {
        "scale": 1.0 if scale is None else scale,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }
    losses: dict[str, HeadLoss] = {
        "chunked": ChunkedLoss(recipe.loss_chunk or CHUNK, checkpoint_options(world), **bends),
        "tiled": TiledLoss(**bends),
        "fused": FusedLoss(**bends),
    }
    loss = losses[kind]

    def forward(self: Any, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = self.base_model(**inputs | {"use_cache": False}).last_hidden_state
        return CausalLMOutputWithPast(
            loss=loss(hidden, _trained(self.get_output_embeddings()), labels, num_items_in_batch)
        )

    base.forward = MethodType(forward, base)


def _trained(head: Any) -> Any:
    """The layer that computes, where PEFT keeps a trained copy of the head (`modules_to_save`)."""
    return head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
