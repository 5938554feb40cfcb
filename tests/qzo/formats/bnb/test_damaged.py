"""Damaged and contradictory bitsandbytes folders: one line, exit code 2, and nothing large allocated."""

import json
import random

import pytest
import torch
from bnb_files import writer
from mutations import configure, mutate, mutated_json, refused_of
from safetensors.torch import load_file, save_file

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect
from qzo.commands.main import main

pytest.importorskip("bitsandbytes")
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATE = f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture
def write(make_model, tmp_path):
    return writer(make_model, tmp_path)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def put(folder, **parts):
    """Replace tensors of one layer; None removes one. A "__" in a name stands for a dot."""
    tensors = tensors_of(folder)
    for part, tensor in parts.items():
        name = f"{Q_PROJ}.{part.replace('__', '.')}"
        tensors.pop(name, None)
        tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def put_state(folder, text):
    put_bytes(folder, torch.tensor(list(text.encode()), dtype=torch.uint8))


def put_bytes(folder, state):
    save_file(tensors_of(folder) | {STATE: state}, folder / "model.safetensors", {"format": "pt"})


def change_state(**changes):
    def change(folder):
        state = json.loads(bytes(tensors_of(folder)[STATE].tolist())) | changes
        put_state(folder, json.dumps(state))

    return change


def lose_state(folder):
    tensors = tensors_of(folder)
    del tensors[STATE]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def floats(*shape):
    return torch.zeros(shape)


def settings(**changes):
    return lambda folder: configure(folder, lambda config: config["quantization_config"].update(changes))


DAMAGE = {
    "quant_state has shape=[4611686018427387904, 2], but config.json implies [64, 64]": change_state(shape=[2**62, 2]),
    "quant_state has shape=[64], not two positive": change_state(shape=[64]),
    "quant_state has shape=[64, -64], not two": change_state(shape=[64, -64]),
    "quant_state has shape=[64, True], not two": change_state(shape=[64, True]),
    "quant_state has blocksize=0; need 32 or 64": change_state(blocksize=0),
    "quant_state has blocksize=64.0; need": change_state(blocksize=64.0),
    "absmax is F32 (64,), but config.json and quant_state imply F32 (128,)": change_state(blocksize=32),
    "quant_state has dtype='os.system'; need float32 or": change_state(dtype="os.system"),
    "quant_state has quant_type='fp4'; need nf4": change_state(quant_type="fp4"),
    "absmax is F32 (64,), but config.json and quant_state imply U8 (64,)": change_state(
        nested_blocksize=256, nested_dtype="float32", nested_offset=0.1
    ),
    "quant_state has nested_blocksize=2; need 256": change_state(nested_blocksize=2, nested_offset=0.1),
    "quant_state has nested_offset=inf, not a finite": change_state(
        nested_blocksize=256, nested_dtype="float32", nested_offset=float("inf")
    ),
    "quant_state is no JSON": lambda folder: put_state(folder, "{"),
    "quant_state is no JSON ": lambda folder: put_state(folder, "[" * 4000),
    "quant_state is not a JSON object": lambda folder: put_state(folder, "[]"),
    "is U8 (5000,); it is no quant_state": lambda folder: put_state(folder, " " * 5000),
    "is U8 (3, 1); it is no quant_state": lambda folder: put_bytes(folder, torch.zeros(3, 1, dtype=torch.uint8)),
    "weight is U8 (2048, 2), but": lambda folder: put(folder, weight=torch.zeros(2048, 2, dtype=torch.uint8)),
    "quant_map is F32 (15,), but": lambda folder: put(folder, weight__quant_map=floats(15)),
    f"{Q_PROJ}.weight.quant_map is missing": lambda folder: put(folder, weight__quant_map=None),
    "it is not quantized to 4 bits, as config.json says": lose_state,
    "weight.nested_absmax is not one of its tensors": lambda folder: put(folder, weight__nested_absmax=floats(1)),
    f"{Q_PROJ}.weight.absmax has 64 numbers of 64 that are NaN": lambda folder: put(
        folder, weight__absmax=floats(64) + torch.nan
    ),
    "is BF16: a CPU kernel of bitsandbytes rewrote it": lambda folder: put(
        folder, weight__absmax=torch.zeros(1, 64, dtype=torch.bfloat16)
    ),
    "it is not quantized to 8 bits, as config.json says": settings(load_in_4bit=False, load_in_8bit=True),
    "must have one of load_in_4bit and load_in_8bit": settings(load_in_8bit=True),
    "must have one of load_in_4bit and load_in_8bit ": settings(load_in_4bit="yes"),
    'bnb_4bit_quant_type="nf5" is not supported': settings(bnb_4bit_quant_type="nf5"),
    "but config.json implies [64, 32]": lambda folder: configure(
        folder, lambda config: config.update(hidden_size=32, head_dim=16)
    ),
    "is of layer 1, but config.json implies layers 0 ... 0 only": lambda folder: configure(
        folder, lambda config: config.update(num_hidden_layers=1)
    ),
}
INT8 = {
    "SCB is F32 (63,), but config.json and quant_state imply F32 (64,)": lambda folder: put(folder, SCB=floats(63)),
    "weight is F32 (64, 64), but": lambda folder: put(folder, weight=floats(64, 64)),
    "weight_format is 2; only 0, row by row, is known": lambda folder: put(
        folder, weight_format=torch.tensor(2, dtype=torch.uint8)
    ),
    "weight is I8 (64, 64), but config.json implies F16 (64, 64)": lambda folder: put(folder, SCB=None),
    f"{Q_PROJ}.SCB has 64 numbers of 64 that are NaN or infinite": lambda folder: put(
        folder, SCB=floats(64) + torch.inf
    ),
}
CASES = [("nf4", *case) for case in DAMAGE.items()] + [("int8", *case) for case in INT8.items()]


@pytest.mark.parametrize(("kind", "message", "damage"), CASES, ids=lambda value: value if type(value) is str else "")
def test_damage_is_told_in_one_line_with_exit_code_two(write, tmp_path, capsys, kind, message, damage):
    folder = write(kind)
    damage(folder)
    with pytest.raises(QzoError) as caught:
        load(folder)
    assert message.strip() in str(caught.value) and "\n" not in str(caught.value)
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {caught.value}"]
    reason = inspect(folder).reason
    only_data_is_wrong = message.startswith("weight_format")
    assert reason is None if only_data_is_wrong else "\n" not in reason


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_mutations_of_header_configuration_and_quant_state_never_crash(write, kind):
    folder, dice = write(kind), random.Random(kind)
    tensors = tensors_of(folder)
    states = sorted(name for name in tensors if "quant_state" in name)

    def change(turn):
        if not states or turn % 2 == 0:
            return mutate(folder, dice)
        name = dice.choice(states)
        text = json.dumps(mutated_json(json.loads(bytes(tensors[name].tolist())), dice))
        changed = tensors | {name: torch.tensor(list(text.encode()), dtype=torch.uint8)}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    assert 25 < refused_of(folder, 70, change, load) < 70
