r"""The journal file: what its lines are, and reading them with every checksum checked.

    line 1    the header, one JSON object: version, hashes of model and noise, the optimizer and its parameter groups
    others    `<step> <seed> <d'> <lr> <crc>`      one step; step counts from 0
              `* <JSON> <crc>`                     options of the groups from here on, where a scheduler moved momentum

d': of each direction, joined by ","; of each group, joined by ";" where groups differ; "-" for a skipped step. lr: of
each group, joined by ";" where they differ. A number is written as Python's repr where that is shorter than 11
characters, else as the 11 characters of base64 (URL alphabet) of its 8 bytes, big-endian: both give the double back to
the bit, and a step with one d' takes at most 43 characters beside a one-digit seed. crc: CRC-32 of the line and, as its
start value, the line before, in 8 hex digits: a lost, doubled or moved line shows as well as a flipped bit.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qzo.errors import QzoError
from qzo.optim.spsa import Applied
from qzo.regular import check_regular

VERSION = 1
PACKED = 11  # characters of 8 bytes in base64
MOST_MIB = 1024  # some twenty million steps; they are read whole


class Step(NamedTuple):
    """One step: d' of each group and direction, empty where it was skipped, and the lr of each group."""

    step: int
    seed: int
    applied: Applied
    lrs: tuple[float, ...]


class Change(NamedTuple):
    """Options of each group, without lr, from the next step on."""

    options: list[dict[str, Any]]


@dataclass
class Contents:
    """A journal that was read: everything up to `ends[-1]` is sound."""

    header: dict[str, Any]
    entries: list[Step | Change] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # byte after the header, then after each step
    crcs: list[int] = field(default_factory=list)  # running checksum there
    size: int = 0  # bytes of the file
    notice: str | None = None  # what was dropped

    @property
    def steps(self) -> int:
        """Number of steps recorded."""
        return len(self.ends) - 1

    def until(self, steps: int) -> list[Step | Change]:
        """The entries that make the first `steps` steps."""
        count = 0
        for position, entry in enumerate(self.entries):
            if count == steps:
                return self.entries[:position]
            count += isinstance(entry, Step)
        return self.entries


def seal(text: str, crc: int) -> tuple[bytes, int]:
    """The line of a text with its checksum, and the checksum, which the next line starts from."""
    body = text.encode()
    crc = zlib.crc32(body, crc)
    return body + f" {crc:08x}\n".encode(), crc


def write_step(step: Step) -> str:
    """The text of a step, without checksum."""
    groups = [",".join(_write_number(d) for d in group) for group in step.applied]
    rates = [_write_number(lr) for lr in step.lrs]
    return f"{step.step} {step.seed} {_join(groups) or '-'} {_join(rates)}"


def write_change(options: list[dict[str, Any]]) -> str:
    """The text of a change of options, without checksum."""
    return f"* {json.dumps(options, separators=(',', ':'))}"


def read(path: Path) -> Contents:
    """Read a journal. A last line that is torn or damaged is left out, and `notice` tells.

    Raises QzoError, with the number of the line, for damage before the last line, and for what is no journal.
    """
    if not path.exists() or path.is_dir():
        raise QzoError(f"{path} is not a file; give a journal that qzo.Journal wrote")
    check_regular(path, MOST_MIB)
    data = path.read_bytes()
    if not data.startswith(b'{"qzo_journal"'):
        raise QzoError(f"{path} is not a journal of qzo; give a file that qzo.Journal or qzo train wrote")
    contents: Contents | None = None
    start, crc, number = 0, 0, 1
    while start < len(data):
        newline = data.find(b"\n", start)
        end = len(data) if newline < 0 else newline + 1
        body, _, checksum = data[start:end].rpartition(b" ")
        crc = zlib.crc32(body, crc)
        if checksum != f"{crc:08x}\n".encode():
            if contents is None or end < len(data):
                raise QzoError(f"{path}: line {number} is damaged (its checksum does not fit); restore it from a copy")
            contents.notice = f"{path}: the last line, {number}, is torn and was dropped"
            break
        try:
            contents = _take(contents, body.decode(), end, crc)
        except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
            raise QzoError(f"{path}: line {number} cannot be read: {error}; restore it from a copy") from error
        start, number = end, number + 1
    assert contents is not None
    contents.size = len(data)
    return contents


def _take(contents: Contents | None, text: str, end: int, crc: int) -> Contents:
    if contents is None:
        header = json.loads(text)
        if header["qzo_journal"] != VERSION:
            raise ValueError(f"version {header['qzo_journal']}, need {VERSION}")
        if not isinstance(header.get("groups"), list):
            raise ValueError("the header has no groups")
        return Contents(header, ends=[end], crcs=[crc])
    if text.startswith("* "):
        options = json.loads(text[2:])
        if not isinstance(options, list) or len(options) != len(contents.header["groups"]):
            raise ValueError("options of other groups than the header has")
        contents.entries.append(Change(options))
        return contents
    step = _read_step(text, len(contents.header["groups"]))
    if step.step != contents.steps:
        raise ValueError(f"step {step.step} where {contents.steps} should be")
    contents.entries.append(step)
    contents.ends.append(end)
    contents.crcs.append(crc)
    return contents


def _read_step(text: str, n_groups: int) -> Step:
    step, seed, derivatives, rates = text.split(" ")
    groups = [] if derivatives == "-" else _split(derivatives, n_groups)
    applied = tuple(tuple(_read_number(d) for d in group.split(",")) for group in groups)
    return Step(int(step), int(seed), applied, tuple(_read_number(lr) for lr in _split(rates, n_groups)))


def _join(parts: list[str]) -> str:
    return ";".join(parts[:1] if len(set(parts)) == 1 else parts)


def _split(text: str, n_groups: int) -> list[str]:
    parts = text.split(";")
    return parts * n_groups if len(parts) == 1 else parts


def _write_number(value: float) -> str:
    text = repr(value)
    if len(text) < PACKED:
        return text
    return base64.urlsafe_b64encode(struct.pack(">d", value)).decode().rstrip("=")


def _read_number(text: str) -> float:
    if len(text) != PACKED:
        return float(text)
    value: float = struct.unpack(">d", base64.urlsafe_b64decode(text + "="))[0]
    return value
