"""Damaged checkpoints of HQQ and torchao: one line, exit code 2, no code run; and qzo inspect on them."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch
from cases_hqq import write as write_hqq
from cases_torchao import CASES as TORCHAO
from mutations import mutate, mutated_bytes, mutated_json, refused_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import write_plain

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect
from qzo.commands.main import main
from qzo.live.scales import quantized_bytes

pytest.importorskip("hqq", reason="needs hqq")
pytest.importorskip("torchao", reason="needs torchao")
Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS = ("pt", "hqq", "int8", "int4")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Kind -> folder of a sound checkpoint."""
    folder = tmp_path_factory.mktemp("stored")
    plain = write_plain("llama", folder / "plain")
    write_hqq(plain, folder / "pt", nbits=4, group_size=32)
    write_hqq(plain, folder / "hqq", safetensors=True, nbits=3, group_size=32, axis=0, view_as_float=True)
    for case in TORCHAO:
        if case.family == "llama" and case.name in ("torchao-int8", "torchao-int4"):
            case.write(plain, folder / case.name.removeprefix("torchao-"))
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def copied(originals, tmp_path):
    """`copied(kind)`: a copy to be damaged."""

    def copy(kind):
        (tmp_path / kind).mkdir()
        for file in originals[kind].iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
        return tmp_path / kind

    return copy


def change_state(change):
    def damage(folder):
        state = torch.load(folder / "qmodel.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "qmodel.pt")

    return damage


def change_tensors(change):
    def damage(folder):
        file = folder / "model.safetensors"
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata()
        tensors = load_file(file)
        metadata = change(tensors, metadata) or metadata
        save_file(tensors, file, metadata)

    return damage


def set_about(**changes):
    return change_state(lambda state: state[Q_PROJ].update(changes))


def set_metadata(**changes):
    def change(_, metadata):
        about = json.loads(metadata[f"{Q_PROJ}.weight"])
        about["_data"].update(changes)
        return {**metadata, f"{Q_PROJ}.weight": json.dumps(about)}

    return change_tensors(change)


def set_tensors(**changes):
    return change_tensors(lambda tensors, _: tensors.update({f"{Q_PROJ}.{k}": v for k, v in changes.items()}))


def text(value):
    return torch.tensor([ord(character) for character in value], dtype=torch.uint8)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["QZO_TRAP"],)


def pickled(folder):
    (folder / "qmodel.pt").write_bytes(pickle.dumps({Q_PROJ: Trap()}))


def pickled_in_archive(folder):
    torch.save({Q_PROJ: {"W_q": Trap()}}, folder / "qmodel.pt")


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20000])


