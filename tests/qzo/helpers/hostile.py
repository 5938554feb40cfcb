"""Checkpoints made by hand to hang a reader, fill its memory, or have it fetch or run something.

Each table has name -> a function that turns a sound checkpoint (folder or file) into such a one; `large` ones write
some ten megabytes first, and are for attacks rather than for tests.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import zipfile
from pathlib import Path

import torch
from mutations import configure
from safetensors.torch import load_file, save_file


def set_config(**changes):
    return lambda folder: configure(folder, lambda config: config.update(changes))


def replaced(name, make):
    """A file of the folder replaced by what `make(path)` puts there."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def a_socket(path):
    """Bound from within its folder, since the path of a socket may have 108 characters."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def a_link(target):
    return lambda path: path.symlink_to(target)


def raw_header(text, length=None):
    """A safetensors file with this header."""
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(data) if length is None else length) + data
    )


def empty_tensors(count):
    entry = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return lambda folder: raw_header("{" + ",".join(entry.format(number) for number in range(count)) + "}")(folder)


def shards(change):
    """Two shards with an index; `change(tensors)` of a tensor that both then have."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        name = next(name for name in sorted(tensors) if name.endswith(("scales", "norm.weight")))
        save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})
        save_file({name: change(tensors[name])}, folder / "model-2.safetensors", {"format": "pt"})
        index = {"weight_map": {**dict.fromkeys(tensors, "model-1.safetensors"), name: "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def padded(name, size):
    """A JSON file with that many bytes more in it."""

    def change(folder):
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**content, "padding": "x" * size}))

    return change


