"""Jobs in processes beside each other, or in this one."""

import os

import pytest

from bench.worlds.workers import VARIABLE, count, workers
from qzo import QzoError


def pid_and(number):
    return os.getpid(), number


def test_jobs_are_done_in_processes_of_their_own_and_answered_in_order(monkeypatch):
    monkeypatch.setenv(VARIABLE, "2")
    with workers(5) as in_order:
        answers = list(in_order(pid_and, range(5)))
    assert [number for _, number in answers] == list(range(5))
    assert os.getpid() not in {pid for pid, _ in answers}


@pytest.mark.parametrize(("value", "jobs"), [("1", 5), ("8", 1), ("", 1)])
def test_one_process_is_this_one(monkeypatch, value, jobs):
    monkeypatch.setenv(VARIABLE, value)
    with workers(jobs) as in_order:
        assert list(in_order(pid_and, range(3))) == [(os.getpid(), number) for number in range(3)]


@pytest.mark.parametrize(("value", "jobs", "processes"), [("", 9, 2), ("8", 9, 8), ("8", 3, 3), ("1", 9, 1)])
def test_there_are_as_many_as_asked_for_and_no_more_than_jobs(monkeypatch, value, jobs, processes):
    monkeypatch.setenv(VARIABLE, value)
    assert count(jobs) == processes


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "\u0662", " 2"])
def test_what_is_no_number_of_processes_is_one_line(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(QzoError, match=r"QZO_BENCH_WORKERS=.* give a whole number from 1"):
        count(2)
