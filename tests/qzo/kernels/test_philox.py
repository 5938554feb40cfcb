"""Philox 4x32-10 against the numbers published with it, and z against its definition, element by element."""

import pytest
import torch

from qzo.errors import QzoError
from qzo.kernels import philox
from qzo.kernels.philox import BITS, Stream, draw_by_operators, philox4x32, tile_elements

ALL = 2**32 - 1
# philox4x32 10 of kat_vectors in Random123 (github.com/DEShawResearch/random123): counter, key, and the four words.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
STREAM = Stream(seed=-5, step=7, tensor=3, direction=1)


def drawn(numel, start=0, distribution="binomial", stream=STREAM, dtype=torch.float32):
    z = torch.full((numel,), torch.nan, dtype=dtype)
    draw_by_operators(z, start, stream, distribution)
    return z


def block(counter, key):
    """As Salmon et al. write it, with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & ALL, (first >> 32) ^ c3 ^ k1, first & ALL
        k0, k1 = (k0 + 0x9E3779B9) & ALL, (k1 + 0xBB67AE85) & ALL
    return c0, c1, c2, c3


def by_definition(element, distribution, stream):
    bits = {"rademacher": 1, "binomial": 16}[distribution]
    share = 128 // bits
    seed = stream.seed % 2**64
    counter = (16 * (element // (16 * share)) + element % 16, stream.tensor, stream.direction, stream.step)
    words = block(counter, (seed % 2**32, seed // 2**32))
    part = element // 16 % share * bits
    count = (words[part // 32] >> part % 32 & 2**bits - 1).bit_count()
    return {"rademacher": 2 * count - 1, "binomial": (count - 8) / 2}[distribution]


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_words_come_out(counter, key, words):
    assert block(counter, key) == words
    found = philox4x32(torch.tensor(counter)[:, None].repeat(1, 3), key)
    assert found.tolist() == [[word] * 3 for word in words]


@pytest.mark.parametrize("distribution", BITS)
@pytest.mark.parametrize("stream", [STREAM, Stream(2**64 - 1, ALL, ALL, ALL), Stream(0, 0, 0, 0)])
def test_every_element_is_what_the_definition_says(distribution, stream):
    elements = [*range(40), *range(2030, 2070), 4095, 4096, 5000]
    z = drawn(5001, 0, distribution, stream)
    assert z[elements].tolist() == [by_definition(element, distribution, stream) for element in elements]


@pytest.mark.parametrize("distribution", BITS)
def test_elements_from_beyond_32_bits(distribution):
    start = 2**33 + 17
    expected = [by_definition(start + element, distribution, STREAM) for element in range(40)]
    assert drawn(40, start, distribution).tolist() == expected


@pytest.mark.parametrize("distribution", BITS)
@pytest.mark.parametrize(("start", "numel"), [(0, 0), (0, 1), (17, 100), (127, 2), (128, 128), (2047, 2900), (4999, 2)])
def test_any_range_of_z_is_that_part_of_all_of_it(distribution, start, numel, monkeypatch):
    whole = drawn(5001, 0, distribution)
    monkeypatch.setattr(philox, "PIECE", tile_elements(distribution))  # one tile at a time
    assert torch.equal(drawn(numel, start, distribution), whole[start : start + numel])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("distribution", BITS)
def test_z_is_exact_in_every_dtype(dtype, distribution):
    assert torch.equal(drawn(3000, 5, distribution, dtype=dtype).double(), drawn(3000, 5, distribution).double())


@pytest.mark.parametrize(("distribution", "kurtosis", "largest"), [("rademacher", 1, 1), ("binomial", 2.875, 4)])
def test_moments(distribution, kurtosis, largest):
    z = drawn(2**20, 0, distribution).double()
    assert abs(z.mean()) < 0.004 and abs(z.var() - 1) < 0.006 and abs((z**4).mean() - kurtosis) < 0.03
    assert abs((z**3).mean()) < 0.02 and z.max() == largest and z.min() == -largest
    neighbours = [(z[:-lag] * z[lag:]).mean() for lag in (1, 2, 16, 128, 2048)]
    assert all(abs(product) < 0.004 for product in neighbours)


def test_neighbouring_streams_have_nothing_in_common():
    near = [STREAM, *(STREAM._replace(**{name: getattr(STREAM, name) + 1}) for name in Stream._fields)]
    for distribution in BITS:
        z = torch.stack([drawn(2**16, 0, distribution, stream) for stream in near])
        products = (z @ z.t() / 2**16).fill_diagonal_(0)
        assert products.abs().max() < 0.02


@pytest.mark.parametrize("stream", [Stream(0, 2**32, 0, 0), Stream(0, 0, -1, 0)])
def test_what_no_word_holds_is_refused(stream):
    with pytest.raises(QzoError, match="are not in 0"):
        drawn(4, 0, "binomial", stream)


def test_more_elements_than_blocks_make_are_refused():
    with pytest.raises(QzoError, match="more than the 34359738368"):
        drawn(4, 2**35 - 3)
    assert len(drawn(4, 2**35 - 4)) == 4