BYTES = torch.ones(3, 1, dtype=torch.uint8)
NESTED = {"packing": "8bit_u8", "scale": torch.tensor(1.0), "zero": torch.tensor(1.0), "compute_dtype": torch.float32}
CASES = [
    ("pt", "qmodel.pt is damaged, or holds more than tensors", pickled),
    ("pt", "qmodel.pt is damaged, or holds more than tensors", pickled_in_archive),
    ("pt", "qmodel.pt is damaged, or holds more than tensors", truncate("qmodel.pt")),
    ("pt", "is not a dictionary of layers", lambda folder: torch.save([1, 2], folder / "qmodel.pt")),
    ("pt", "q_proj: codes are torch.uint8 (64, 32), but 4 bits in groups of 64", set_about(group_size=64)),
    ("pt", "packing=2bit_u8 does not hold codes of 4 bits", set_about(packing="2bit_u8")),
    ("pt", "are no layout of HQQ", set_about(shape=(64,))),
    ("pt", "are no layout of HQQ", set_about(nbits="4")),
    ("pt", "are no layout of HQQ", set_about(group_size=None)),
    ("pt", "axis=7 is not 0 or 1", set_about(axis=7)),
    ("pt", 'meta["scale"] is not a tensor', set_about(scale=1.0)),
    ("pt", "zero points are torch.float32 (1, 1)", set_about(zero=torch.ones(1, 1))),
    ("pt", "q_proj: it is quantized as (32, 128), but", set_about(shape=torch.Size((32, 128)))),
    ("pt", "quantized in a way that is not known", set_about(quant_zero=True, zero_q=torch.ones(3), meta_zero=3)),
    ("pt", "are 3 quantized numbers, need (128, 1)", set_about(quant_zero=True, zero_q=BYTES, meta_zero=NESTED)),
    ("pt", "tensors are missing, the first is model.norm", change_state(lambda state: state.pop("model.norm"))),
    ("pt", "no linear layer strange", change_state(lambda state: state.update(strange=state[Q_PROJ]))),
    ("hqq", "is damaged", truncate("model.safetensors")),
    (
        "hqq",
        "is '__import__(\"os\").getcwd()', which is no dtype",
        set_tensors(compute_dtype=text('__import__("os").getcwd()')),
    ),
    ("hqq", "has 1000 numbers, which is no setting", set_tensors(packing=torch.zeros(1000, dtype=torch.uint8))),
    ("hqq", "axis has 2 numbers, need one", set_tensors(axis=torch.zeros(2, dtype=torch.int32))),
    ("hqq", "is not known; quantized scales", set_tensors(scale_q=torch.zeros(2))),
    ("hqq", "codes are", set_tensors(W_q=torch.zeros(3, 5))),
    ("hqq", "scales are torch.float32 (2, 2)", set_tensors(scale=torch.zeros(2, 2))),
    ("int8", "is damaged", truncate("model.safetensors")),
    ("int8", "q_proj: block_size=[1, 32], but its scales imply [1, 64]", set_metadata(block_size=[1, 32])),
    ("int8", "act_quant_kwargs is a PerRow", set_metadata(act_quant_kwargs={"_type": "PerRow", "_data": {}})),
    ("int8", "does not divide (64, 64)", set_tensors(_weight_scale=torch.ones(64, 7))),
    ("int8", "zero points have shape (2, 2)", set_tensors(_weight_zero_point=torch.ones(2, 2))),
    (
        "int8",
        "block_size=[1, 64], but its scales imply [1, 32]",
        set_tensors(_weight_qdata=torch.ones(64, 32, dtype=torch.int8)),
    ),
    ("int8", "which are not known", set_tensors(_weight_more=torch.ones(2))),
    ("int8", "does not say what its weight is", change_tensors(lambda *_: {"format": "pt"})),
    ("int4", "has no shape of positive numbers", set_metadata(shape=[64, -1])),
    ("int4", "codes are torch.int8 (64, 32), need torch.int8 (64, 40)", set_metadata(shape=[64, 80])),
    ("int4", "are torch.float32 (2, 63), unlike the scales", set_tensors(_weight_zero_point=torch.ones(2, 63))),
]


@pytest.mark.parametrize(("kind", "message", "damage"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_damage_is_told_in_one_line_with_exit_code_two(copied, tmp_path, monkeypatch, capsys, kind, message, damage):
    monkeypatch.setenv("QZO_TRAP", str(tmp_path / "trap"))
    folder = copied(kind)
    damage(folder)
    with pytest.raises(QzoError) as caught:
        load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--group-size", "32"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {caught.value}"] and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_what_the_loaded_model_holds(originals, kind, capsys):
    found, model = inspect(originals[kind]), load(originals[kind], torch.float32)
    sizes = quantized_bytes(model)
    assert found.reason is None and found.layers == 14
    for part in ("scales", "codes", "zero_points", "offsets"):
        assert found.sizes[part] == sizes.get(part, 0), part
    assert found.counts["scales"] == found.trainable["scales"] == sizes["scale_count"]
    assert main(["inspect", str(originals[kind])]) == 0
    assert "trains with QZO       yes" in capsys.readouterr().out


def test_inspect_tells_why_a_kind_of_torchao_is_not_trained(copied):
    folder = copied("int8")
    set_metadata(act_quant_kwargs={"_type": "PerRow", "_data": {}})(folder)
    assert "only weight-only quantization is trained" in inspect(folder).reason


def mutate_archive(file, dice):
    """One mutation of the pickle in a qmodel.pt, or of the archive around it."""
    if dice.random() < 0.2:
        file.write_bytes(mutated_bytes(file.read_bytes(), dice))
        return
    with zipfile.ZipFile(file) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    parts[name] = mutated_bytes(parts[name], dice)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def mutate_metadata(file, dice):
    """One mutation of what the header of a safetensors file says of a weight of torchao."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    about = header["__metadata__"]
    name = dice.choice([name for name in about if "proj" in name])
    about[name] = json.dumps(mutated_json(json.loads(about[name]), dice))
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_never_crash_hang_or_take_memory(copied, kind):
    folder, dice = copied(kind), random.Random(kind)

    def change(turn):
        if kind == "pt":
            mutate_archive(folder / "qmodel.pt", dice)
        elif turn % 2 and kind != "hqq":
            mutate_metadata(folder / "model.safetensors", dice)
        else:
            mutate(folder, dice)

    assert 30 < refused_of(folder, 100, change, load) < 100