NODES = {
    f"{name} is a {kind}": replaced(name, make)
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "quant.json")
    for kind, make in (
        ("FIFO", os.mkfifo),
        ("socket", a_socket),
        ("device", a_link("/dev/zero")),
        ("folder", Path.mkdir),
    )
    if (name != "quant.json" or kind == "FIFO") and (name, kind) != ("model.safetensors.index.json", "folder")
}
NODES |= {
    "generation_config.json is a FIFO": replaced("generation_config.json", os.mkfifo),
    "generation_config.json is a folder": replaced("generation_config.json", Path.mkdir),
    "generation_config.json is a link to itself": replaced(
        "generation_config.json", lambda path: path.symlink_to(path)
    ),
    "config.json is a link to itself": replaced("config.json", lambda path: path.symlink_to(path)),
}
COUNTS = {
    "num_labels": set_config(num_labels=10**9),
    "layers below 0": set_config(num_hidden_layers=-1),
    "layers": set_config(num_hidden_layers=10**9),
    "layers beyond 64 bits": set_config(num_hidden_layers=10**30),
    "layers as a float": set_config(num_hidden_layers=1e9),
    "vocabulary": set_config(vocab_size=10**12),
    "width": set_config(intermediate_size=10**12),
    "heads": set_config(num_attention_heads=10**9, num_key_value_heads=10**9),
    "head_dim": set_config(head_dim=10**12),
    "a method's name": set_config(to_dict=1, get_text_config="x", to_json_string=2),
    "NaN": set_config(rms_norm_eps=float("nan")),
    "infinity": set_config(rms_norm_eps=float("inf")),
    "deep": lambda folder: configure(folder, lambda config: config.update(deep=json.loads("[" * 500 + "]" * 500))),
    "longrope, wrong count": set_config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0] * 5,
            "original_max_position_embeddings": 16,
        }
    ),
    "longrope, one": set_config(
        rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        original_max_position_embeddings=16,
    ),
    "longrope, words": set_config(
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": "12345678",
            "long_factor": ["x"] * 8,
            "original_max_position_embeddings": 16,
        }
    ),
}
SHARDS = {
    "of other shape": shards(lambda tensor: torch.zeros(3, 5)),
    "of other numbers": shards(lambda tensor: tensor + 1),
    "of equal numbers": shards(lambda tensor: tensor),
}
HEADERS = {
    "length": raw_header(b"{}", 2**62),
    "length of 100 MB": raw_header(b"{}", 99_000_000),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "seven bytes": lambda folder: (folder / "model.safetensors").write_bytes(b"1234567"),
}
LARGE = {
    "id2label of 60 MB": lambda folder: configure(
        folder, lambda config: config.update(id2label={str(number): f"label {number}" for number in range(2_000_000)})
    ),
    "a list of 60 MB": set_config(layer_types=["full_attention"] * 3_500_000),
    "a list of 7 MB": set_config(padding=[1] * 2_300_000),
    "a string of 60 MB": padded("config.json", 60_000_000),
    "tokenizer.json of 200 MB": padded("tokenizer.json", 200_000_000),
    "tokenizer_config.json of 60 MB": padded("tokenizer_config.json", 60_000_000),
    "generation_config.json of 60 MB": padded("generation_config.json", 60_000_000),
    "an index of 100 MB": lambda folder: (
        shards(lambda tensor: tensor)(folder),
        padded("model.safetensors.index.json", 100_000_000)(folder),
    ),
    "1.5 million empty tensors": empty_tensors(1_500_000),
    "300,000 empty tensors": empty_tensors(300_000),
    "200,000 empty tensors and layers": lambda folder: (
        empty_tensors(200_000)(folder),
        set_config(num_hidden_layers=120_000)(folder),
    ),
    "a name of 90 MB": lambda folder: raw_header(
        '{"' + "n" * 90_000_000 + '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    )(folder),
}
FOLDERS = {**NODES, **COUNTS, **SHARDS, **HEADERS}


# GGUF


def gguf_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(kind, value):
    return struct.pack("<I", kind) + value


def set_value(key, kind, value):
    """Replace the value of a metadata key that has 32 bits, its type too."""

    def change(file):
        data = file.read_bytes()
        start = data.index(gguf_string(key)) + len(gguf_string(key))
        assert struct.unpack_from("<I", data, start)[0] in (4, 5, 6)
        file.write_bytes(data[:start] + gguf_value(kind, value) + data[start + 8 :])

    return change


def add_values(count, make):
    """`count` more metadata keys, made by `make(number)`; tensors move by whole alignments."""

    def change(file):
        data = bytearray(file.read_bytes())
        more = b"".join(make(number) for number in range(count))
        more += b"" if len(more) % 32 == 0 else _filling(-len(more) % 32)
        struct.pack_into("<Q", data, 16, struct.unpack_from("<Q", data, 16)[0] + count + (len(more) > 0))
        file.write_bytes(bytes(data[:24]) + more + bytes(data[24:]))

    def _filling(missing):
        key = gguf_string("filling")
        size = len(key) + 4 + 8
        text = "x" * ((missing - size) % 32)
        return key + gguf_value(8, gguf_string(text))

    return change


def strings(count, length=1):
    return gguf_value(9, struct.pack("<IQ", 8, count) + gguf_string("x" * length) * count)


GGUF = {
    "block_count -1": set_value("llama.block_count", 5, struct.pack("<i", -1)),
    "block_count 0": set_value("llama.block_count", 4, struct.pack("<I", 0)),
    "block_count huge": set_value("llama.block_count", 4, struct.pack("<I", 2**31)),
    "block_count a float": set_value("llama.block_count", 6, struct.pack("<f", 2.0)),
    "block_count NaN": set_value("llama.block_count", 6, struct.pack("<f", float("nan"))),
    "block_count a string": set_value("llama.block_count", 8, gguf_string("2")),
    "block_count beyond 63 bits": set_value("llama.block_count", 10, struct.pack("<Q", 2**64 - 1)),
    "feed_forward_length": set_value("llama.feed_forward_length", 4, struct.pack("<I", 2**24)),
    "feed_forward_length beyond": set_value("llama.feed_forward_length", 10, struct.pack("<Q", 2**60)),
    "embedding_length": set_value("llama.embedding_length", 4, struct.pack("<I", 2**24)),
    "vocab_size": set_value("llama.vocab_size", 4, struct.pack("<I", 2**30)),
    "head_count": set_value("llama.attention.head_count", 4, struct.pack("<I", 2**24)),
    "head_count 0": set_value("llama.attention.head_count", 4, struct.pack("<I", 0)),
    "head_count_kv": set_value("llama.attention.head_count_kv", 4, struct.pack("<I", 2**24)),
    "key_length": add_values(
        1, lambda _: gguf_string("llama.attention.key_length") + gguf_value(4, struct.pack("<I", 2**24))
    ),
    "epsilon NaN": set_value("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan"))),
    "alignment": add_values(1, lambda _: gguf_string("general.alignment") + gguf_value(10, struct.pack("<Q", 2**63))),
    "alignment 0": add_values(1, lambda _: gguf_string("general.alignment") + gguf_value(4, struct.pack("<I", 0))),
    "a string beyond the file": add_values(1, lambda _: gguf_string("k") + gguf_value(8, struct.pack("<Q", 2**62))),
    "an array beyond the file": add_values(1, lambda _: gguf_string("k") + gguf_value(9, struct.pack("<IQ", 8, 2**62))),
    "arrays of arrays": add_values(1, lambda _: gguf_string("k") + gguf_value(9, struct.pack("<IQ", 9, 2**20))),
    "a key of 70,000 characters": add_values(1, lambda _: gguf_string("k" * 70_000) + gguf_value(0, b"\0")),
}
GGUF_NODES = {
    "a FIFO": lambda file: (file.unlink(), os.mkfifo(file)),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a socket": lambda file: (file.unlink(), a_socket(file)),
}
GGUF_LARGE = {
    "2 million keys": add_values(2_000_000, lambda number: gguf_string(f"k{number}") + gguf_value(0, b"\0")),
    "60,000 keys": add_values(60_000, lambda number: gguf_string(f"k{number}") + gguf_value(0, b"\0")),
    "a million strings": add_values(1, lambda _: gguf_string("k") + strings(1_000_000)),
    "seventy thousand strings": add_values(1, lambda _: gguf_string("k") + strings(70_000)),
    "a thousand arrays of a thousand strings": add_values(
        1000, lambda number: gguf_string(f"k{number}") + strings(1000)
    ),
    "20 million numbers": add_values(
        1, lambda _: gguf_string("k") + gguf_value(9, struct.pack("<IQ", 0, 20_000_000) + bytes(20_000_000))
    ),
    "a string of 60 MB": add_values(1, lambda _: gguf_string("k") + gguf_value(8, gguf_string("x" * 60_000_000))),
}


