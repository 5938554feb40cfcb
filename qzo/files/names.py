"""What a model calls the tensors of a checkpoint, by the renamings and joinings of transformers itself.

Published checkpoints have names of their own: an expert each (`mlp.experts.3.gate_proj`) where the model has stacks of
all, `block_sparse_moe` for `mlp`, `language_model.model` before the text part of a multimodal model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from qzo.errors import QzoError
from qzo.files.folder import Header
from qzo.files.joined import Joined
from qzo.files.leftovers import Leftovers, layer_number

TEXT_PARTS = ("language_model", "text_model", "llm")  # what wrappers of a text model call it
STACKED = (["MergeModulelist", "Concatenate"], ["MergeModulelist"])  # operations that make stacks of experts
APART = {  # of a stack that its authors publish whole -> names of quantizers, to whom an expert is linear layers
    "gate_up_proj": (["gate_proj", "up_proj"], ["gate_up_projs"]),
    "down_proj": (["down_proj"], ["down_projs"]),
}


@dataclass(frozen=True)
class Placed:
    """Where everything in the files goes.

    Args:
        layers: stored path of a quantized layer -> its path in the model; experts as `Site.names` has them.
        plain: stored name -> name in the model, of tensors that are one to one and of no quantized layer.
        joined: name in the model -> what is joined into it.
        left: stored names of what stays in the files: towers of multimodal models, what the class ignores, old buffers.
        unknown: stored names of what the model has no place for.
    """

    layers: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    joined: dict[str, Joined] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)

    def named(self, name: str) -> str | None:
        """A stored name as it is in the model; None for what is joined, or stays in the files."""
        path, _, last = name.rpartition(".")
        return f"{self.layers[path]}.{last}" if path in self.layers else self.plain.get(name)

    def stored(self, name: str) -> str:
        """The stored name of a tensor of the model that is not joined."""
        path, _, last = name.rpartition(".")
        return f"{self.stored_paths[path]}.{last}" if path in self.stored_paths else self._stored_names.get(name, name)

    def apart(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """Tensors with names in the model as the files hold them: by their stored names, joined ones taken apart.

        `model` is on meta. Raises QzoError for what cannot be taken apart.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            joined = self.joined.get(name)
            stored |= {self.stored(name): tensor} if joined is None else joined.split(name, tensor, model)
        return stored

    def targets(self) -> Iterator[str]:
        """All names in the model that something goes to, of quantized layers with a dot behind."""
        yield from (f"{path}." for path in self.layers.values())
        yield from self.plain.values()
        yield from self.joined

    @cached_property
    def stored_paths(self) -> dict[str, str]:
        """Path of a quantized layer in the model -> in the files."""
        return {path: stored for stored, path in self.layers.items()}

    @cached_property
    def _stored_names(self) -> dict[str, str]:
        return {name: stored for stored, name in self.plain.items()}


def owner_of(name: str, paths: Collection[str]) -> str | None:
    """The quantized layer that a tensor of a file belongs to, its bias included; None for what is of no such layer."""
    path, parts, _ = name.partition(".weight.")  # of bitsandbytes, several for a weight
    path = path if parts else name.rpartition(".")[0]
    return path if path in paths else None


