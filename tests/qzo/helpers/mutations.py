"""Checkpoints with a few parts of their headers and settings changed at random, and what reading them must never do."""

import json
import resource
import struct

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
    """One mutation of a checkpoint's configuration or of its safetensors header, kept well formed or not."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    data = weights.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + size], data[8 + size :]
    kind = dice.randrange(5)
    if kind < 2:
        config.write_text(json.dumps(mutated_json(json.loads(config.read_text()), dice)))
    elif kind == 2:
        config.write_bytes(mutated_bytes(config.read_bytes(), dice))
    elif kind == 3:
        new = json.dumps(mutated_json(json.loads(header), dice)).encode()
        weights.write_bytes(struct.pack("<Q", len(new)) + new + rest)
    else:
        length = size if dice.random() < 0.7 else dice.choice([0, 7, size - 1, size + 1, 2**40, 2**63])
        weights.write_bytes(struct.pack("<Q", length) + mutated_bytes(header, dice) + rest)


def refused_of(folder, turns, change, *readers):
    """How many of `turns` changed folders the first reader refuses: in one line, with no other error and little memory.

    `change(turn)` changes files of the folder, which are put back each time; `readers` take the folder.
    """
    original = {file: file.read_bytes() for file in folder.iterdir()}
    for read in readers:
        read(folder)  # what is imported now is not counted
    before, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for turn in range(turns):
        change(turn)
        for read in readers:
            try:
                read(folder)
            except QzoError as error:
                refused += read is readers[0]
                assert "\n" not in str(error)
        for file, data in original.items():
            file.write_bytes(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
    return refused
