"""Which layer has which scheme: as the library matches targets; and what is refused, each for its own reason."""

from __future__ import annotations

import json
import random

import pytest
from cases_compressed import group

from qzo import QzoError
from qzo.formats.compressed.schemes import schemes_of

PARTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{number}.{part}" for number in (0, 1, 11) for part in PARTS]
NAMES = [
    *("Linear", "Module", "LlamaMLP", "model.layers.1.mlp.up_proj", "q_proj", "re:.*q_proj", "re:model\\.layers\\.1"),
    *("re:.*mlp", "re:mlp", "re:.*layers\\.[01]\\.", "re:.*down_proj$"),
]


def settings(*groups, **more):
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return {"config_groups": named, "format": "pack-quantized", "ignore": [], **more}


def test_targets_and_ignored_layers_are_matched_as_the_library_does():
    match = pytest.importorskip("compressed_tensors.utils.match", reason="needs compressed-tensors")
    from torch import nn

    dice, seen = random.Random(0), set()
    for _ in range(300):
        groups = [group(bits, targets=dice.sample(NAMES, dice.randint(1, 3))) for bits in (2, 4, 8)]
        ignore, path = dice.sample(NAMES[3:], dice.randint(0, 2)), dice.choice(PATHS)
        module = nn.Linear(2, 2)
        targets = {name: own["weights"]["num_bits"] for own in groups for name in own["targets"]}
        found = match.match_targets(path, module, targets)
        expected = None
        if found and not match.is_match(path, module, ignore):
            expected = targets[found[0]]
        try:
            bits = schemes_of(settings(*groups, ignore=ignore)).of(path).n_bits
        except QzoError as error:
            assert expected is None and "it has codes, but" in str(error)
            bits = None
        assert bits == expected, (groups, ignore, path)
        seen.add(bits)
    assert seen == {None, 2, 4, 8}


def test_what_the_settings_leave_out_is_what_the_library_takes():
    def scheme(**weights):
        return schemes_of(settings({"targets": ["Linear"], "weights": weights})).of("a")

    usual = scheme()
    assert (usual.n_bits, usual.symmetric, usual.strategy, usual.format) == (8, True, "tensor", "pack-quantized")
    assert (scheme(group_size=-1).strategy, scheme(group_size=32).strategy) == ("channel", "group")
    own = schemes_of(settings({**group(8, format="int-quantized"), "targets": ["Linear"]}, format="mixed-precision"))
    assert own.of("a").format == "int-quantized"
    for order, ordered in (("group", True), ("dynamic", True), (True, True), ("weight", False), (None, False)):
        assert scheme(num_bits=4, group_size=32, actorder=order).ordered == ordered


INT8 = {"num_bits": 8, "type": "int", "strategy": "token"}
REFUSED = {
    "input_activations are rounded too, anew in each forward (dynamic)": settings(
        {**group(8), "input_activations": {**INT8, "dynamic": True}}
    ),
    "input_activations are rounded too, anew in each forward (dynamic) ": settings(
        {**group(8), "input_activations": {**INT8, "dynamic": "local"}}
    ),
    "group_1: input_activations are quantized too, with fixed scales": settings(
        group(4, 32), {**group(8), "input_activations": {**INT8, "dynamic": False}}
    ),
    "output_activations are quantized too, with fixed scales": settings(
        {**group(8), "output_activations": {**INT8, "dynamic": False}}
    ),
    "kv_cache_scheme: keys and values are quantized too": settings(group(4, 32), kv_cache_scheme=INT8),
    'format="float-quantized" is not supported; need pack-quantized': settings(group(8, format="float-quantized")),
    'format="nvfp4-pack-quantized" is not supported': settings({**group(4), "format": "nvfp4-pack-quantized"}),
    'format="mxfp4-pack-quantized" is not supported': settings({**group(4), "format": "mxfp4-pack-quantized"}),
    'format="marlin-24" is not supported': settings({**group(4), "format": None}, format="marlin-24"),
    "sparsity_config: sparse and rotated weights": settings(
        group(4), sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    ),
    "transform_config: sparse and rotated weights": settings(group(4), transform_config={"config_groups": {"u": {}}}),
    "weights of type float with 8 bits are not supported in naive-quantized": settings(
        group(8, type="float", format="naive-quantized")
    ),
    "weights of type int with 3 bits are not supported in pack-quantized; need int with 2, 4, 8": settings(group(3)),
    "weights of type int with 4.0 bits": settings(group(4.0)),
    'strategy="block" is not supported; need group, channel, tensor': settings(group(8, strategy="block")),
    'strategy="tensor_group" is not supported': settings(group(4, 16, strategy="tensor_group")),
    "group_size=0 is not a positive number": settings(group(4, 0)),
    "symmetric=3 is neither": settings(group(4, symmetric=3)),
    "there are no scales to train": settings(group(8, dynamic=True)),
    "'re:(' is no regular expression": settings(group(4, targets=["re:("])),
    "ignore is not a list of names": settings(group(4), ignore="lm_head"),
    "targets is not a list of names": settings({"weights": {}}),
    "config_groups is not a JSON object with groups": {"format": "pack-quantized"},
    "config_groups: W4A16: it is not a JSON object": {"config_groups": {"W4A16": ["Linear"]}},
    "weights is not a JSON object": settings({"targets": [], "weights": 3}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(message):
    with pytest.raises(QzoError) as caught:
        schemes_of(json.loads(json.dumps(REFUSED[message])))
    assert message.strip() in str(caught.value) and "\n" not in str(caught.value)


def test_what_quantizes_nothing_and_dense_sparsity_are_read():
    left = {"targets": ["re:.*up_proj"], "weights": None}
    found = schemes_of(settings(left, group(4), sparsity_config={"format": "dense"}))
    assert found.of("a").n_bits == 4
    with pytest.raises(QzoError, match="no config group quantizes the weights"):
        found.of("up_proj")
