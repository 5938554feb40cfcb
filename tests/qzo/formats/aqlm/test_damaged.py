"""AQLM folders that are damaged or contradict themselves: one line, nothing run, nothing large allocated."""

import random

import pytest
import torch
from mutations import configure, mutate, refused_of
from safetensors.torch import load_file, save_file

from qzo import load
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.save import save
from qzo.errors import QzoError
from qzo.quantizers.aqlm import quantize_aqlm

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make_folder(make_model, tmp_path):
    """`make_folder()`: a 2x8 checkpoint."""

    def make():
        save(quantize_aqlm(make_model(dtype=torch.float16)), tmp_path / "model")
        return tmp_path / "model"

    return make


def put(folder, **parts):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"{Q_PROJ}.{name}": tensor for name, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")


def settings(**changes):
    return lambda folder: configure(folder, lambda config: config["quantization_config"].update(changes))


DAMAGE = {
    "codes is I8 (8, 64, 2), but config.json implies I8 (64, 8, 2)": lambda folder: put(
        folder, codes=torch.zeros(8, 64, 2, dtype=torch.int8)
    ),
    "codes is I16 (64, 8, 2), but config.json implies I8": lambda folder: put(
        folder, codes=torch.zeros(64, 8, 2, dtype=torch.int16)
    ),
    "codebooks is F32 (2, 255, 1, 8), but": lambda folder: put(folder, codebooks=torch.zeros(2, 255, 1, 8)),
    "scales is I8 (64, 1, 1, 1), but": lambda folder: put(folder, scales=torch.zeros(64, 1, 1, 1, dtype=torch.int8)),
    "but config.json implies F16 (2, 65536, 1, 8)": settings(nbits_per_codebook=16),
    "but config.json implies F16 (1, 256, 1, 8)": settings(num_codebooks=1),
    "in_features=64 is not divisible by 7": settings(in_group_size=7),
    "AQLM with nbits_per_codebook=99 is not supported": settings(nbits_per_codebook=99),
    "AQLM with num_codebooks=None is not supported": settings(num_codebooks=None),
    "AQLM with out_group_size=0 is not supported": settings(out_group_size=0),
    "AWQ with bits=2 is not supported": settings(quant_method="awq", bits=2, group_size=32),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGE.items(), ids=lambda value: value if type(value) is str else "")
def test_damage_is_told_in_one_line(make_folder, message, damage):
    folder = make_folder()
    damage(folder)
    with pytest.raises(QzoError) as caught:
        load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert message in inspect(folder).reason


def test_mutations_of_header_and_configuration_never_crash(make_folder):
    folder, dice = make_folder(), random.Random("aqlm")
    assert 100 < refused_of(folder, 200, lambda _: mutate(folder, dice), load, inspect) < 200
