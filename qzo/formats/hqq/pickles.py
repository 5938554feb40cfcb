"""Whether a qmodel.pt may be handed to PyTorch: its archive and its pickle, looked at before anything is made of them.

PyTorch's weights-only unpickler runs no foreign code, but calls what makes tensors, storages and byte arrays of any
size, and views of some bytes that stand for gigabytes. What HQQ writes needs few words: others are refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qzo.errors import QzoError
from qzo.files.bounds import MIB, check_file
from qzo.files.folder import one_line

PICKLE = "data.pkl"
MOST_RECORDS = 100_000  # a record a tensor
MOST_BYTES = 32 * MIB  # of the pickle, and of the archive's list of records
PROTOCOL = 2  # of torch.save
MOST_WORDS = 1_000_000  # of the pickle; a quantized layer takes about 150
MOST_TENSORS = 20_000
MOST_SIZES = 8  # dimensions of a tensor
TWICE = 2  # a head tied to the vocabulary is the same bytes again
END = b"PK\x05\x06"
BYTES = {"Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8}
STORAGES = {f"{name}Storage": size for name, size in {**BYTES, "Double": 8}.items()}


class _Word(NamedTuple):
    """What stands for a storage class or a dtype: nothing that a pickle could call."""

    name: str


class _Numbers(NamedTuple):
    """A storage: how many numbers it has, and the bytes of one."""

    numel: int
    itemsize: int


class _Tensor(NamedTuple):
    """A tensor, of which only the size is kept."""

    nbytes: int


def check_archive(file: Path) -> None:
    """Raise QzoError unless a file is an archive of torch.save with tensors and settings alone, all within its size."""
    check_file(file)
    try:
        with zipfile.ZipFile(_checked_list(file)) as archive:
            content = archive.read(_without_sum(_pickle_in(file, archive.infolist())))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _damaged(file, error) from error
    reader = _Reader(io.BytesIO(content))
    try:
        _check_words(content)
        reader.load()
    except Exception as error:  # a damaged pickle may ask for anything
        raise _damaged(file, error) from error
    size = file.stat().st_size
    if reader.nbytes > TWICE * size:
        raise QzoError(f"{file} has tensors of {reader.nbytes:,} bytes, and {size:,} itself; convert it again")


def check_sums(file: Path) -> None:
    """Raise QzoError where a record of an archive is not what was written, by the checksums that the archive has.

    PyTorch compares none, and writes 0 where it was told to compute none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                with archive.open(record) as data:
                    while record.CRC and data.read(MIB):
                        pass
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise QzoError(f"{file} is damaged: {one_line(error)}; copy or download it again") from error


def _damaged(file: Path, error: Exception) -> QzoError:
    reason = one_line(error).removeprefix(f"{file}: ")
    return QzoError(f"{file} is damaged, or holds more than tensors: {reason}; copy or download it again")


def _checked_list(file: Path) -> Path:
    """The file itself, once its list of records is known to be short: it is read as a whole, object by object."""
    size = file.stat().st_size
    with file.open("rb") as data:
        data.seek(max(0, size - 22))  # the end of an archive without a comment, as torch.save writes it
        end = data.read(22)
        if len(end) < 22 or end[:4] != END or end[20:] != b"\0\0":
            raise ValueError("it is no archive of torch.save, or it is cut off")
        records, length = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
        if records == 0xFFFF or length == 0xFFFFFFFF:  # the numbers are in the record before, of 64 bits
            data.seek(max(0, size - 22 - 20 - 56))
            long = data.read(56)
            records, length = int.from_bytes(long[32:40], "little"), int.from_bytes(long[40:48], "little")
    if records > MOST_RECORDS or length > MOST_BYTES:
        raise ValueError(f"it lists {records:,} records in {length:,} bytes; no model has as many")
    return file


def _without_sum(record: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """A record of which nobody computed a checksum, so that none is compared."""
    if record.CRC == 0:
        del record.CRC
    return record


def _pickle_in(file: Path, records: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """That of the pickle in an archive whose records are stored as they are, once each, within the file."""
    names = [record.filename for record in records]
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise ValueError("its records have no names of their own")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError(f"its record {record.filename} is compressed, which torch.save never does")
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ValueError("its records are larger than it is")
    found = [record for record in records if record.filename.partition("/")[2] == PICKLE]
    if len(found) != 1 or found[0].file_size > MOST_BYTES:
        raise ValueError(f"it has {len(found)} pickles, need one of at most {MOST_BYTES:,} bytes")
    return found[0]


def _check_words(content: bytes) -> None:
    """Raise ValueError for a pickle of another protocol, or one that numbers its objects without having as many."""
    for number, (code, argument, _) in enumerate(pickletools.genops(content)):
        if number > MOST_WORDS:
            raise ValueError(f"its pickle has more than {MOST_WORDS:,} words; no model has as many")
        if code.proto > PROTOCOL or code.name in ("INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has {code.name}, which torch.save does not write")
        if code.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(content):
            raise ValueError("its pickle numbers more objects than it has bytes")


class _Reader(pickle.Unpickler):
    """Goes through the pickle without making a tensor, a storage or anything else that its words do not name."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.nbytes = self.tensors = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return self._hooks
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return self._parameter
        if (module, name) == ("torch", "Size"):
            return self._sizes
        if module == "torch" and (name in STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
            return _Word(name)
        raise ValueError(f"its pickle asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> _Numbers:
        mark, word, _, _, count = pid
        if mark != "storage" or not isinstance(word, _Word) or word.name not in STORAGES or type(count) is not int:
            raise ValueError("its pickle has a storage that torch.save does not write")
        return _Numbers(count, STORAGES[word.name])

    def _hooks(self) -> dict[Any, Any]:
        return OrderedDict()

    def _sizes(self, sizes: Any) -> tuple[Any, ...]:
        if len(sizes) > MOST_SIZES:
            raise ValueError(f"its pickle has a shape of {len(sizes)} dimensions")
        return tuple(sizes)

    def _parameter(self, data: Any, _requires_grad: Any = None, _hooks: Any = None, state: Any = None) -> Any:
        """`state` becomes attributes; transformers has flags such as `_is_hf_initialized` there."""
        flags = state.items() if isinstance(state, dict) else ()
        if not isinstance(data, _Tensor) or not isinstance(state, dict | None):
            raise ValueError("its pickle has a parameter that is no tensor")
        if not all(str(name).startswith("_is_") and isinstance(value, bool) for name, value in flags):
            raise ValueError("its pickle has a parameter with attributes that are not known here")
        return data

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        whole = [type(number) is int and 0 <= number < 2**48 for number in (offset, *size, *stride)]
        if not isinstance(storage, _Numbers) or not all(whole) or not len(size) == len(stride) <= MOST_SIZES:
            raise ValueError("its pickle has a tensor without a shape")
        if math.prod(size) > storage.numel:
            raise ValueError(f"its pickle has a tensor of shape {tuple(size)} on {storage.numel:,} numbers")
        self.nbytes += math.prod(size) * storage.itemsize
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise ValueError(f"its pickle has more than {MOST_TENSORS:,} tensors; no model has as many")
        return _Tensor(math.prod(size) * storage.itemsize)
