"""Philox 4x32-10 against the numbers published with it, and z against its definition, element by element."""

import pytest
import torch
from reference import philox_block, z_of

from qzo.errors import QzoError
from qzo.kernels import native, philox
from qzo.kernels.philox import BITS, Stream, draw, draw_by_operators, philox4x32, tile_elements

compiled = pytest.mark.skipif(not native.is_compiled(), reason="the package was installed without a compiler")

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


def by_definition(element, distribution, stream):
    return z_of(element, distribution, *stream)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_words_come_out(counter, key, words):
    assert philox_block(counter, key) == words
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


@compiled
@pytest.mark.parametrize("distribution", BITS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_compiled_code_draws_the_same_whatever_range_and_threads(distribution, threads, monkeypatch):
    monkeypatch.setattr(philox, "LEAST_DRAWN", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = drawn(70_000, 0, distribution)
    for start, numel in [(0, 0), (0, 70_000), (5, 1), (17, 100), (127, 2), (128, 2048), (2047, 2050), (30_001, 39_000)]:
        z = torch.full((numel + 2,), torch.nan)
        assert philox.can_draw(z[1:-1])
        draw(z[1:-1], start, STREAM, distribution)
        assert torch.equal(z[1:-1], whole[start : start + numel]) and z[[0, -1]].isnan().all()
    for stream, start in ((Stream(2**64 - 1, ALL, ALL, ALL), 9), (STREAM, 2**35 - 3000)):
        z = torch.empty(3000)
        draw(z, start, stream, distribution)
        assert torch.equal(z, drawn(3000, start, distribution, stream))


@compiled
def test_what_compiled_code_does_not_write_operators_do():
    for out in (torch.empty(9, dtype=torch.bfloat16), torch.empty(18)[::2], torch.empty(9, device="meta")):
        assert not philox.can_draw(out)
        draw(out, 3, STREAM, "binomial")
        assert out.is_meta or torch.equal(out.float(), drawn(9, 3))
    with native.by_operators():
        assert not philox.can_draw(torch.empty(9))


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
