"""GGUF files that are damaged, contradict themselves or hold what is not known here: one line, nothing believed."""

import random
import re
import resource
import signal
import struct

import numpy as np
import pytest
import torch
from gguf_files import tiny, write_gguf
from optional import gguf

from qzo import QzoError, load
from qzo.commands.main import main
from qzo.formats.gguf.header import read_gguf_header


def packed(file):
    return load(file, torch.float32, dequantize=False)


@pytest.fixture
def whole(tmp_path):
    return write_gguf(tiny(), tmp_path / "model.gguf", "Q4_0")


def after(data, name):
    """Where what follows a tensor's name or a metadata key begins."""
    key = struct.pack("<Q", len(name)) + name.encode()
    assert data.count(key) == 1
    return data.index(key) + len(key)


def value_of(data, key):
    """Where the value of a metadata key begins, after its type."""
    return after(data, f"llama.{key}") + 4


UP = "blk.0.ffn_up.weight"
CHANGES = {  # name -> (bytes to write, where, what is told)
    "magic": (b"GGUX", lambda data: 0, "starts with b'GGUX'"),
    "tensor count": (struct.pack("<Q", 2**60), lambda data: 8, "is no whole GGUF file"),
    "value count": (struct.pack("<Q", 2**60), lambda data: 16, "is no whole GGUF file"),
    "type": (struct.pack("<I", 99), lambda data: after(data, UP) + 20, "a tensor has the unknown type 99"),
    "rows": (struct.pack("<Q", 2**50), lambda data: after(data, UP) + 12, "it ends at byte"),
    "width": (struct.pack("<Q", 33), lambda data: after(data, UP) + 4, "rows of 33 weights, which blocks of 32"),
    "dimensions": (struct.pack("<I", 2**31), lambda data: after(data, UP), "has 2147483648 dimensions"),
    "offset": (struct.pack("<Q", 2**62), lambda data: after(data, UP) + 24, "it ends at byte"),
    "overlap": (struct.pack("<Q", 0), lambda data: after(data, UP) + 24, "overlap"),
    "fewer rows": (struct.pack("<Q", 32), lambda data: after(data, UP) + 12, "has shape (32, 64), but the file's"),
    "other type": (
        struct.pack("<I", 40),
        lambda data: after(data, UP) + 20,
        "NVFP4, which cannot be",
    ),
    "layers": (struct.pack("<I", 2**31), lambda data: value_of(data, "block_count"), "names 2147483648 layers"),
    "fewer layers": (struct.pack("<I", 1), lambda data: value_of(data, "block_count"), "names 1 layers and has"),
    "hidden": (struct.pack("<I", 96), lambda data: value_of(data, "embedding_length"), "metadata implies"),
    "vocabulary": (struct.pack("<I", 2**31), lambda data: value_of(data, "vocab_size"), "metadata implies"),
    "no heads": (struct.pack("<I", 0), lambda data: value_of(data, "attention.head_count"), "config"),
    "odd heads": (struct.pack("<I", 3), lambda data: value_of(data, "attention.head_count_kv"), "metadata implies"),
    "name": (b"blk.0.ffn_xx.weight", lambda data: after(data, UP) - len(UP), f"has no tensor {UP}"),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_a_false_header_is_one_line(whole, case):
    data = bytearray(whole.read_bytes())
    new, where, message = CHANGES[case]
    start = where(bytes(data))
    data[start : start + len(new)] = new
    whole.write_bytes(data)
    with pytest.raises(QzoError) as caught:
        packed(whole)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(whole) in str(caught.value)
    assert re.search(r"[;:] (download|copy|convert|take|quantize) ", str(caught.value)), caught.value


@pytest.mark.parametrize("size", [0, 3, 20, 200, 4000, -40_000, -1])
@pytest.mark.parametrize("dequantize", [True, False])
def test_a_file_that_is_cut_off_is_told(whole, size, dequantize):
    whole.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(QzoError, match=r"model\.gguf is no whole GGUF file"):
        load(whole, dequantize=dequantize)


def test_another_architecture_and_tensors_without_a_place_are_told(tmp_path):
    file = write_gguf(tiny("qwen2"), tmp_path / "qwen2.gguf")
    data = file.read_bytes().replace(b"qwen2", b"bloom")
    file.write_bytes(data)
    with pytest.raises(QzoError, match=r"bloom\.attention.head_count_kv = 2, is not known here; .* take the model's"):
        packed(file)
    experts = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 8, 32), np.float32)}
    with pytest.raises(QzoError, match=r"has blk\.0.ffn_gate_exps\.weight, for which LlamaForCausalLM has no place"):
        packed(write_gguf(tiny(), tmp_path / "experts.gguf", extra=experts))


def test_rope_factors_are_left_out_as_transformers_does(tmp_path):
    packed(write_gguf(tiny(), tmp_path / "rope.gguf", "Q8_0", {"rope_freqs.weight": np.ones(8, np.float32)}))


def test_a_quantized_vector_and_a_missing_layer_are_told(tmp_path, monkeypatch):
    file = write_gguf(tiny(), tmp_path / "layers.gguf", "Q8_0", layers=3)
    with pytest.raises(QzoError, match="names 3 layers and has tensors of 2"):
        packed(file)
    plain = gguf.GGUFWriter.add_tensor

    def quantized(writer, name, tensor, raw_shape=None, raw_dtype=None):
        if name == "output_norm.weight":
            tensor, raw_dtype = gguf.quantize(tensor, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
        plain(writer, name, tensor, raw_shape, raw_dtype)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", quantized)
    file = write_gguf(tiny(), tmp_path / "vector.gguf", "Q8_0")
    with pytest.raises(QzoError, match=r"output_norm\.weight is quantized, and a LlamaRMSNorm cannot be"):
        packed(file)


@pytest.mark.parametrize("arguments", [["train"], ["train", "--method", "qlora"], ["replay"], ["quantize"]])
def test_the_command_line_tells_it_with_exit_code_2(whole, tmp_path, capsys, monkeypatch, arguments):
    whole.write_bytes(whole.read_bytes()[:-1])
    command, *options = arguments
    if command == "train":
        options += ["--task", "rotten-tomatoes", "--out", str(tmp_path / "run")]
    elif command == "quantize":
        options += [str(tmp_path / "out")]
    else:
        options += [str(tmp_path / "absent.journal")]
    assert main([command, str(whole), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


class Hung(BaseException):
    """Beyond every `except Exception`."""


def test_two_hundred_mutated_headers_neither_crash_nor_hang_nor_allocate(whole, tmp_path):
    def hung(*_):
        raise Hung

    data = whole.read_bytes()
    header = min(info.offset for info in read_gguf_header(whole).tensors.values())
    dice, file = random.Random(0), tmp_path / "mutated.gguf"
    packed(whole)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous, refused = signal.signal(signal.SIGALRM, hung), 0
    try:
        for _ in range(200):
            mutated = bytearray(data)
            for _ in range(dice.randrange(1, 4)):
                width = dice.choice((1, 1, 4, 8))
                start = dice.randrange(4, header - width)
                mutated[start : start + width] = dice.choice((dice.randbytes(width), b"\xff" * width, bytes(width)))
            file.write_bytes(mutated)
            signal.alarm(30)
            try:
                packed(file)
            except QzoError as error:
                refused += 1
                assert "\n" not in str(error)
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert 60 < refused < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024  # KiB