def place(model: Any, headers: dict[str, Header], paths: Collection[str] = (), part: bool = False) -> Placed:
    """Place the tensors of some files in an unquantized model on meta.

    Args:
        model: as transformers builds it.
        headers: of all tensors.
        paths: stored paths of quantized layers.
        part: whether the model is the text part of what the files hold; the rest of them is left then.

    Raises QzoError for quantized layers that would have to be joined.
    """
    names, placed = _Names(model, part, apart=bool(paths)), Placed()
    leftovers = Leftovers(model, headers)
    placed.layers.update({path: found for path in paths if (found := names.of_layer(path)) is not None})
    for name, header in headers.items():
        path = owner_of(name, paths)
        if path in placed.layers:
            continue
        target, pattern, converter = names.of(name) if path is None else (None, None, None)
        if target is not None and converter is None:
            placed.plain[name] = target
        elif target is not None and pattern is not None:
            placed.joined.setdefault(target, Joined({}, converter)).sources[name] = pattern
        elif names.is_elsewhere(name) or leftovers.has(name, header):
            placed.left.add(name)
        else:
            placed.unknown.append(name)
    for joined in placed.joined.values():
        ordered = sorted(joined.sources.items(), key=lambda item: _natural(item[0]))
        joined.sources.clear()
        joined.sources.update(ordered)
    return placed


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers between dots as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _converters() -> list[Any]:
    """What makes stacks of experts, whatever the family, of what quantizers write that take stacks apart."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found = []
    for target, (single, listed) in APART.items():
        sources = [[f".experts.*.{name}.weight" for name in single], [f".experts.{name}.*.weight" for name in listed]]
        for patterns in sources:
            operations = [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(patterns) == 2 else [])]
            found.append(WeightConverter(patterns, f".experts.{target}", operations))
    return found


class _Names:
    """The names that one model has for those of published checkpoints."""

    def __init__(self, model: Any, part: bool, apart: bool) -> None:
        """`apart` is whether a quantizer may have taken stacks of experts apart, which transformers does not undo."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if not isinstance(transform, WeightRenaming)]
        self.converters += _converters() if apart else []  # those of transformers first
        self.expected = model.state_dict(keep_vars=True)
        self.base, self.part = str(model.base_model_prefix), part
        self.children = {name for name, _ in model.named_children()} - {self.base}
        base = getattr(model, self.base, None) if self.base else None
        self.children |= set() if base is None else {f"{self.base}.{name}" for name, _ in base.named_children()}

    def of(self, name: str) -> tuple[str | None, str | None, Any]:
        """The name in the model, and where it is joined there the pattern and converter; three times None for none."""
        if name in self.expected:
            return name, None, None
        for candidate in self._candidates(name):
            renamed = self._renamed(candidate)
            if renamed in self.expected:
                return renamed, None, None
            for converter in self.converters:
                joined, pattern = converter.rename_source_key(renamed)
                if pattern is not None:
                    if joined in self.expected:
                        return joined, pattern, converter
                    break
        return None, None, None

    def of_layer(self, path: str) -> str | None:
        """The path in the model of a quantized layer, an expert's as `Site.names` has it; None where it has none."""
        stack, _, number = path.rpartition(".")
        if number.isdecimal() and stack in self.expected and self.expected[stack].dim() == 3:
            return path
        target, pattern, converter = self.of(f"{path}.weight")
        if target is None or pattern is None:
            return None if target is None else target.removesuffix(".weight")
        numbers = re.findall(r"\.(\d+)(?=\.)", f"{path}.")  # the expert's is the last
        operations = [type(operation).__name__ for operation in converter.operations]
        place, _, last = target.rpartition(".")
        if operations not in STACKED or last not in ("gate_up_proj", "down_proj") or not numbers:
            raise QzoError(
                f"{path} is quantized, and transformers joins it with others into {target}, which cannot be done with "
                "codes; take a checkpoint of another format"
            )
        halves = last == "gate_up_proj" and len(converter.source_patterns) == 2
        names = ("gate_proj", "up_proj") if halves else (last,)
        return f"{place}.{names[converter.source_patterns.index(pattern)]}.{numbers[-1]}"

    def is_elsewhere(self, name: str) -> bool:
        """Whether a name without a place is of a part of the files that is not built, such as a vision tower."""
        if not self.part or any(name.startswith((f"{text}.", f"model.{text}.")) for text in TEXT_PARTS):
            return False
        names = [name, *(self._renamed(candidate) for candidate in self._candidates(name))]
        return not any(one.startswith(f"{child}.") for one in names for child in self.children)

    def _renamed(self, name: str) -> str:
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def _candidates(self, name: str) -> Iterator[str]:
        """The name itself, without the names of wrappers, with and without that of the base model."""
        plain = [name]
        if self.part:
            prefixes = [f"{wrapper}{text}." for text in TEXT_PARTS for wrapper in ("model.", "")]
            plain += [name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)]
        for candidate in plain:
            yield candidate
            if self.base and not candidate.startswith(f"{self.base}."):
                yield f"{self.base}.{candidate}"


def check_known(placed: Placed, headers: dict[str, Header], what: str | None = None) -> None:
    """Raise QzoError where the files hold a tensor that matters and the model has no place for it.

    `what` it is called in the message; None for the tensor of that name.
    """
    if not placed.unknown:
        return
    name = placed.unknown[0]
    file, known = headers[name].file, [layer_number(one) for one in placed.targets()]
    number, most = layer_number(name), max((one for one in known if one is not None), default=None)
    if number is not None and most is not None and number > most:
        raise QzoError(
            f"{file}: {name} is of layer {number}, but config.json implies layers 0 ... {most} only; they do not "
            "belong together: take config.json and weights from one checkpoint"
        )
    raise QzoError(
        f"{file}: the model has no {what or f'tensor {name}'}; config.json and weights do not belong together: take "
        "both from one checkpoint"
    )