# qmodel.pt


class _Call:
    """What a pickle calls when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(parts, method=zipfile.ZIP_STORED):
    """A torch archive with these records."""

    def change(folder):
        with zipfile.ZipFile(folder / "qmodel.pt", "w", method) as target:
            for name, data in parts.items():
                target.writestr(f"archive/{name}", data() if callable(data) else data)

    return change


def calling(make):
    """A qmodel.pt whose pickle makes one object by a call."""

    def change(folder):
        data = io.BytesIO()
        pickle.dump({"layer": {"W_q": make()}}, data, protocol=2)
        archive({"data.pkl": data.getvalue(), "version": b"3\n", "byteorder": b"little"})(folder)

    return change


def saving(make):
    """A qmodel.pt as torch.save writes it, with one tensor replaced."""

    def change(folder):
        state = torch.load(folder / "qmodel.pt", weights_only=True)
        path = next(path for path, about in state.items() if "W_q" in about)
        state[path]["W_q"] = make()
        torch.save(state, folder / "qmodel.pt")

    return change


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def subclass():
    return torch.nn.Parameter(torch.ones(2, 2))


PICKLES = {
    "stride 0": saving(lambda: torch.empty(1, dtype=torch.uint8).expand(2**30, 8)),
    "stride 0, both": saving(lambda: torch.empty(1, 1).expand(2**16, 2**15)),
    "nested": saving(nested),
    "jagged": saving(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
    "sparse": saving(lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (2**31, 2**31))),
    "sparse rows": saving(lambda: torch.eye(3).to_sparse_csr()),
    "quantized": saving(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)),
    "meta": saving(lambda: torch.empty(2**30, 8, device="meta")),
    "a bytearray": calling(lambda: _Call(bytearray, 2**33)),
    "a storage": calling(lambda: _Call(torch.UntypedStorage, 2**33)),
    "a tensor": calling(lambda: _Call(torch.Tensor, 2**31)),
    "a set of a set": calling(lambda: _Call(set, [1, 2])),
    "a system call": calling(lambda: _Call(os.system, "exit 3")),
    "an exec": calling(lambda: _Call(exec, "raise SystemExit(3)")),
    "memo": archive({"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."}),
    "long": archive({"data.pkl": b"\x80\x02\x8b\xff\xff\xff\x7f."}),
    "string": archive({"data.pkl": b"\x80\x02X\xff\xff\xff\xffx."}),
    "no pickle": archive({"version": b"3\n"}),
    "two pickles": archive({"data.pkl": b"\x80\x02}.", "a/data.pkl": b"\x80\x02}."}),
    "empty": lambda folder: (folder / "qmodel.pt").write_bytes(b""),
    "a FIFO": replaced("qmodel.pt", os.mkfifo),
    "a device": replaced("qmodel.pt", a_link("/dev/zero")),
    "a socket": replaced("qmodel.pt", a_socket),
}
PICKLES_LARGE = {
    "a deflated string of 2 GiB": archive(
        {"data.pkl": lambda: b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + bytes(2**31 - 1) + b"."},
        zipfile.ZIP_DEFLATED,
    ),
    "a million empty layers": archive({"data.pkl": lambda: pickle.dumps(dict.fromkeys(range(10**6)), protocol=2)}),
    "a million records": archive({"data.pkl": b"\x80\x02}.", **{f"data/{number}": b"" for number in range(10**6)}}),
}
