"""Quantized embedding and head."""

import pytest
import torch
from torch import nn

from qzo.errors import QzoError
from qzo.formats.vocabulary import QuantEmbedding, TiedQuantHead
from qzo.kernels import rebuilt as chunked


def table_of(embedding):
    return embedding.rows(0, embedding.num_embeddings, torch.float32, embedding.scales)


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, -1])
def test_rows_are_those_of_the_table(n_bits, group_size):
    weight = torch.randn(50, 64)
    embedding = QuantEmbedding.from_weight(weight, n_bits, group_size)
    ids = torch.randint(0, 50, (2, 7))
    assert embedding.codes.shape == (50, 64 * n_bits // 8) and embedding(ids).shape == (2, 7, 64)
    assert torch.equal(embedding(ids), table_of(embedding)[ids])
    step = embedding.scales.repeat_interleave(64 // embedding.scales.shape[1], 1)
    assert ((table_of(embedding) - weight).abs() <= step / 2 * (1 + 1e-4)).all()


def test_head_equals_the_dense_product_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * 64)
    embedding = QuantEmbedding.from_weight(torch.randn(50, 64), group_size=16)
    bias = torch.randn(50)
    x = torch.randn(2, 3, 64)
    expected = nn.functional.linear(x, table_of(embedding), bias)
    torch.testing.assert_close(TiedQuantHead(embedding, bias)(x), expected, rtol=1e-5, atol=1e-5)


def test_bf16_rows_come_in_bf16():
    embedding = QuantEmbedding.from_weight(torch.randn(50, 64).bfloat16(), group_size=64)
    assert embedding(torch.tensor([1])).dtype == torch.bfloat16 and embedding.scales.dtype == torch.float16


def test_gradients_reach_the_shared_scales_from_both_ends():
    embedding = QuantEmbedding.from_weight(torch.randn(50, 64), group_size=16)
    embedding.scales.requires_grad_()
    head, ids = TiedQuantHead(embedding), torch.tensor([3, 7])
    ours = torch.autograd.grad(head(embedding(ids)).sum(), embedding.scales)[0]
    dense = table_of(embedding)
    expected = torch.autograd.grad((dense[ids] @ dense.t()).sum(), embedding.scales)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_meta_table_answers_with_shapes():
    embedding = QuantEmbedding.from_weight(torch.empty(50, 64, device="meta"), group_size=32)
    rows = embedding(torch.zeros(2, 3, dtype=torch.long, device="meta"))
    assert rows.is_meta and TiedQuantHead(embedding)(rows).shape == (2, 3, 50)


def test_rows_that_do_not_fill_bytes_are_refused():
    with pytest.raises(QzoError, match="does not fill whole bytes"):
        QuantEmbedding.from_weight(torch.randn(50, 3), 4, -1)
    QuantEmbedding.from_weight(torch.randn(50, 3), 8, -1)
