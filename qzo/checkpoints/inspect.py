"""What a checkpoint holds, and whether QZO can train it, from its configuration, its headers and its scales."""

from __future__ import annotations

import os
from pathlib import Path

from qzo.checkpoints.generation import read_generation
from qzo.errors import OTHER, QzoError
from qzo.files.finite import check_stored
from qzo.files.folder import headers_in, weight_files
from qzo.files.settings import Source, check_no_adapters, is_gguf, source_of
from qzo.formats.packed import parts_of
from qzo.formats.table import find
from qzo.models.inspection import Inspection, obstacle
from qzo.models.skeleton import check_unquantized


def inspect(source: str | os.PathLike[str]) -> Inspection:
    """Look at a folder with config.json, or a .gguf file.

    Of a format that is trained here the model is built without data, and every header compared with it. Codes and large
    16-bit weights are not read. What is read, so that NaN and infinity are told: scales, offsets and codebooks, a
    hundredth of the bytes, and other tensors of up to 2^20 numbers, such as norms; of a .gguf file, whose scales lie
    between the codes, all of it. So `reason` is None just where `qzo.load` needs no more than sound data in the rest.
    Other quantizers: what the configuration says. Raises QzoError for what is neither, and for files that cannot be
    read.
    """
    path = Path(source)
    if not is_gguf(path) and not path.is_dir():
        raise QzoError(f"{source} is not a folder; give a folder with config.json, or a .gguf file")
    about = source_of(path)
    if path.is_dir():
        read_generation(path)
        check_no_adapters(about)
    settings, method = about.settings, str(about.method)
    try:
        found = find(about)
    except QzoError as error:
        if settings is None:
            raise
        return Inspection(str(source), method, settings=settings, reason=str(error).removeprefix(f"{path}: "))
    if found is not None:
        return found.inspect(str(source))
    if settings is not None:
        reason = f"the format {method} is not trainable here yet; {OTHER}"
        return Inspection(str(source), method, settings=settings, reason=reason)
    return _unquantized(str(source), about)


def _unquantized(name: str, source: Source) -> Inspection:
    headers = headers_in(weight_files(source.path))
    counts, sizes = parts_of(headers)

    def check() -> None:
        check_unquantized(source.path, source.config, headers)
        check_stored(headers, ())  # which loading does once its tensors are in memory

    obstructed, finite = obstacle(source.path, check)
    reason = obstructed or f"it is not quantized; first run: qzo quantize {name} OUT"
    return Inspection(name, "unquantized", counts=counts, sizes=sizes, reason=reason, finite=finite)
