"""Random streams of requests: what must hold after every event, a slow twin, and (marked cuda) a real allocator."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from bench.simulator.allocator.replay import MIB, AllocatorSettings, CachingAllocator, OutOfMemory
from bench.simulator.allocator.spans import Device

GIB = 1 << 30
FRACTION = "per_process_memory_fraction:0.25"  # of 2 GiB
SETTINGS = [
    "",
    "expandable_segments:True",
    "max_split_size_mb:32",
    "max_split_size_mb:32,expandable_segments:True",
    "roundup_power2_divisions:[4:2,16:4,>:8]",
    "large_segment_size_mb:30,max_split_size_mb:40,max_non_split_rounding_mb:64",
    "large_segment_size_mb:30,expandable_segments:True,roundup_power2_divisions:2",
    FRACTION,
    f"{FRACTION},garbage_collection_threshold:0.6",
    f"{FRACTION},garbage_collection_threshold:0.3,max_split_size_mb:40,roundup_power2_divisions:4",
    f"{FRACTION},garbage_collection_threshold:0.6,expandable_segments:True,max_split_size_mb:64",
]
MEMORY = [None, 300 * MIB]


def stream(seed, length):
    """Events ("malloc", bytes), ("free", which of the live ones) and now and then ("empty",)."""
    rng = random.Random(seed)
    popular = [int(2 ** rng.uniform(5, 26)) for _ in range(6)]  # equal sizes, so that addresses decide
    crowd, live, events = rng.choice([8, 30, 60]), 0, []
    for _ in range(length):
        if live and rng.random() < (0.7 if live > crowd else 0.35):
            events.append(("free", rng.randrange(live)))
            live -= 1
        elif rng.random() < 0.01:
            events.append(("empty",))
        else:
            events.append(("malloc", rng.choice(popular) if rng.random() < 0.5 else int(2 ** rng.uniform(0, 27))))
            live += 1
    return events


def play(allocator, events):
    """Run the events; after each yield (event, new span or None, live spans). A request that fails is left out."""
    live = []
    for event in events:
        span = None
        if event[0] == "malloc":
            try:
                span = allocator.malloc(event[1])
                live.append(span)
            except OutOfMemory:
                pass
        elif event[0] == "empty":
            allocator.empty_cache()
        elif live:
            allocator.free(live.pop(event[1] % len(live)))
        yield event, span, live


def chains(allocator, live):
    """Each segment as its spans in the order of their addresses."""
    spans = list(live)
    for pool in allocator.pools:
        spans += [*pool, *(pool.at(address) for address in pool.unmapped)]
    found = []
    for span in sorted(spans, key=lambda item: item.address):
        if span.before is None:
            chain = [span]
            while chain[-1].after is not None:
                chain.append(chain[-1].after)
            found.append(chain)
    assert sorted(map(id, spans)) == sorted(id(span) for chain in found for span in chain)
    return found


def mapped_runs(chain):
    """What torch.cuda.memory_snapshot shows of a segment: its ranges with memory behind them."""
    runs = [[]]
    for span in chain:
        if span.mapped:
            runs[-1].append(span)
        else:
            runs.append([])
    return [run for run in runs if run]


def check(allocator, live, memory_bytes, total_bytes):
    settings = allocator.settings
    large = settings.large_segment_size_mb * MIB
    end = reserved = stuck = 0
    for chain in chains(allocator, live):
        assert chain[0].address >= end  # segments do not overlap
        for span, after in zip(chain, [*chain[1:], None], strict=True):
            end = span.address + span.size
            assert span.size > 0 and span.size % 512 == 0 and span.pool is chain[0].pool
            if after is not None:
                assert after.before is span and after.address == end
                assert span.used or after.used or span.mapped != after.mapped  # free neighbours are merged
        for run in mapped_runs(chain):
            nbytes = sum(span.size for span in run)
            reserved += nbytes
            page = 2 * MIB if run[0].pool.small else large
            if settings.expandable_segments:
                assert nbytes % page == 0 and (run[0].address - chain[0].address) % page == 0
            else:
                assert nbytes == page or (page == large and nbytes >= 10 * MIB and nbytes % (2 * MIB) == 0)
                stuck += sum(span.size for span in run if not span.used and len(run) > 1)
    assert all(span.used and span.mapped for span in live)
    assert allocator.allocated == sum(span.size for span in live) <= allocator.reserved == reserved
    assert allocator.inactive_split == stuck
    assert allocator.peak_reserved >= reserved
    assert memory_bytes is None or reserved <= memory_bytes
    if not settings.expandable_segments:  # a page can be larger than the segment that was asked for
        assert reserved <= settings.per_process_memory_fraction * (total_bytes or reserved)
    for pool in allocator.pools:
        assert pool.free == sorted(pool.free) and pool.unmapped == sorted(pool.unmapped)


@pytest.mark.parametrize("memory_bytes", MEMORY)
@pytest.mark.parametrize("text", SETTINGS)
def test_after_every_event_the_blocks_tile_their_segments(text, memory_bytes):
    settings = AllocatorSettings.parse(text)
    retries = 0
    for seed in range(8):
        allocator = CachingAllocator(settings, memory_bytes, 2 * GIB)
        for event, span, live in play(allocator, stream(seed, 150)):
            check(allocator, live, memory_bytes, 2 * GIB)
            if event[0] == "malloc":
                assert span is None or span.size >= settings.rounded(event[1])
        retries += allocator.num_alloc_retries
        assert allocator.num_ooms <= allocator.num_alloc_retries
        for span in live:
            allocator.free(span)
        check(allocator, [], memory_bytes, 2 * GIB)
        assert allocator.allocated == allocator.inactive_split == 0
        allocator.empty_cache()
        assert allocator.reserved == 0 and not chains(allocator, [])
    assert retries > 0 or memory_bytes is None


@pytest.mark.parametrize("text", SETTINGS)
def test_identical_streams_give_identical_results(text):
    settings = AllocatorSettings.parse(text)
    traces = []
    for _ in range(2):
        allocator = CachingAllocator(settings, 300 * MIB, 2 * GIB)
        played = play(allocator, stream(5, 400))
        traces.append([(span and span.address, allocator.allocated, allocator.reserved) for _, span, _ in played])
    assert traces[0] == traces[1]


class Twin:
    """Default settings and a memory limit, by looking at every block: segments are lists of [address, size, used]."""

    def __init__(self, memory_bytes):
        self.segments, self.memory_bytes, self.lowest, self.retries = [], memory_bytes, 1 << 60, 0

    def reserved(self):
        return sum(size for segment in self.segments for _, size, _ in segment)

    def empty(self):
        self.segments = [segment for segment in self.segments if len(segment) > 1 or segment[0][2]]

    def small(self, segment):
        return sum(size for _, size, _ in segment) == 2 * MIB

    def malloc(self, nbytes):
        size = max(-(-nbytes // 512) * 512, 512)
        small = size <= MIB
        fits = [
            (block[1], block[0], block, segment) for segment in self.segments if self.small(segment) == small
            for block in segment if not block[2] and block[1] >= size
        ]  # fmt: skip
        if not fits:
            new = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.memory_bytes is not None and self.reserved() + new > self.memory_bytes:
                self.empty()
                self.retries += 1
                if self.reserved() + new > self.memory_bytes:
                    return None
            self.lowest -= new
            self.segments.append([[self.lowest, new, False]])
            fits = [(new, self.lowest, self.segments[-1][0], self.segments[-1])]
        _, address, block, segment = min(fits, key=lambda fit: fit[:2])
        rest = block[1] - size
        if rest >= 512 if small else rest > MIB:
            segment.insert(segment.index(block) + 1, [address + size, rest, False])
            block[1] = size
        block[2] = True
        return address

    def free(self, address):
        segment = next(segment for segment in self.segments if any(block[0] == address for block in segment))
        next(block for block in segment if block[0] == address)[2] = False
        for index in range(len(segment) - 1, 0, -1):
            if not segment[index][2] and not segment[index - 1][2]:
                segment[index - 1][1] += segment.pop(index)[1]


@pytest.mark.parametrize("memory_bytes", MEMORY)
def test_the_slow_twin_chooses_the_same_blocks(memory_bytes):
    for seed in range(100, 112):
        allocator, twin, addresses = CachingAllocator(None, memory_bytes), Twin(memory_bytes), []
        for event, span, _ in play(allocator, stream(seed, 250)):
            if event[0] == "malloc":
                address = twin.malloc(event[1])
                assert (span and span.address) == address
                addresses += [address] if address else []
            elif event[0] == "empty":
                twin.empty()
            elif addresses:
                twin.free(addresses.pop(event[1] % len(addresses)))
            assert (allocator.reserved, allocator.num_alloc_retries) == (twin.reserved(), twin.retries)


CHILD = """
import json, sys, torch
live, seen = [], []
for event in json.load(sys.stdin):
    pointer = None
    if event[0] == "malloc":
        try:
            live.append(torch.empty(event[1], dtype=torch.uint8, device="cuda"))
            pointer = live[-1].data_ptr()
        except torch.OutOfMemoryError:
            pass
    elif event[0] == "empty":
        torch.cuda.empty_cache()
    elif live:
        live.pop(event[1] % len(live))
    stats = torch.cuda.memory_stats()
    names = ["allocated_bytes.all.current", "reserved_bytes.all.current", "inactive_split_bytes.all.current"]
    seen.append([pointer, *(stats.get(name, 0) for name in [*names, "num_alloc_retries", "num_ooms"])])
