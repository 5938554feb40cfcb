"""Regular expressions that come with a checkpoint: the same answers as `re`, and none that takes for ever."""

import re

import pytest

from qzo import QzoError
from qzo.files.patterns import Pattern
from qzo.formats.compressed.schemes import schemes_of

NAMES = ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.experts.3.down_proj")


@pytest.mark.parametrize(
    "text",
    [r".*\.mlp\..*", r"model\.layers\.(0|1)\..*\.(q|k)_proj$", "lm_head", r"model.layers.1\d", "(?!lm)", ""],
)
def test_a_name_matches_from_its_start_as_with_re(text):
    assert [Pattern(text).matches(name) for name in NAMES] == [re.match(text, name) is not None for name in NAMES]


def test_a_prefix_is_no_part_of_the_expression():
    assert Pattern("-:lm", "-:", "+:").matches("lm_head") and not Pattern("-:lm").matches("lm_head")


@pytest.mark.parametrize("text", ["(", "[z-a]", "*", "(" * 900 + ")" * 900, "a" * 1001])
def test_what_is_none_or_far_too_long_is_refused(text):
    with pytest.raises(QzoError, match=r"no regular expression|no more than 1,000"):
        Pattern(text)


def test_repeats_that_nest_end_in_time():
    group = {"targets": ["re:((.|..)+)+(?<!j)$"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
    schemes = schemes_of({"format": "pack-quantized", "config_groups": {"group_0": group}})
    with pytest.raises(QzoError, match=r"takes more than 0.5 s over the name model.layers.10.mlp"):
        schemes.of(NAMES[2])


def test_names_of_layers_have_a_bound():
    groups = {"group_0": {"targets": ["Linear"] * 10_001, "weights": {}}}
    with pytest.raises(QzoError, match="targets has 10,001 names"):
        schemes_of({"config_groups": groups})
