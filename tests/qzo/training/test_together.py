"""`torchrun -m qzo train`: the run of one process to the bit, whatever rank is killed, and errors that are told."""

import random

import pytest
from torchrun_runs import contents, killed, make_run, run, torchrun


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("together"))


def test_several_processes_write_the_run_that_one_writes(made, tmp_path):
    options, alone = made
    done = run(torchrun(3, [*options, "--out", str(tmp_path / "run")]))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == alone
    assert done.stdout.count("best step") == 1  # of rank 0


def test_a_rank_that_is_killed_comes_back_and_the_run_ends_the_same(made, tmp_path):
    options, alone = made
    journal = tmp_path / "run" / "run.journal"

    def two_steps_are_taken():
        return journal.exists() and journal.read_bytes().count(b"\n") > 2

    code, was_there, told = killed(
        2, [*options, "--out", str(tmp_path / "run")], random.randrange(2), two_steps_are_taken
    )
    assert code == 0 and was_there, told
    assert contents(tmp_path / "run") == alone


def test_a_method_with_gradients_is_refused_on_all_ranks(made, tmp_path):
    options, _ = made
    done = run(torchrun(2, [*options, "--method", "qlora", "--out", str(tmp_path / "run")]))
    assert "error: qlora has gradients to exchange" in done.stderr and done.returncode != 0
    assert not (tmp_path / "run").exists()
