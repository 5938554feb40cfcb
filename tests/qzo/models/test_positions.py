"""Positions follow from the mask: a padded row has the loss that it has alone, on whichever side the padding is."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qzo.errors import QzoError
from qzo.models.loss import IGNORED, label_loss
from qzo.models.positions import check_columns, count_positions, position_options, positions_of, row_length

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SIZES = {
    "gpt2": GPT2,
    "openai-gpt": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 8},
    "codegen": {**GPT2, "rotary_dim": 8},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": BERT,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {**BERT, "alibi": True, "new_decoder_architecture": False},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "biogpt": BERT,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64},
    "roberta": {**BERT, "is_decoder": True},
    "llama": {**BERT, "num_key_value_heads": 2},
}


def make(family: str, **more) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=96, pad_token_id=1, bos_token_id=2, eos_token_id=3, **{**SIZES.get(family, {}), **more}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def padded(rows: list[torch.Tensor], left: bool) -> dict[str, torch.Tensor]:
    """Rows of several lengths with 0 as padding, labels on their last three tokens."""
    longest = max(map(len, rows))
    parts = []
    for row in rows:
        gap = torch.zeros(longest - len(row), dtype=torch.long)
        labels = torch.where(torch.arange(len(row)) >= len(row) - 3, row, IGNORED)
        told = [row, labels, torch.ones_like(row)]
        empty = [gap, torch.full_like(gap, IGNORED), gap]
        pairs = zip(empty, told, strict=True) if left else zip(told, empty, strict=True)
        parts.append([torch.cat(pair) for pair in pairs])
    ids, labels, mask = (torch.stack(part) for part in zip(*parts, strict=True))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.fixture
def rows() -> list[torch.Tensor]:
    return [torch.randint(5, 96, (length,)) for length in (11, 5, 8)]


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_padding_on_either_side_leaves_the_loss_of_the_rows_alone(family, rows):
    model = make(family)
    alone = torch.stack([label_loss(model, **padded([row], left=True)) for row in rows]).mean()
    for left in (True, False):
        torch.testing.assert_close(label_loss(model, **padded(rows, left)), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt", "llama", "roberta"])
@torch.no_grad()
def test_padding_on_the_right_gives_the_bits_that_the_model_gives_untold(family, rows):
    model, batch = make(family), padded(rows, left=False)
    kept = 11 - 1 - int((batch["labels"][:, 1:] != IGNORED).any(0).nonzero()[0])
    plain = model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=kept + 1).logits
    told = model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=kept + 1,
        **position_options(model, batch["attention_mask"], 11),
    ).logits
    real = batch["attention_mask"][:, -kept - 1 :].bool()
    assert torch.equal(plain[real], told[real])


def test_positions_count_the_tokens_of_a_row():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    wanted = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    found = positions_of(mask)
    for row, told, position in zip(mask.tolist(), wanted, found.tolist(), strict=True):
        assert [p for m, p in zip(row, position, strict=True) if m] == [p for m, p in zip(row, told, strict=True) if m]
    assert found[1].tolist() == wanted[1] and positions_of(mask.bool()).equal(found)
    assert found.min() >= 0 and found.max() < 5 and positions_of(mask.to("meta")).shape == mask.shape


@torch.no_grad()
def test_a_model_that_counts_columns_refuses_padding_in_front(rows):
    model = make("bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64)
    with pytest.raises(QzoError, match="takes no position_ids and would read padding in front of a text"):
        label_loss(model, **padded(rows, left=True))
    alone = torch.stack([label_loss(model, **padded([row], left=True)) for row in rows]).mean()
    torch.testing.assert_close(label_loss(model, **padded(rows, left=False)), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("gpt2", {}, 64),
        ("mpt", {}, 64),
        ("llama", {"max_position_embeddings": 100}, 100),
        ("roberta", {"max_position_embeddings": 100}, 98),  # its padding token is 1, and 2 the first position
        ("bloom", {}, None),
    ],
)
def test_the_positions_of_a_model_are_what_a_row_may_have(family, options, count):
    model = make(family, **options)
    assert count_positions(model) == count == row_length(model, None, "it") and row_length(model, 40, "it") == 40
    if count is None:
        assert row_length(model, 10**6, "it") == 10**6
        return
    ids = torch.randint(5, 96, (1, count))
    assert label_loss(model, ids, ids, torch.ones_like(ids), keep=1).isfinite()
    with pytest.raises(QzoError, match=f"--max-length {count + 1} is more than the {count} positions of it"):
        row_length(model, count + 1, "it")
    with pytest.raises(QzoError, match=f"longer than the {count} positions of this"):
        check_columns(model, count + 1)
