"""A pytest plugin: the peak allocated bytes of a test on the CPU, as a fixture and as a limit.

    def test_step(peak_memory, benchmark):
        with peak_memory(benchmark) as ledger:   # puts the peak into pytest-benchmark's extra_info
            step()
        assert ledger.peak_bytes() < 24_000_000
        benchmark(step)                          # timed outside, for the ledger slows operations down

    @pytest.mark.limit_memory("24 MB")           # as in pytest-memray; MB is 1000**2, MiB is 1024**2
    def test_step_is_small(): ...

Counted are the storages that PyTorch allocates inside the block or the test body, not what fixtures made before. The
ledger is imported when a test asks for it, so that other test runs do not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.ledger.ledger import Ledger


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, also to `--strict-markers`."""
    config.addinivalue_line(
        "markers", 'limit_memory(size): fail if the peak allocated bytes on the CPU exceed size ("24 MB", "1.5 GiB")'
    )


@pytest.fixture
def peak_memory() -> Callable[..., AbstractContextManager[Ledger]]:
    """`with peak_memory() as ledger:` watches the block; `ledger.peak_bytes()` and `ledger.at_peak()` tell its peak.

    With pytest-benchmark's fixture as argument, `extra_info` gets both, as `peak_allocated_bytes` and `at_peak`.
    """
    return _watch


@contextmanager
def _watch(benchmark: Any = None) -> Iterator[Ledger]:
    from bench.ledger.ledger import Ledger

    with Ledger() as ledger:
        yield ledger
    if benchmark is not None:
        benchmark.extra_info["peak_allocated_bytes"] = ledger.peak_bytes()
        benchmark.extra_info["at_peak"] = ledger.at_peak()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test marked `limit_memory` under a ledger; fail it when its peak is over the limit."""
    marker = item.get_closest_marker("limit_memory")
    if marker is None:
        return (yield)
    limit = _limit_of(marker)
    with _watch() as ledger:
        result = yield
    peak = ledger.peak_bytes()
    if peak > limit:
        roles = ", ".join(f"{role} {nbytes:,}" for role, nbytes in ledger.at_peak().items())
        message = (
            f"peak allocated {peak:,} bytes is over limit_memory({marker.args[0]!r}) = {limit:,}; at the peak: {roles}"
        )
        pytest.fail(message, pytrace=False)
    return result


def _limit_of(marker: pytest.Mark) -> int:
    from bench.ledger.sizes import parse_bytes

    if len(marker.args) != 1 or marker.kwargs or not isinstance(marker.args[0], str):
        pytest.fail('limit_memory takes one size, as in @pytest.mark.limit_memory("24 MB")', pytrace=False)
    try:
        return parse_bytes(marker.args[0])
    except ValueError as error:
        pytest.fail(f"limit_memory: {error}", pytrace=False)
