"""Packing into the GPTQ layout and back."""

import pytest
import torch

from qzo.errors import QzoError
from qzo.formats.gptq.codes import pack, pack_zeros, unpack, unpack_zeros, zeros_from_v1, zeros_to_v1


@pytest.mark.parametrize("n_bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [32, 96])
def test_unpack_undoes_pack(n_bits, rows):
    codes = torch.randint(0, 2**n_bits, (rows, 24), dtype=torch.uint8)
    words = pack(codes, n_bits)
    assert words.dtype == torch.int32 and words.shape == (rows * n_bits // 32, 24)
    assert torch.equal(unpack(words, n_bits), codes.int())


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_unpack_zeros_undoes_pack_zeros(n_bits):
    zeros = torch.randint(0, 2**n_bits, (3, 64))
    qzeros = pack_zeros(zeros, n_bits)
    assert qzeros.shape == (3, 64 * n_bits // 32) and qzeros.is_contiguous()
    assert torch.equal(unpack_zeros(qzeros, n_bits), zeros.int())


def test_first_code_is_in_the_lowest_bits():
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]])
    assert pack(codes, 4).item() == 0xF7654321 - 2**32


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_v1_stores_zero_minus_one(n_bits):
    zeros = torch.randint(1, 2**n_bits, (2, 32))
    true = pack_zeros(zeros, n_bits)
    v1 = zeros_to_v1(true, n_bits)
    assert torch.equal(unpack_zeros(v1, n_bits), zeros.int() - 1)
    assert torch.equal(zeros_from_v1(v1, n_bits), true)


def test_v1_cannot_hold_a_zero_point_of_zero_but_is_read_modulo():
    zeros = torch.full((1, 8), 2, dtype=torch.int32)
    zeros_to_v1(pack_zeros(zeros, 4), 4)
    zeros[0, 3] = 0
    with pytest.raises(QzoError, match="gptq_v2"):
        zeros_to_v1(pack_zeros(zeros, 4), 4)
    stored = pack_zeros((zeros - 1) % 16, 4)
    assert torch.equal(unpack_zeros(zeros_from_v1(stored, 4), 4), zeros)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(QzoError, match="multiple of 8"):
        pack(torch.zeros(20, 4, dtype=torch.uint8), 4)
