"""Safetensors files copied with some tensors replaced: everything else in them stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qzo.errors import QzoError
from qzo.files.folder import headers_in, opened, weight_files

Tensors = dict[str, Tensor]
Write = Callable[[Path], None]  # fills a folder


def rewriting(source: Path, tensors: Tensors, stored: dict[str, Tensors] | None = None) -> Write:
    """What copies the weights of `source` into a folder, some tensors replaced and cast to the dtype they have there.

    Args:
        source: folder of a checkpoint.
        tensors: name -> tensor.
        stored: for names of `tensors` that the files do not have -> what they become there.

    Extra memory: the tensors of one file. Raises QzoError at once where a tensor has no place.
    """
    weights, stored = weight_files(source), stored or {}
    shapes = {name: header.shape for name, header in headers_in(weights).items()}
    replaced = {name: tensor for name, tensor in tensors.items() if name not in stored}
    for name, tensor in replaced.items():
        if shapes.get(name) != tuple(tensor.shape):
            has = f"with shape {shapes[name]}" if name in shapes else "not at all"
            raise QzoError(
                f"{source} has {name} {has}, the tuned one has shape {tuple(tensor.shape)}; give the checkpoint "
                "that these tensors were tuned on"
            )
    for own in stored.values():
        replaced |= own

    def write(folder: Path) -> None:
        for file in weights:
            _rewrite(file, replaced, folder / file.name)

    return write


def _rewrite(file: Path, tensors: Tensors, target: Path) -> None:
    from safetensors.torch import save_file

    with opened(file) as tensors_of:
        names = list(tensors_of.keys())
        if not tensors.keys() & set(names):
            shutil.copyfile(file, target)
            return
        old, metadata = {name: tensors_of.get_tensor(name) for name in names}, tensors_of.metadata()
    new = {name: tensors.get(name, tensor).to("cpu", tensor.dtype).contiguous() for name, tensor in old.items()}
    for name in new.keys() & tensors.keys():
        if new[name].is_floating_point() and not bool(new[name].isfinite().all()):
            raise QzoError(
                f"{name} has numbers that {new[name].dtype}, which {file.name} keeps it in, cannot hold; go back to a "
                "state before it diverged"
            )
    save_file(new, target, metadata)
    target.chmod(file.stat().st_mode)
