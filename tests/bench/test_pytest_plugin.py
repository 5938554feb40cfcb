"""The plugin in test runs of its own."""

from __future__ import annotations

import json
from importlib.metadata import distributions
from pathlib import Path

import pytest
import transformers  # noqa: F401 - as the next

import bench.ledger.ledger  # here: pytester forgets what its runs import, and torch does not survive a second import

pytest_plugins = ["pytester"]

# Installed, the plugin is loaded under its entry point's name, and a second name for it would be refused.
# Asked of every distribution, as pytest does: a build leaves a second one of this name in the checkout, qzo.egg-info.
INSTALLED = any(point.name == "qzo-memory" for found in distributions() for point in found.entry_points)
NAME = "qzo-memory" if INSTALLED else "bench.pytest_plugin"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark writes nothing in a worker

    def run(test: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile("import pytest, torch\n\n" + test)
        return pytester.runpytest_inprocess("-p", NAME, "--strict-markers", *options)

    return run


def test_fixture_tells_the_exact_peak_of_its_block(run):
    result = run("""
def test_peak(peak_memory):
    before = torch.zeros(1000)
    with peak_memory() as ledger:
        first = torch.zeros(3000)
        del first
        second = torch.zeros(1000)
    after = torch.zeros(9000)
    assert ledger.peak_bytes() == 12_000
    assert sum(ledger.at_peak().values()) == 12_000
""")
    result.assert_outcomes(passed=1)


def test_fixture_lets_the_error_of_its_block_through(run):
    result = run("""
def test_error(peak_memory):
    with pytest.raises(ZeroDivisionError), peak_memory():
        1 / 0
""")
    result.assert_outcomes(passed=1)


def test_peak_reaches_the_extra_info_of_pytest_benchmark(run, pytester: pytest.Pytester):
    result = run(
        """
def test_step(peak_memory, benchmark):
    with peak_memory(benchmark):
        torch.zeros(1000)
    benchmark(int)
""",
        "--benchmark-json=out.json",
        "--benchmark-min-rounds=1",
        "--benchmark-max-time=0.001",
    )
    result.assert_outcomes(passed=1)
    extra = json.loads((Path(pytester.path) / "out.json").read_text())["benchmarks"][0]["extra_info"]
    assert extra == {"peak_allocated_bytes": 4000, "at_peak": {"temporaries": 4000}}


@pytest.mark.parametrize("limit", ["4 kB", "4KB", "4000B", "3.90625 KiB", "1 GiB"])
def test_at_or_under_the_limit_passes(run, limit):
    run(f"""
@pytest.mark.limit_memory("{limit}")
def test_small():
    torch.zeros(1000)
""").assert_outcomes(passed=1)


def test_one_byte_over_the_limit_fails_and_says_by_what(run):
    result = run("""
@pytest.mark.limit_memory("4000 B")
def test_large():
    torch.zeros(4001, dtype=torch.uint8)
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*peak allocated 4,001 bytes is over limit_memory('4000 B') = 4,000*temporaries 4,001*"]
    )


def test_fixture_setup_does_not_count_against_the_limit(run):
    run("""
@pytest.fixture
def large():
    return torch.zeros(9000)

@pytest.mark.limit_memory("4 KB")
def test_small(large):
    torch.zeros(1000)
""").assert_outcomes(passed=1)


def test_limit_and_fixture_work_in_one_test(run):
    run("""
@pytest.mark.limit_memory("4 KB")
def test_both(peak_memory):
    with peak_memory() as ledger:
        torch.zeros(1000)
    assert ledger.peak_bytes() == 4000
""").assert_outcomes(passed=1)


def test_failure_and_skip_of_the_test_itself_win_over_the_limit(run):
    result = run("""
@pytest.mark.limit_memory("1 B")
def test_wrong():
    torch.zeros(1000)
    assert "its own" == "failure"

@pytest.mark.limit_memory("1 B")
def test_skipped():
    torch.zeros(1000)
    pytest.skip("no reason")
""")
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines(["*its own*"])
    result.stdout.no_fnmatch_line("*over limit_memory*")


@pytest.mark.parametrize("arguments", ['"24"', '"MB"', '"-1 MB"', '"24 MX"', "24", "", '"1 MB", "2 MB"'])
def test_wrong_limit_fails_the_test_before_it_runs(run, arguments):
    result = run(f"""
@pytest.mark.limit_memory({arguments})
def test_never_runs():
    open("ran", "w")
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*limit_memory*"])
    assert not Path("ran").exists()


def test_plugin_alone_does_not_import_torch(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(bench.__file__).parents[1]))
    pytester.makepyfile("import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules")
    pytester.runpytest_subprocess("-p", NAME).assert_outcomes(passed=1)
