"""Blocks of GGUF files against `gguf.dequantize`, bit for bit."""

import numpy as np
import pytest
import torch
from optional import gguf

from qzo.formats.gguf.codes import BLOCK_TYPES, half_at

TYPES = sorted(BLOCK_TYPES)
NAMES = [BLOCK_TYPES[number].name for number in TYPES]


def random_blocks(kind, rows=5, per_row=7, seed=0):
    """Any bytes at all: scales of every size, infinite ones and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, per_row, kind.n_bytes), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("number", TYPES, ids=NAMES)
def test_weights_are_those_of_gguf_to_the_bit(number):
    kind = BLOCK_TYPES[number]
    qtype = gguf.GGMLQuantizationType(number)
    assert (qtype.name, gguf.GGML_QUANT_SIZES[qtype]) == (kind.name, (kind.n_weights, kind.n_bytes))
    for seed in range(20):
        blocks = random_blocks(kind, seed=seed)
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(gguf.dequantize(blocks.flatten(1).numpy(), qtype))
        weights = kind.weights(blocks)
        assert weights.dtype == torch.float32 and weights.shape == (5, 7 * kind.n_weights)
        known = ~expected.isnan()
        assert torch.equal(weights.isnan(), ~known) and known.any()
        assert torch.equal(weights[known].view(torch.int32), expected[known].view(torch.int32))  # the sign of 0 too


@pytest.mark.parametrize("number", [n for n in TYPES if BLOCK_TYPES[n].has_scale], ids=lambda n: BLOCK_TYPES[n].name)
def test_the_scale_is_live_and_scales_nothing_but_its_block(number):
    kind = BLOCK_TYPES[number]
    weights = np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)
    stored = torch.from_numpy(gguf.quantize(weights, gguf.GGMLQuantizationType(number)))
    blocks = stored.view(4, 3, kind.n_bytes)
    before, scale = kind.weights(blocks), half_at(blocks, 0)
    assert (scale.min() < 0) == kind.signed
    scale[2, 1] *= 2
    if kind.has_offset:
        half_at(blocks, 1)[2, 1] *= 2
    after = kind.weights(blocks)
    assert torch.equal(after[2, 32:64], 2 * before[2, 32:64])
    after[2, 32:64] = before[2, 32:64]
    assert torch.equal(after, before)


@pytest.mark.parametrize("number", [3, 8], ids=["Q4_1", "Q8_0"])
def test_weights_are_differentiable_in_numbers_that_stand_in(number):
    kind = BLOCK_TYPES[number]
    blocks = random_blocks(kind)
    given = [torch.rand(5, 7, requires_grad=True) for _ in range(1 + kind.has_offset)]
    along = torch.randn(5, 7, 32)
    found = torch.autograd.grad((kind.weights(blocks, *given).view_as(along) * along).sum(), given)
    torch.testing.assert_close(found[0], (kind.rebuild(blocks) * along).sum(-1))
    if kind.has_offset:
        torch.testing.assert_close(found[1], along.sum(-1))


@pytest.mark.parametrize("number", TYPES, ids=NAMES)
def test_blocks_on_meta_answer_with_shapes(number):
    assert gguf.GGML_QUANT_SIZES  # which has the lattices of some types
    kind = BLOCK_TYPES[number]
    assert kind.weights(torch.empty(3, 2, kind.n_bytes, dtype=torch.uint8, device="meta")).shape == (
        3,
        2 * kind.n_weights,
    )
