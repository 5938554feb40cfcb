"""Checkpoints with a few parts of their headers and settings changed at random, and what reading them must never do."""

import json
import os
import resource
import shutil
import signal
import struct
from contextlib import contextmanager

from safetensors.torch import load_file, save_file

from qzo import QzoError

GROWTH = 200 * 1024  # KiB that reading damaged files of a tiny model may add to the peak of the process
VALUES = [None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 1e308, float("nan"), "", "x", [], [1, 2], {}, {"a": 1}]


def configure(folder, change):
    """`change(config)` changes config.json of the folder in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def mutated_json(value, dice):
    """A copy of a JSON value with one part of it replaced, removed or added."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        copy, key = dict(value), dice.choice(sorted(value))
        kind = dice.random()
        if kind < 0.1:
            del copy[key]
        elif kind < 0.2:
            copy[key + "x"] = copy.pop(key)
        else:
            copy[key] = mutated_json(copy[key], dice)
        return copy
    if isinstance(value, list) and value and dice.random() < 0.7:
        place = dice.randrange(len(value))
        return [*value[:place], mutated_json(value[place], dice), *value[place + 1 :]]
    if isinstance(value, int) and dice.random() < 0.5:
        return value * dice.choice([-1, 2, 1000, 2**20]) + dice.choice([-1, 0, 1])
    return dice.choice(VALUES)


def mutated_bytes(data, dice):
    """A header with some of its bytes changed, or cut."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed[: dice.randrange(len(changed))] if dice.random() < 0.1 else changed)


def mutate(folder, dice):
    """One mutation of a checkpoint in one safetensors file; whether it must be refused, not merely survived."""
    if dice.random() < 0.4:
        return dice.choice(HARMS)(folder, dice)
    config, weights = folder / "config.json", folder / "model.safetensors"
    header, rest = header_of(weights)
    kind = dice.randrange(5)
    if kind < 2:
        config.write_text(json.dumps(mutated_json(json.loads(config.read_text()), dice)))
    elif kind == 2:
        config.write_bytes(mutated_bytes(config.read_bytes(), dice))
    elif kind == 3:
        write_header(weights, mutated_json(json.loads(header), dice), rest)
    else:
        size = len(header)
        length = size if dice.random() < 0.7 else dice.choice([0, 7, size - 1, size + 1, 2**40, 2**63])
        weights.write_bytes(struct.pack("<Q", length) + mutated_bytes(header, dice) + rest)
    return False


def header_of(weights):
    """The header of a safetensors file, as it stands there, and the data behind it."""
    data = weights.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + size], data[8 + size :]


def write_header(weights, header, rest):
    """Write a safetensors file anew with another header."""
    new = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(new)) + new + rest)


NUMBERS = ("scales", "scale", "absmax", "SCB", "codebooks", "norm.weight", "lm_head.weight", "embed_tokens.weight")
NOT_FINITE = {"F16": (0x7E00, 0x7C00, 0xFC00), "BF16": (0x7FC0, 0x7F80, 0xFF80)}
NOT_FINITE |= {"F32": (0x7FC00000, 0x7F800000, 0xFF800000)}


def not_finite(folder, dice):
    """NaN or infinity in one number of a tensor that is no codes."""
    weights = folder / "model.safetensors"
    header, rest = header_of(weights)
    tensors = {name: about for name, about in json.loads(header).items() if name != "__metadata__"}
    name = dice.choice(sorted(name for name in tensors if name.endswith(NUMBERS) and tensors[name]["dtype"][0] != "U"))
    dtype, (start, stop) = tensors[name]["dtype"], tensors[name]["data_offsets"]
    size = 4 if dtype == "F32" else 2
    place = start + dice.randrange((stop - start) // size) * size
    number = dice.choice(NOT_FINITE[dtype]).to_bytes(size, "little")
    weights.write_bytes(struct.pack("<Q", len(header)) + header + rest[:place] + number + rest[place + size :])
    return True


def impossible(folder, dice):
    """A count in the configuration that nothing in the files belongs to, under one of many names, at some depth."""
    count = {dice.choice(COUNTS): dice.choice([10**9, 2**31 - 1, 2**63, 10**30])}
    place = dice.choice(["", "text_config", "vision_config", "encoder"])
    configure(folder, lambda config: config.update({place: count} if place else count))
    return True


COUNTS = (
    "num_labels",
    "num_hidden_layers",
    "num_blocks",
    "num_layers_per_stack",
    "decoder_layers",
    "depths",
    "n_layers",
)


def wild(folder, dice):
    """A setting that no model has."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    lists = [1.0] * dice.choice([0, 1, 3, 5, 1000]), [float("nan")] * 8, "12345678", [-1.0] * 8
    wrong = {"short_factor": dice.choice(lists), "long_factor": dice.choice(lists)}
    changes = [
        {"rope_parameters": {**factors, **wrong}},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": float("inf")},
        {"hidden_size": 10**12},
        {"vocab_size": 10**12},
        {"head_dim": 10**12},
        {"to_dict": 1},
    ]
    configure(folder, lambda config: config.update(dice.choice(changes)))
    return True