segments = [[s["address"], [[b["size"], b["state"] == "active_allocated"] for b in s["blocks"]]]
            for s in torch.cuda.memory_snapshot()]
json.dump([seen, sorted(segments)], sys.stdout)
"""


def on_the_gpu(text, events):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    environment["PYTORCH_ALLOC_CONF"] = text
    command = [sys.executable, "-c", CHILD]
    ran = subprocess.run(command, input=json.dumps(events), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def compare_with(seen, segments, settings, events, total_bytes, monkeypatch):
    """Replay the events and compare after each. A new segment gets the address it had: its first block's."""
    pointers = []
    monkeypatch.setattr(Device, "addresses", lambda device, nbytes: pointers[-1])
    allocator = CachingAllocator(settings, None, total_bytes)
    played = play(allocator, events)
    for index, expected in enumerate(seen):
        pointers.append(expected[0])
        event, span, live = next(played)
        counted = [allocator.allocated, allocator.reserved, allocator.inactive_split]
        replayed = [span and span.address, *counted, allocator.num_alloc_retries, allocator.num_ooms]
        assert replayed == expected, f"event {index}, {event}"
    runs = [run for chain in chains(allocator, live) for run in mapped_runs(chain)]
    assert [[run[0].address, [[span.size, span.used] for span in run]] for run in runs] == segments


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "text",
    [
        "", "expandable_segments:True", "max_split_size_mb:32", "roundup_power2_divisions:[4:2,16:4,>:8]",
        "fraction", "fraction,garbage_collection_threshold:0.6", "fraction,expandable_segments:True",
        "fraction,max_split_size_mb:32", "fraction,max_split_size_mb:32,expandable_segments:True",
    ],
)  # fmt: skip
def test_a_real_allocator_does_the_same_event_by_event(text, monkeypatch):
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    text = text.replace("fraction", f"per_process_memory_fraction:{500 * MIB / total_bytes:.6f}")
    events = [event for seed in range(4) for event in stream(seed, 400)]
    seen, segments = on_the_gpu(text, events)
    compare_with(seen, segments, AllocatorSettings.parse(text), events, total_bytes, monkeypatch)
