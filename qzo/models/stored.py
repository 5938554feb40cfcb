"""The one way in which a checkpoint becomes a model: quantized layers in their places, plain tensors beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qzo.errors import AGAIN, OTHER, QzoError, advised, named
from qzo.files.budget import check_counts
from qzo.files.finite import SMALL, check_stored, check_tensor
from qzo.files.folder import Header
from qzo.files.names import Placed, check_known, owner_of, place
from qzo.files.rewrite import Write
from qzo.files.settings import Source
from qzo.models.experts import check_experts, looks_like_experts
from qzo.models.inspection import Inspection, obstacle
from qzo.models.parts import Counted, count
from qzo.models.skeleton import check_architecture, check_tensors, dtype_of, finish, skeleton
from qzo.models.walk import every_site, freeze, output_head, replace_sites

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
DTYPES |= {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.int8: "I8"}
PARTS = ("scales", "codes", "zero_points", "offsets")  # and g_idx, where layers have one
Build = Callable[[str, Tensor, Tensor | None], nn.Module]
Batches = Iterable[dict[str, Tensor]]


class Stored(ABC):
    """A checkpoint in a folder: loaded, and summed up, by the few words that a format has for what it stores.

    A child has the abstract methods below, and
        format      quant_method
        source      the folder and its settings
        headers     of all stored tensors, by their stored names; raises QzoError for damaged files
        batches     () -> the tensors of each file; those of a quantized layer under its stored path, with the names
                    that they have in the layer
        write       tuned tensors under such names -> what writes the weights with them into a folder
        about       `version`, `n_bits` and `group_size` of an Inspection
    and where they are not these:
        saved_as    `checkpoint_format` of `qzo.checkpoints.save`; None where only its own files are written anew
        by_name     whether layers have the tensors of the files, under the same names
        copied      whether the model gets copies of what is in batches, which lies in a mapped file or is a view
        more        the set of `qzo.trainable` that trains more of a quantized layer than its scales
        moving      what moves with scales, see `Inspection`
    """

    format: str
    source: Source
    headers: dict[str, Header]
    batches: Callable[[], Batches]
    write: Callable[[dict[str, Tensor]], Write]
    about: dict[str, Any]
    saved_as: str | None = None
    by_name = False
    copied = False
    more: str = "scales+offsets"
    moving: str = ""

    @abstractmethod
    def paths(self) -> Collection[str]:
        """Of the quantized layers, as they are stored."""

    @abstractmethod
    def builder(self) -> tuple[Build, int]:
        """What makes the layer of a path, and how many weights a stored number may stand for.

        The first gets the stored path, the weight [N, K] that is to be replaced, on meta and in the dtype of the model,
        and a bias [N] or None. Both raise QzoError: for settings that are not supported, and tensors that do not fit.
        """

    @abstractmethod
    def counted(self, left: Collection[str]) -> Counted:
        """Numbers and bytes of each part that an Inspection tells of, "unquantized" included.

        `left` are stored names of tensors that do not count, since the model has none of them.
        """

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.source.path

    def plain(self) -> dict[str, Header]:
        """Headers of tensors that the model has as they are stored, by their stored names."""
        paths = () if self.by_name else self.paths()
        return {name: header for name, header in self.headers.items() if layer_of(name, paths) is None}

    @advised(AGAIN)
    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model with quantized layers on the tensors of the files, everything frozen; the rest is cast to `dtype`.

        Memory: itself and the tensors of one file. Raises QzoError for what does not belong together, before data is
        read.
        """
        dtype = dtype or dtype_of(self.source.config)
        model, layers = self.empty(dtype)
        own = _buffers(layers)
        if not self.by_name:  # what is read is made of what is stored, whose names are told
            self._check_numbers(own)
        for tensors in self._in_model(model, self._finite()):
            ready = {}
            for name, tensor in tensors.items():
                cast = tensor.is_floating_point() and name not in own
                ready[name] = tensor.to(device, dtype if cast else tensor.dtype, copy=self.copied)
                if ready[name].dtype != tensor.dtype:
                    check_tensor(f"{self.folder}: {name}", ready[name])
            model.load_state_dict(ready, strict=False, assign=True)
        finish(model, device)
        return freeze(model).eval()

    def changed(self, live: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Of a model that was loaded from here, the live tensors by name whose values are no longer those of the files.

        A value of the files is taken as it was loaded, in the dtype that it has in the model. None where `live` lacks a
        tensor or has other codes: it is a model of other files. Memory: the tensors of one file.
        """
        found = {}
        for tensors in self._in_model(self.blank, self.batches()):
            for name, stored in tensors.items():
                own = live.get(name)
                if own is None or own.shape != stored.shape:
                    return None
                if torch.equal(stored.to("cpu", own.dtype), own.detach().cpu()):
                    continue
                if not own.is_floating_point():
                    return None
                found[name] = own.detach()
        return found

    def inspect(self, name: str) -> Inspection:
        """What headers and settings tell; `reason` is None just where loading needs no more than sound data."""
        reason, finite = obstacle(self.folder, self._check)
        left = self.placed.left if reason is None else set()
        counts, sizes = self.counted(left)
        scales = counts["scales"]
        trained = {
            "scales": scales,
            self.more: scales + counts.get("offsets", 0) + counts.get("codebooks", 0),
            "scales+unquantized": scales + counts["unquantized"],
        }
        return Inspection(
            name,
            self.format,
            **self.about,
            settings=self.source.settings or {},
            layers=len(self.paths() if reason is not None else self.placed.layers),
            counts=counts,
            sizes=sizes,
            trainable=trained,
            reason=reason,
            finite=finite,
            moving=self.moving,
        )

    def _check(self) -> None:
        """All that `load` checks but the numbers of large tensors, which are not read. Raises QzoError."""
        _, layers = self.empty(dtype_of(self.source.config))
        self._check_numbers(_buffers(layers))

    def _check_numbers(self, own: set[str]) -> None:
        """Raise QzoError for numbers that are not finite, of small tensors and of layers, whose buffers are `own`."""
        files = {header.file.suffix for header in self.headers.values()}
        if files <= {".safetensors"}:
            check_stored(self.headers, self.paths())
            return
        for tensors in self.batches():  # mapped, so that no more is read than is looked at
            for name, tensor in tensors.items():
                if tensor.numel() <= SMALL or name in own:
                    check_tensor(f"{self.folder}: {name}", tensor)

    def _finite(self) -> Batches:
        """`batches`, looked at while they are read: all that `_check_numbers` did not see, and that the model has.

        Raises QzoError for a number that is NaN or infinite.
        """
        paths = self.paths()
        for tensors in self.batches():
            for name, tensor in tensors.items():
                is_large = tensor.numel() > SMALL
                is_seen = not self.by_name and not is_large and layer_of(name, paths) is None
                if not is_seen and not (is_large and name in self.placed.left):
                    check_tensor(f"{self.folder}: {name}", tensor)
            yield tensors

    @advised(AGAIN)
    def empty(self, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """The model on meta with quantized layers in their places, and path -> layer; no data is read.

        Raises QzoError for layers and tensors that the model has no place for, and for tensors that are missing.
        """
        build, _ = self.builder()
        model = self._skeleton(dtype)
        layers = self._put(model, build)
        known = self.implied() if self.by_name else _buffers(layers)
        check_tensors(self.folder, model, self.plain(), self.placed, known)
        return model, layers

    def implied(self) -> Container[str]:
        """Names in the model of what layers have without a tensor in the files; asked where they have their names."""
        return ()

    def _skeleton(self, dtype: torch.dtype) -> Any:
        """The unquantized model on meta, its text part where it has others. Raises QzoError."""
        folder, config = self.folder, self.source.config
        _, per_number = self.builder()
        check_counts(folder, config, len(self.headers))
        check_architecture(folder, config)
        if not self.paths():
            raise QzoError(
                f"{folder}: no tensor holds codes, and config.json says {self.format}; take config.json and weights "
                "from one checkpoint"
            )
        model, part = skeleton(folder, self.headers, dtype, per_number, part=True)
        vars(self)["placed"] = place(model, self.headers, self.paths(), part)
        return model

    @cached_property
    def placed(self) -> Placed:
        """Where everything in the files goes. Raises QzoError."""
        return cast(Placed, (self._skeleton(torch.bfloat16), vars(self)["placed"])[1])

    @cached_property
    def blank(self) -> Any:
        """A model on meta that operations on several tensors may ask for its shapes. Raises QzoError."""
        return self._skeleton(torch.bfloat16)

    def _in_model(self, model: Any, batches: Batches) -> Batches:
        """The tensors by their names in the model, file by file; what is joined comes when all of it is there."""
        placed, waiting = self.placed, {}
        target_of = {name: target for target, joined in placed.joined.items() for name in joined.sources}
        for tensors in batches:
            ready = {}
            for name, tensor in tensors.items():
                target = target_of.get(name)
                if target is not None:
                    waiting[name] = tensor
                    sources = placed.joined[target].sources
                    if all(source in waiting for source in sources):
                        parts = {source: waiting.pop(source) for source in sources}
                        ready[target] = placed.joined[target].join(target, parts, model)
                elif (own := placed.named(name)) is not None:
                    ready[own] = tensor
            yield ready

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """What writes the weights into a folder with tensors replaced, which have their names in the model.

        One that is joined of several in the files is taken apart. Raises QzoError for one that has no place.
        """
        paths, headers = self.paths(), self.headers
        if all(name in headers or name.rpartition(".")[0] in paths for name in tensors):
            return self.write(tensors)
        with named(str(self.folder)):
            stored = self.placed.apart(tensors, self.blank)
        return self.write(stored)

    def _put(self, model: Any, build: Build) -> dict[str, Any]:
        """Put a layer in the place of each path, with a bias where the model or the checkpoint has one."""
        placed, headers = self.placed, self.headers
        self._check_layers()
        paths = set(placed.stored_paths)
        sites = [site.for_layers(paths) for site in every_site(model)]
        sites = [site for site in sites if paths & set(site.names())]
        names = [name for site in sites for name in site.names()]
        unknown = min(paths - set(names), default=None)
        if unknown is not None:
            kind = type(dict(model.named_modules())[unknown]).__name__
            raise QzoError(
                f"{self.folder}: {unknown} is a quantized {kind}; only linear layers are trained: take a checkpoint "
                "that leaves it unquantized"
            )
        layers: dict[str, Any] = {}
        head = output_head(model)

        def made(index: int, weight: Tensor, bias: Tensor | None) -> nn.Module:
            path = names[index]
            stored = placed.stored_paths.get(path)
            if stored is None:
                raise QzoError(f"{path} is not quantized and other experts beside it are; take another checkpoint")
            if bias is None and f"{stored}.bias" in headers:
                bias = weight.new_empty(len(weight))
            layers[path] = build(stored, weight, bias)
            return layers[path]

        with named(str(self.folder)):
            for site in sites:
                if looks_like_experts(site.module):
                    check_experts(site.paths[0], site.module, "take a checkpoint that leaves them unquantized")
            replace_sites(model, sites, made)
        if head is not None and output_head(model) is not head and getattr(model.config, "tie_word_embeddings", False):
            model.config.tie_word_embeddings = False  # the head has codes, the embedding has none
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return layers

    def _check_layers(self) -> None:
        """Raise QzoError where a quantized layer has no place in the model."""
        lost = {name: path for name in self.placed.unknown if (path := owner_of(name, self.paths())) is not None}
        if not lost:
            return
        name, path = min(lost.items(), key=lambda item: item[1])
        check_known(replace(self.placed, unknown=[name]), self.headers, f"linear layer {path}")


@dataclass(frozen=True)
class StoredModel(Stored):
    """A checkpoint whose layers follow from headers and settings alone.

    Args:
        format: e.g. "hqq" or "torchao".
        source: the folder and its settings.
        headers: of all stored tensors, by their stored names.
        layers: path -> quantized layer, its tensors on meta or on mapped memory.
        batches: () -> the tensors of each file, see `Stored`.
        write: tuned tensors -> what writes the weights with them into a folder.
        moving: what moves with scales, see `Inspection`.
    """

    format: str
    source: Source
    headers: dict[str, Header]
    layers: dict[str, Any]
    batches: Callable[[], Batches]
    write: Callable[[dict[str, Tensor]], Write]
    moving: str
    copied = True

    def paths(self) -> Collection[str]:
        """Of the quantized layers."""
        return self.layers.keys()

    def builder(self) -> tuple[Build, int]:
        """The layers there are; a stored number may hold 32 codes, of one bit, shown as fp32."""
        return self._fitting, 32

    def _fitting(self, path: str, weight: Tensor, bias: Tensor | None) -> Any:
        layer = self.layers[path]
        shape, wanted = (layer.out_features, layer.in_features), tuple(weight.shape)
        if shape != wanted:
            raise QzoError(f"it is quantized as {shape}, but config.json implies {wanted}; {AGAIN}")
        if bias is not None and layer.bias is None:
            raise QzoError(f"its bias is missing; {AGAIN}")
        layer.compute_dtype = weight.dtype  # of all around it
        return layer

    def counted(self, left: Collection[str]) -> Counted:
        """By the layers' tensors; settings that are stored as tensors are not counted."""
        plain = {name: header for name, header in self.plain().items() if name not in left}
        counts, sizes = count(plain, PARTS, lambda _: None)
        gone = {owner_of(name, self.layers) for name in left}
        for layer in (layer for path, layer in self.layers.items() if path not in gone):
            packed = {"codes": layer.in_features * layer.out_features, "zero_points": layer.scales.numel()}
            for part in (*PARTS, "g_idx"):
                tensor = getattr(layer, part, None)
                if tensor is not None:
                    counts[part] = counts.get(part, 0) + packed.get(part, tensor.numel())
                    sizes[part] = sizes.get(part, 0) + tensor.nbytes
        return counts, sizes

    @property
    def about(self) -> dict[str, Any]:  # type: ignore[override]
        """Bits and group size are None where the layers have several."""
        layers = self.layers.values()
        return {
            "version": ", ".join(sorted({layer.type_name for layer in layers})),
            "n_bits": _common({layer.n_bits for layer in layers}),
            "group_size": _common({layer.group_size for layer in layers}),
        }


def layer_of(name: str, paths: Collection[str]) -> str | None:
    """The quantized layer that a tensor of a file belongs to; None for a bias, and for what is of no such layer."""
    return None if name.endswith(".bias") else owner_of(name, paths)


def on_meta(name: str, header: Header) -> Tensor:
    """A tensor without data of what a header says. Raises QzoError for a dtype that no format here has."""
    dtype = next((dtype for dtype, word in DTYPES.items() if word == header.dtype), None)
    if dtype is None:
        raise QzoError(f"{header.file}: {name} is {header.dtype}, which is not known here; {OTHER}")
    return torch.empty(header.shape, dtype=dtype, device="meta")


def _buffers(layers: dict[str, Any]) -> set[str]:
    """Names of the layers' tensors but biases: those that are not cast."""
    return {f"{path}.{name}" for path, layer in layers.items() for name, _ in layer.named_buffers()}


def _common(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None