def strange_name(folder, dice):
    """A tensor whose name would move the cursor, or write a line of its own."""
    weights = folder / "model.safetensors"
    header, rest = header_of(weights)
    tensors = json.loads(header)
    name = dice.choice(sorted(name for name in tensors if name.endswith(NUMBERS)))
    tensors[f"{name}\x1b[2J\n\rerror: \u2028{dice.choice(['', chr(0x9B), chr(0x202E)])}"] = tensors.pop(name)
    write_header(weights, tensors, rest)
    return True


def lost(folder, dice):
    """A tensor that every model has is missing, or the end of the file."""
    weights = folder / "model.safetensors"
    if dice.random() < 0.5:
        weights.write_bytes(weights.read_bytes()[: -dice.randrange(1, 5000)])
        return True
    tensors = {name: tensor for name, tensor in load_file(weights).items() if not name.endswith("model.norm.weight")}
    save_file(tensors, weights, metadata_of(weights))
    return True


def metadata_of(weights):
    return json.loads(header_of(weights)[0]).get("__metadata__")


def twice(folder, dice):
    """A tensor in two shards, the second perhaps with other numbers or of another shape."""
    weights = folder / "model.safetensors"
    tensors, metadata = load_file(weights), metadata_of(weights)
    weights.unlink()
    name = dice.choice(sorted(name for name in tensors if name.endswith(NUMBERS)))
    other = dice.choice([tensors[name], tensors[name].flatten()[:3].clone(), tensors[name].flip(0).contiguous()])
    save_file(tensors, folder / "model-1.safetensors", metadata)
    save_file({name: other}, folder / "model-2.safetensors", metadata)
    index = {"weight_map": {**dict.fromkeys(tensors, "model-1.safetensors"), name: "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return True


def no_file(folder, dice):
    """What a reader would wait for, or never see the end of, in the place of a file."""
    file = folder / dice.choice(["config.json", "model.safetensors"])
    file.unlink()
    dice.choice([os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)])(file)
    return True


HARMS = (not_finite, impossible, wild, strange_name, lost, twice, no_file)


class Hung(BaseException):
    """Beyond every `except Exception`."""


@contextmanager
def alarmed(seconds):
    """Raises Hung within where it takes longer."""

    def hung(*_):
        raise Hung

    previous = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def put_back(folder, original):
    """The files of a folder as they were, and no others."""
    for file in folder.iterdir():
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        elif file not in original or not file.is_file() or file.is_symlink():
            file.unlink()
    for file, data in original.items():
        file.write_bytes(data)


def refused_of(folder, turns, change, *readers):
    """How many of `turns` changed folders the first reader refuses: in one line, with no other error and little memory.

    `change(turn)` changes files of the folder, which are put back each time, and tells whether they must be refused;
    `readers` take the folder, and refuse by an error or as an inspection does.
    """
    original = {file: file.read_bytes() for file in folder.iterdir()}
    for read in readers:
        read(folder)  # what is imported now is not counted
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for turn in range(turns):
        must = change(turn)
        for read in readers:
            try:
                with alarmed(20):
                    told = getattr(read(folder), "reason", None)
            except QzoError as error:
                told = str(error)
            refused += told is not None and read is readers[0]
            assert told is None or told.isprintable()
            assert told is not None or not must, turn
        put_back(folder, original)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
    return refused
