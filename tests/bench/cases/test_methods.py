"""A method is one row of the table and one function; every list of names is read off the rows."""

from inspect import getdoc

import pytest

from bench import methods as functions
from bench.cases import methods as names
from bench.cases.case import BenchCase
from bench.worlds.plan import parse_methods


def test_every_row_has_a_function_and_every_function_a_row():
    assert list(functions.METHODS) == [method.name for method in names.TABLE]
    assert len(set(functions.METHODS.values())) == len(names.BY_NAME) == len(names.TABLE)


@pytest.mark.parametrize("method", names.TABLE, ids=lambda method: method.name)
def test_a_row_is_all_that_a_case_and_a_command_line_ask_for(method):
    assert BenchCase("opt-125m", method.name).first_order == method.first_order
    assert parse_methods(method.name) == (method.name,)
    assert (method.name in parse_methods(None)) == method.by_default
    assert getdoc(functions.METHODS[method.name])  # `bench list methods` shows its first line


def test_the_lists_are_those_of_the_rows():
    assert names.METHODS == (
        "ft-bf16", "ft-mixed", "ft-amp", "ft-sgd", "lora", "qlora", "qlora-lean", "peqa-lean", "mezo", "qzo",
        "qzo-full", "qzo-2bit",
    )  # fmt: skip
    released = ("mezo-reference", "qzo-reference", "qzo-2bit-reference")
    assert ("lora-fa", "dora", "prefix", "peqa", *released) == names.EXTRA_METHODS
    assert ("mezo", "qzo", "qzo-full", "qzo-2bit", *released) == names.ZEROTH_ORDER
    assert names.BASELINES == ("ft-bf16", "ft-mixed", "ft-amp")
    assert names.QUANTIZABLE == ("qzo", "qzo-full")


def test_smaller_methods_are_of_the_same_kind_and_the_nearest_comes_first():
    assert names.smaller_methods("ft-amp") == ("ft-mixed", "ft-bf16", "ft-sgd", "lora", "qlora", "qlora-lean")
    assert names.smaller_methods("mezo") == ("qzo", "qzo-full", "qzo-2bit")
    assert names.smaller_methods("qlora-lean") == names.smaller_methods("mezo-reference") == ()
    for method in names.TABLE:
        for smaller in names.smaller_methods(method.name):
            assert names.BY_NAME[smaller].first_order == method.first_order


def test_no_method_that_moves_a_whole_layer_at_once_is_streamed():
    streamed = {method.name for method in names.TABLE if method.streamable}
    assert streamed == {"lora", "qlora", "qlora-lean", "mezo", "qzo", "qzo-full", "qzo-2bit"}
