"""When memory runs short: which blocks the allocator gives back, in which order, and what the replay says of it."""

import pytest

from bench.ledger.ledger import Ledger
from bench.simulator.allocator.replay import (
    MIB,
    SMALL_SEGMENT,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemory,
    replay,
)
from qzo.errors import QzoError


def allocator(text="", memory=None, total=None):
    """Memory in MiB."""
    memory, total = (None if size is None else size * MIB for size in (memory, total))
    return CachingAllocator(AllocatorSettings.parse(text), memory, total)


def cached(allocator):
    """Free spans of the large pool in MiB, smallest first."""
    return [span.size // MIB for span in allocator.pools[0]]


def malloc_all(allocator, *mebibytes):
    return [allocator.malloc(size * MIB) for size in mebibytes]


def free_all(allocator, spans):
    for span in spans:
        allocator.free(span)


def test_all_whole_free_segments_are_given_back_before_the_second_try():
    replayed = allocator(memory=100)
    spans = malloc_all(replayed, 30, 5, 40)  # the 5 MiB are in a segment of 20
    free_all(replayed, [spans[0], spans[2]])
    replayed.malloc(60 * MIB)
    assert (replayed.reserved, replayed.num_alloc_retries) == (80 * MIB, 1)
    assert cached(replayed) == [15]  # what is left of a segment that is partly in use


def test_out_of_memory_says_what_was_asked_and_leaves_the_allocator_usable():
    replayed = allocator(memory=50)
    replayed.malloc(30 * MIB)
    with pytest.raises(OutOfMemory, match=r"a request of 22020095 bytes needs 22 MiB more; 30.0 MiB are allocated"):
        replayed.malloc(21 * MIB - 1)
    assert (replayed.num_ooms, replayed.num_alloc_retries, replayed.reserved) == (1, 1, 30 * MIB)
    replayed.malloc(20 * MIB)
    assert replayed.reserved == 50 * MIB  # memory can be used up to the last byte


def test_one_oversize_block_that_is_large_enough_is_released_and_nothing_else():
    replayed = allocator("max_split_size_mb:40", memory=300)
    free_all(replayed, malloc_all(replayed, 30, 50, 80, 120))
    replayed.malloc(70 * MIB)  # takes the 80, which are less than 20 MiB more
    assert (cached(replayed), replayed.reserved) == ([30, 50, 120], 280 * MIB)
    replayed.malloc(42 * MIB)
    assert cached(replayed) == [30, 120]  # the 50 were taken
    replayed.malloc(98 * MIB)  # 120 is too large to be taken, and too large to stay
    assert (cached(replayed), replayed.reserved) == ([30], 258 * MIB)
    assert replayed.num_alloc_retries == 0


def test_smaller_requests_release_an_oversize_block_too():
    replayed = allocator("max_split_size_mb:40", memory=100)
    free_all(replayed, malloc_all(replayed, 30, 60))
    replayed.malloc(32 * MIB)
    assert (cached(replayed), replayed.reserved, replayed.num_alloc_retries) == ([30], 62 * MIB, 0)


def test_several_oversize_blocks_are_released_from_the_largest_on_until_it_is_enough():
    replayed = allocator("max_split_size_mb:40", memory=240)
    free_all(replayed, malloc_all(replayed, 30, 40, 50, 60))
    replayed.malloc(100 * MIB)  # 60 and 50 make room
    assert (cached(replayed), replayed.reserved, replayed.num_alloc_retries) == ([30, 40], 170 * MIB, 0)


def test_when_oversize_blocks_are_not_enough_everything_free_is_released():
    replayed = allocator("max_split_size_mb:40", memory=190)
    free_all(replayed, malloc_all(replayed, 30, 20, 60, 70))
    replayed.malloc(150 * MIB)
    assert (cached(replayed), replayed.reserved, replayed.num_alloc_retries) == ([], 150 * MIB, 1)


def test_released_oversize_blocks_must_hold_the_whole_request_whatever_else_is_free():
    replayed = allocator("max_split_size_mb:40", memory=200)
    free_all(replayed, malloc_all(replayed, 120, 30, 40)[1:])
    replayed.malloc(50 * MIB)  # the 40 and the 10 that nobody has would do, but only the 40 count
    assert (cached(replayed), replayed.reserved, replayed.num_alloc_retries) == ([], 170 * MIB, 1)


@pytest.mark.parametrize(("size", "reused"), [(218, True), (220, False)])
def test_an_oversize_block_may_exceed_the_request_by_less_than_the_rounding(size, reused):
    replayed = allocator("max_split_size_mb:200")
    free_all(replayed, malloc_all(replayed, size))
    assert replayed.malloc(200 * MIB).size == (size if reused else 200) * MIB


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (60, 70, [62]),  # 256 reserved, 56 too much: the oldest is enough
        (30, 90, []),  # 246 reserved, 46 too much: the oldest is not enough, the next one goes, too
    ],
)
def test_garbage_collection_releases_the_oldest_first(first, second, left):
    # 800 MiB, half of them allowed, collected from half of these on. An age is the number of searches since the block
    # was freed: 2 for the first, 1 for the one of 62 MiB.
    replayed = allocator("garbage_collection_threshold:0.5,per_process_memory_fraction:0.5", memory=800)
    oldest, newer, _ = malloc_all(replayed, first, 62, 64)
    replayed.free(oldest)
    replayed.malloc(second * MIB)
    replayed.free(newer)
    replayed.malloc(92 * MIB)
    assert (cached(replayed), replayed.num_alloc_retries) == (left, 0)


