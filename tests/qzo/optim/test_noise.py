"""z from (seed, step, index) alone."""

import itertools
import sys

import pytest
import torch

from qzo.kernels.philox import Stream, draw_by_operators
from qzo.optim.estimator import NOISE
from qzo.optim.noise import chunk_elements, full_noise, mix_seed, mixed_chunks, noise_chunks

KINDS = [(noise, distribution) for noise, known in NOISE.items() for distribution in known]
SIZES = [1, 7, 2**14, 2**14 + 1, 100_003, 2**18 + 5]


@pytest.mark.parametrize("numel", SIZES)
def test_chunks_cover_the_tensor_in_one_buffer(numel):
    starts, pointers, covered = [], set(), 0
    for start, z in noise_chunks(numel, 1, 2, 3, "cpu"):
        starts.append(start)
        pointers.add(z.untyped_storage().data_ptr())
        assert start == covered and len(z) <= chunk_elements(numel) and z.dtype == torch.float32
        covered += len(z)
    assert covered == numel and len(pointers) == 1


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("least", [1, 1000, 2**14, 2**20])
@pytest.mark.parametrize(("noise", "distribution"), KINDS)
def test_z_does_not_depend_on_how_much_of_it_exists_at_a_time(numel, least, noise, distribution):
    expected = full_noise(torch.Size([numel]), 1, 2, 3, "cpu", 1, distribution, noise)
    drawn = [z.clone() for _, z in noise_chunks(numel, 1, 2, 3, "cpu", 1, distribution, least, noise)]
    chunk = chunk_elements(numel, noise)
    assert all(least <= len(z) < least + chunk or len(z) == chunk for z in drawn[:-1])
    assert torch.equal(torch.cat(drawn), expected)
    factors, key = [0.5, -2.0], (numel, 1, 2, 3, "cpu")
    mixed = [torch.cat([z.clone() for _, z in mixed_chunks(*key, factors, distribution, n, noise)]) for n in (0, least)]
    assert torch.equal(*mixed)


@pytest.mark.parametrize("distribution", ["binomial", "rademacher"])
def test_z_of_philox_does_not_depend_on_the_size_of_chunks(distribution, monkeypatch):
    key = (100_003, 1, 2, 3, "cpu", 1, distribution, 0, "philox")
    expected = torch.empty(100_003)
    draw_by_operators(expected, 0, Stream(1, 2, 3, 1), distribution)
    for size in (1000, 4096, 2**20):
        monkeypatch.setattr(sys.modules["qzo.optim.noise"], "chunk_elements", lambda numel, noise: size)  # noqa: B023
        assert torch.equal(torch.cat([z.clone() for _, z in noise_chunks(*key)]), expected)


def test_chunk_size_is_a_quarter_within_bounds():
    assert [chunk_elements(n) for n in (10, 2**10, 2**17, 2**24, 2**30)] == [2**8, 2**8, 2**15, 2**22, 2**22]
    assert [chunk_elements(n, "philox") for n in (10, 2**18, 3 * 2**18 + 9, 2**24)] == [2**17, 2**17, 3 * 2**16, 2**18]


def test_same_key_same_noise_and_other_keys_other_noise():
    def draw(*key):
        return full_noise(torch.Size([3, 5]), *key, "cpu")

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    keys = list(itertools.product((0, 1, 2), repeat=3))
    drawn = {tuple(draw(*key).flatten().tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_noise_is_standard_normal():
    z = full_noise(torch.Size([400_000]), 0, 0, 0, "cpu")
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_global_rng_stays_where_it_is(device):
    state = torch.get_rng_state()
    for noise, distribution in KINDS:
        assert len(list(noise_chunks(100, 0, 0, 0, device, 0, distribution, 0, noise))) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_mixed_seeds_are_64_bit_and_published_splitmix_values_come_out():
    assert mix_seed(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 from state 0
    assert len({mix_seed(s, t, i) for s in range(10) for t in range(10) for i in range(10)}) == 1000
    assert all(0 <= mix_seed(seed, 5) < 2**64 for seed in (-1, 2**64, 2**70))


@pytest.mark.parametrize(
    ("numel", "starts"), [(768, [0, 256, 512]), (1024, [0, 256, 768]), (2**26 + 5, [0, 2**22, 2**26])]
)
def test_without_data_chunks_between_the_second_and_the_last_are_left_out(numel, starts):
    drawn = [(start, len(z)) for start, z in noise_chunks(numel, 1, 2, 3, "meta")]
    mixed = [(start, len(z)) for start, z in mixed_chunks(numel, 1, 2, 3, "meta", [1.0, 2.0])]
    assert [start for start, _ in drawn] == [start for start, _ in mixed] == starts
    assert drawn[-1][1] == numel - starts[-1]
    assert full_noise(torch.Size([numel]), 1, 2, 3, "meta").shape == (numel,)
