"""Freed memory stays with the process where that is asked for."""

import os
import platform
import subprocess
import sys

import pytest

from qzo.kernels import heap

FAULTS = """
import ctypes, resource, sys, torch
from qzo.kernels.heap import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
else:  # the limits that glibc starts with; what was freed before this would have moved them
    for limit in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(limit, 128 << 10)
def turn():
    blocks = [torch.ones(1 << 20) for _ in range(3)]  # 4 MiB each, far below 64 MiB with what imports left free
for _ in range(10):  # the heap grows until blocks fit around what lives between them
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in heap.SETTLED}
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment | variables)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are those of glibc")
def test_blocks_that_are_freed_and_needed_again_cause_no_page_faults():
    assert page_faults("keep") < 1_100  # a block at most; it is none as a rule
    assert page_faults("leave") > 10_000  # or this test shows nothing


def test_limits_that_the_environment_sets_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not heap.keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not heap.keep_freed_memory()