def test_garbage_is_not_collected_without_a_fraction():
    replayed = allocator("garbage_collection_threshold:0.1", memory=800)
    free_all(replayed, malloc_all(replayed, 200, 210))
    replayed.malloc(220 * MIB)
    assert cached(replayed) == [200, 210]


def test_a_fraction_is_one_of_the_gpus_memory():
    assert allocator("per_process_memory_fraction:0.5", memory=60, total=200).malloc(60 * MIB)
    with pytest.raises(OutOfMemory):
        allocator("per_process_memory_fraction:0.5", memory=60).malloc(32 * MIB)
    with pytest.raises(QzoError, match="pass memory_bytes"):
        allocator("per_process_memory_fraction:0.5")


def test_expandable_segments_prefer_a_block_that_cannot_grow():
    replayed = allocator("expandable_segments:True")
    first, _, last = malloc_all(replayed, 30, 2, 25)
    free_all(replayed, [first, last])  # 30 MiB between others; 28 MiB at the end, which could grow
    assert (cached(replayed), replayed.reserved) == ([28, 30], 60 * MIB)
    assert replayed.malloc(26 * MIB).address == first.address


def test_expandable_segments_grow_by_what_is_missing_and_shrink_by_whole_pages():
    replayed = allocator("expandable_segments:True")
    spans = malloc_all(replayed, 30, 10, 60)
    assert (replayed.reserved, replayed.inactive_split) == (100 * MIB, 0)
    assert [span.address - spans[0].address for span in spans] == [0, 30 * MIB, 40 * MIB]
    free_all(replayed, spans[::2])
    replayed.empty_cache()  # 20 to 40 MiB hold the 10 that are used
    assert (replayed.reserved, cached(replayed)) == (20 * MIB, [10])
    assert replayed.malloc(30 * MIB).address == spans[0].address  # lowest addresses first, one page before the 10
    assert replayed.reserved == 40 * MIB
    replayed.malloc(1)
    assert replayed.reserved == 40 * MIB + SMALL_SEGMENT


def test_pages_mapped_before_memory_ran_out_count_as_reserved():
    replayed = allocator("expandable_segments:True", memory=80)
    hole, rest = malloc_all(replayed, 20, 20)
    replayed.free(hole)
    replayed.empty_cache()
    free_all(replayed, [rest, *(replayed.malloc(MIB) for _ in range(30))])
    assert replayed.reserved == 50 * MIB
    replayed.malloc(60 * MIB)  # the page of the hole is mapped, one more after the rest is not; then all begins anew
    assert (replayed.reserved, replayed.peak_reserved, replayed.num_alloc_retries) == (60 * MIB, 70 * MIB, 1)


def test_an_expandable_segment_has_addresses_for_nine_eighths_of_the_memory():
    replayed = allocator("expandable_segments:True", total=160)
    spans = malloc_all(replayed, 100, 80, 20)
    assert spans[1].address == spans[0].address + 100 * MIB
    assert spans[2].base != spans[1].base == spans[0].base


def ledger_of(*events):
    """Positive numbers are MiB allocated, negative ones the position of what is released, from 1 on."""
    ledger, blocks = Ledger("cpu", 512), []
    for event in events:
        if event > 0:
            blocks.append(ledger.allocate(event * MIB))
        else:
            ledger.release(blocks[-event - 1])
    return ledger


def test_replay_tells_fragmentation_at_the_peak_of_reserved():
    replayed = replay(ledger_of(5, 5, -1, 50, -2, -3))  # 5 MiB of the 20 MiB segment are used when 50 more come
    assert (replayed.peak_reserved, replayed.allocated_at_peak_reserved) == (70 * MIB, 55 * MIB)
    assert (replayed.fragmentation, replayed.inactive_split_at_peak_reserved) == (15 * MIB, 15 * MIB)
    assert replayed.num_alloc_retries == 0


def test_replay_counts_what_a_phase_begins_with():
    ledger = Ledger("cpu", 512)
    block = ledger.allocate(30 * MIB)
    ledger.enter("step")
    ledger.release(block)
    assert replay(ledger).phase_peaks == {"load": 30 * MIB, "step": 30 * MIB}


def test_replay_with_a_limit_retries_and_keeps_the_peak_from_before():
    ledger = ledger_of(30, 40, -1, -2, 50)
    assert replay(ledger).peak_reserved == 120 * MIB
    limited = replay(ledger, memory_bytes=80 * MIB)
    assert (limited.peak_reserved, limited.allocated_at_peak_reserved, limited.num_alloc_retries) == (
        70 * MIB, 70 * MIB, 1
    )  # fmt: skip
    with pytest.raises(OutOfMemory):
        replay(ledger, memory_bytes=60 * MIB)
    expandable = replay(ledger, AllocatorSettings(expandable_segments=True), memory_bytes=80 * MIB)
    assert (expandable.peak_reserved, expandable.num_alloc_retries) == (80 * MIB, 0)
