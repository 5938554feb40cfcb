"""The replayed caching allocator against the rules that PyTorch documents."""

import pytest

from bench.ledger.ledger import Ledger
from bench.simulator.allocator.replay import LARGE_SEGMENT, MIB, SMALL_SEGMENT, CachingAllocator, replay


@pytest.mark.parametrize(
    ("request_bytes", "allocated", "reserved"),
    [
        (1, 512, SMALL_SEGMENT),
        (512, 512, SMALL_SEGMENT),
        (513, 1024, SMALL_SEGMENT),
        (MIB, MIB, SMALL_SEGMENT),  # the largest small request
        (MIB + 1, MIB + 512, LARGE_SEGMENT),
        (10 * MIB - 512, 10 * MIB - 512, LARGE_SEGMENT),
        (10 * MIB, 10 * MIB, 10 * MIB),  # from here on a segment of its own
        (21 * MIB, 22 * MIB, 22 * MIB),  # rounded to 2 MiB, and the rest is too small to split off
    ],
)
def test_request_sizes_and_segments(request_bytes, allocated, reserved):
    allocator = CachingAllocator()
    allocator.malloc(request_bytes)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_small_requests_share_a_segment_until_it_is_full():
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.malloc(512)
    assert allocator.reserved == SMALL_SEGMENT
    allocator.malloc(512)
    assert allocator.reserved == 2 * SMALL_SEGMENT


def test_a_freed_block_is_reused_and_the_smallest_that_fits_is_chosen():
    allocator = CachingAllocator()
    big, small = allocator.malloc(40 * MIB), allocator.malloc(12 * MIB)
    allocator.free(big)
    allocator.free(small)
    again = allocator.malloc(11 * MIB + 512 * 1024)
    assert again.address == small.address
    assert allocator.reserved == 52 * MIB


def test_of_equal_blocks_the_one_with_the_lower_address_is_reused_and_that_is_the_later_segment():
    allocator = CachingAllocator()
    spans = [allocator.malloc(12 * MIB) for _ in range(2)]
    for span in spans:
        allocator.free(span)
    assert allocator.malloc(12 * MIB).address == spans[1].address < spans[0].address


def test_neighbours_merge_when_freed_in_any_order():
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)):
        allocator = CachingAllocator()
        spans = [allocator.malloc(5 * MIB) for _ in range(3)]
        assert allocator.reserved == LARGE_SEGMENT
        for index in order:
            allocator.free(spans[index])
        whole = allocator.malloc(20 * MIB - 512)
        assert (whole.size, allocator.reserved) == (20 * MIB, LARGE_SEGMENT)


def test_a_remainder_is_split_off_only_when_it_is_worth_it():
    allocator = CachingAllocator()
    first = allocator.malloc(12 * MIB)
    allocator.free(first)
    assert allocator.malloc(11 * MIB).size == 12 * MIB  # a rest of 1 MiB stays with the block
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(14 * MIB))
    assert allocator.malloc(11 * MIB + 512).size == 11 * MIB + 512


def test_fragmentation_makes_reserved_exceed_allocated():
    allocator = CachingAllocator()
    spans = [allocator.malloc(30 * MIB) for _ in range(3)]
    for span in spans[::2]:
        allocator.free(span)
    allocator.malloc(50 * MIB)  # does not fit into either hole
    assert allocator.allocated == 80 * MIB
    assert allocator.reserved == 140 * MIB


def test_replay_counts_what_the_allocator_did_not_split_off_and_resets_its_peak_after_loading():
    ledger = Ledger("cpu", 512)
    loaded = ledger.allocate(200 * MIB)
    ledger.release(loaded)
    ledger.enter("forward")
    blocks = [ledger.allocate(size) for size in (100, 3 * MIB, 201 * MIB)]
    for block in blocks:
        ledger.release(block)
    replayed = replay(ledger)
    assert (
        replayed.peak_allocated == 512 + 3 * MIB + 202 * MIB
    )  # of 202 MiB reserved for the last, 1 MiB is not split off
    assert replayed.phase_peaks == {"load": 200 * MIB, "forward": replayed.peak_allocated}
    assert replayed.peak_reserved == 200 * MIB + SMALL_SEGMENT + 202 * MIB  # the 3 MiB came out of the first segment


def test_on_a_full_card_a_later_phase_has_less_reserved_than_the_one_before():
    ledger = Ledger("cpu", 512)
    for phase, sizes in (("one", (60, 30)), ("two", (70,)), ("three", (10,))):
        ledger.enter(phase)
        for block in [ledger.allocate(size * MIB) for size in sizes]:
            ledger.release(block)
    replayed = replay(ledger, memory_bytes=100 * MIB)
    assert replayed.phase_reserved == {"one": 90 * MIB, "two": 90 * MIB, "three": 70 * MIB}  # two begins with 90
    assert (replayed.num_alloc_retries, replayed.peak_reserved) == (1, 90 * MIB)
