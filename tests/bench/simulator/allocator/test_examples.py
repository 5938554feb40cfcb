"""The replayed allocator against numbers that others published; each names its source."""

import pytest

from bench.simulator.allocator.replay import MIB, AllocatorSettings, CachingAllocator, OutOfMemory

GIB = 1 << 30


def allocator(text="", memory_bytes=None, total_bytes=None):
    return CachingAllocator(AllocatorSettings.parse(text), memory_bytes, total_bytes)


def fenced_cycles(allocator, cycles):
    """The reproducer of pytorch issue 123548: 64 MiB stay; each cycle 91 and 45.5 MiB come and go, and 2 MiB stay."""
    allocator.malloc(64 * MIB)
    for cycle in range(cycles):
        large, half = allocator.malloc(91 * MIB), allocator.malloc(91 * MIB // 2)
        allocator.malloc(2 * MIB)
        allocator.free(large)
        allocator.free(half)
        yield cycle


def test_expandable_segments_with_oversize_blocks_grow_as_measured():
    # pytorch issue 123548 and pull request 193400: torch 2.12.0 on a 16 GiB RX 9070 XT, in MiB
    measured = {0: (66, 220), 20: (106, 2980), 40: (146, 5760), 60: (186, 8520), 80: (226, 11300), 100: (266, 14060)}
    replayed = allocator("max_split_size_mb:128,expandable_segments:True", total_bytes=16 * GIB)
    for cycle in fenced_cycles(replayed, 101):
        if cycle in measured:
            assert (replayed.allocated // MIB, replayed.reserved // MIB) == measured[cycle]


def test_retry_gives_back_as_many_pages_as_measured():
    # ROCm/legacy-rocm-build issue 6603, the same card and program: cycle 115 is the first that needed a retry, with
    # 296 MiB allocated and 2,680 reserved after it, 16,000 at most. The card's memory is taken from the latter.
    replayed = allocator("max_split_size_mb:128,expandable_segments:True", 16_000 * MIB, 16 * GIB)
    for cycle in fenced_cycles(replayed, 116):
        assert replayed.num_alloc_retries == (cycle == 115)
    assert (replayed.allocated, replayed.reserved) == (296 * MIB, 2680 * MIB)
    assert (replayed.peak_reserved, replayed.num_ooms) == (16_000 * MIB, 0)


@pytest.mark.parametrize("text", ["", "max_split_size_mb:128", "expandable_segments:True"])
def test_either_setting_alone_stays_under_500_mib(text):
    # the same issue: "Either option alone stays under 500 MiB reserved, as do defaults"
    replayed = allocator(text)
    for _ in fenced_cycles(replayed, 101):
        pass
    assert replayed.peak_reserved < 500 * MIB


def test_three_tensors_of_1_mib_need_a_second_small_segment():
    # test/test_cuda.py, TestMemPool.test_mempool_with_allocator
    replayed = allocator()
    segments = []
    for _ in range(3):
        replayed.malloc(MIB)
        segments.append(replayed.reserved // (2 * MIB))
    assert segments == [1, 1, 2]


def test_a_smaller_tensor_splits_the_cached_block():
    # discuss.pytorch.org/t/188639: after a tensor of 400 MiB, one of 24 MiB leaves 400 MiB reserved
    replayed = allocator()
    replayed.free(replayed.malloc(400 * MIB))
    replayed.malloc(24 * MIB)
    assert replayed.reserved == 400 * MIB


@pytest.mark.parametrize(("cached", "reused"), [(205, True), (300, False)])
def test_an_oversize_block_must_nearly_fit(cached, reused):
    # pytorch pull request 44742: a request of 200 MB takes a cached block of 205 MB, but none of 300 MB
    replayed = allocator("max_split_size_mb:200")
    replayed.free(replayed.malloc(cached * MIB))
    before = replayed.reserved
    replayed.malloc(200 * MIB)
    assert (replayed.reserved == before) == reused


@pytest.mark.parametrize(("text", "reused"), [("", False), ("max_non_split_rounding_mb:520", True)])
def test_non_split_rounding_lets_a_larger_block_be_reused(text, reused):
    # pytorch pull request 136174: max_split_size 400 MB, 1,024 MB cached, 500 MB asked and rounded up to 512 MB
    replayed = allocator(f"max_split_size_mb:400,roundup_power2_divisions:8,{text}")
    replayed.free(replayed.malloc(GIB))
    span = replayed.malloc(500 * MIB)
    assert (span.size, replayed.reserved) == ((GIB, GIB) if reused else (512 * MIB, GIB + 512 * MIB))


@pytest.mark.parametrize("text", ["max_split_size_mb:40", "expandable_segments:True,max_split_size_mb:40", ""])
def test_after_an_error_freed_memory_is_usable_again(text):
    # test/test_cuda.py, test_max_split_expandable: 120 MiB allowed, three blocks of 40 MiB, a fourth fails; when they
    # are freed, one of 120 MiB fits
    replayed = allocator(f"per_process_memory_fraction:0.5,{text}", total_bytes=240 * MIB)
    spans = [replayed.malloc(40 * MIB) for _ in range(3)]
    with pytest.raises(OutOfMemory, match="out of memory") as error:
        replayed.malloc(40 * MIB)
    assert (error.value.asked, error.value.tried) == (40 * MIB, 40 * MIB)
    assert (error.value.allocated, error.value.reserved) == (120 * MIB, 120 * MIB)
    assert (replayed.num_ooms, replayed.num_alloc_retries) == (1, 1)
    for span in spans:
        replayed.free(span)
    assert replayed.malloc(120 * MIB).size == 120 * MIB


def test_half_of_the_memory_twice_fails_until_the_first_is_freed():
    # test/test_cuda.py, test_out_of_memory_retry; the context takes the rest, so two halves never fit
    replayed = allocator(memory_bytes=15 * GIB, total_bytes=16 * GIB)
    first = replayed.malloc(8 * GIB)
    with pytest.raises(OutOfMemory):
        replayed.malloc(8 * GIB)
    replayed.free(first)
    assert replayed.malloc(8 * GIB).size == 8 * GIB


def test_garbage_collection_runs_before_memory_runs_out():
    # test/test_cuda.py, test_garbage_collect_expandable, without its expandable half: 120 MiB allowed, collected from
    # 60 MiB on; a block of 80 MiB comes after two of 40 MiB were freed
    replayed = allocator("garbage_collection_threshold:0.5,per_process_memory_fraction:0.5", total_bytes=240 * MIB)
    for span in [replayed.malloc(40 * MIB) for _ in range(2)]:
        replayed.free(span)
    replayed.malloc(80 * MIB)
    assert (replayed.reserved, replayed.num_alloc_retries) == (80 * MIB, 0)
