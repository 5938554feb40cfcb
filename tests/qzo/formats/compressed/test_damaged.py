"""Damaged checkpoints of compressed-tensors: refused in one line, or sound; never a traceback, a hang or gigabytes."""

import random

import pytest
from cases_compressed import CASES
from mutations import mutate, refused_of
from tiny_models import write_plain

from qzo import load
from qzo.checkpoints.inspect import inspect

pytest.importorskip("compressed_tensors")


def test_mutations_of_header_and_configuration_never_crash(tmp_path):
    case, dice = next(case for case in CASES if case.family == "llama"), random.Random("compressed")
    case.write(write_plain("llama", tmp_path / "plain"), tmp_path / "model")
    folder = tmp_path / "model"
    assert 100 < refused_of(folder, 200, lambda _: mutate(folder, dice), load, inspect) < 200
