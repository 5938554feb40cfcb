"""The library `hqq`: its modules taken over to be trained and given back, and weights it quantizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError, required
from qzo.formats.hqq.codes import CODE_BITS, HqqLayout
from qzo.formats.hqq.layer import HqqLinear, HqqOrigin
from qzo.formats.hqq.nesting import nest, unnest
from qzo.quiet import quiet_libraries

KINDS = (HqqLinear,)
PATCHED = ("hqq.backends.", "gemlite")  # modules that hold the scales in the order of a kernel
TENSORS = ("scale", "zero", "scale_q", "zero_q", "meta_scale", "meta_zero")


def adopt(module: nn.Module) -> HqqLinear | None:
    """The layer for an HQQLinear, on its tensors; None for any other module.

    Its forward is never called again, so that no backend keeps a copy of the scales. Scales and zero points that are
    quantized themselves are un-nested. Raises QzoError for layers that were patched for another kernel, whose
    scales are not those of HQQ any more.
    """
    kind = type(module)
    if kind.__module__.startswith(PATCHED):
        raise QzoError(
            f"a {kind.__name__} keeps its scales in the order of its kernel; adopt the model before it is patched "
            "(prepare_for_inference)"
        )
    if kind.__name__ != "HQQLinear" or not kind.__module__.startswith("hqq."):
        return None
    library: Any = module
    if not library.ready or library.meta is None or library.W_q is None:
        raise QzoError("the HQQLinear holds no codes yet; quantize or load the model first")
    origin = HqqOrigin(quant_config=library.quant_config, module=module)
    return from_meta(library.W_q.detach(), library.meta, library.bias, origin)


def from_meta(words: Tensor, meta: dict[str, Any], bias: Tensor | None, origin: HqqOrigin) -> HqqLinear:
    """The layer for the tensors and the dictionary `meta` of the library; no tensor is copied but nested ones.

    Raises QzoError for settings that contradict each other or the tensors, of any type.
    """
    layout = layout_of(meta)
    word_view = words.dtype if words.dtype != layout.word_dtype else None
    if word_view is not None:
        words = _viewed(words, layout)
    found: dict[str, Tensor] = {}
    nested: dict[str, Any] = {}
    for name in ("scale", "zero"):
        tensor = meta.get(name)
        if meta.get(f"quant_{name}"):
            codes, own = meta.get(f"{name}_q"), meta.get(f"meta_{name}")
            tensor = unnest(codes, own, layout.scales_shape)
            nested[name] = codes, own
        if not isinstance(tensor, Tensor):
            raise QzoError(f'meta["{name}"] is not a tensor; offloaded or merged scales cannot be trained')
        found[name] = tensor
    rest = {"view_as_float": False, "quant_scale": False, "quant_zero": False, "unpack_view_dtype": layout.word_dtype}
    rest |= {key: value for key, value in meta.items() if key not in TENSORS}
    known = HqqOrigin(rest, origin.quant_config, word_view, nested, origin.module)
    return HqqLinear(layout, words, found["scale"], found["zero"], bias, known)


def layout_of(meta: dict[str, Any]) -> HqqLayout:
    """The layout that the library's settings name. Raises QzoError for ones that are none."""
    shape, n_bits, group_size, axis = (meta.get(key) for key in ("shape", "nbits", "group_size", "axis"))
    numbers: list[Any] = [*shape, group_size, axis] if isinstance(shape, tuple | list) and len(shape) == 2 else [None]
    if not all(type(number) is int for number in numbers) or type(n_bits) not in (int, float):
        raise QzoError(f"shape={shape}, nbits={n_bits}, group_size={group_size}, axis={axis} are no layout of HQQ")
    exact = round(float(n_bits or 0), 2)  # 1.58 is an fp32 number in safetensors
    layout = HqqLayout(numbers[1], numbers[0], int(exact) if exact.is_integer() else exact, *numbers[2:])
    if meta.get("packing") not in CODE_BITS or meta["packing"] != layout.packing:
        raise QzoError(f"packing={meta.get('packing')} does not hold codes of {n_bits} bits; need {layout.packing}")
    return layout


def release(layer: Any) -> nn.Module:
    """The library's module with the layer's tensors and its scales, nested again where they were."""
    origin = layer.origin
    module: Any = origin.module if origin.module is not None else _new(layer)
    words = layer.codes if origin.word_view is None else layer.codes.view(origin.word_view)
    module.W_q = nn.Parameter(words, requires_grad=False)
    module.meta = {**origin.meta, "compute_dtype": layer.compute_dtype, **parts(layer, layer.scales)}
    module.bias = layer.bias
    module.device, module.ready = str(words.device), True
    return module


def parts(layer: HqqLinear, scales: Tensor) -> dict[str, Any]:
    """The tensors in the library's dictionary, for some values of the scales."""
    nested = layer.origin.nested
    found: dict[str, Any] = {}
    for name, tensor in (("scale", scales), ("zero", layer.zero_points)):
        if name not in nested:
            found[name] = tensor.to(layer.compute_dtype)
            continue
        codes, own = nested[name] if name == "zero" else nest(tensor, *nested[name])  # zero points have not moved
        found[f"{name}_q"], found[f"meta_{name}"] = codes, own
    return found


def quantize(
    weight: Tensor, bias: Tensor | None = None, n_bits: float = 4, group_size: int = 64, axis: int = 1
) -> HqqLinear:
    """Quantize `weight` [N, K] as the library does by default; one on `meta` gives an empty layer. No bias is copied.

    Extra memory: several fp32 copies of the weight. Raises QzoError, also where the library is missing.
    """
    rows, columns = weight.shape
    if weight.is_meta:
        rest = (bias is not None, weight.dtype, weight.device)
        return HqqLinear.empty(columns, rows, n_bits, group_size, axis, *rest)
    layout = HqqLayout(columns, rows, n_bits, group_size, axis)
    library = _library()
    words, meta = library.Quantizer.quantize(
        weight.detach(),
        nbits=layout.n_bits if layout.n_bits == 1.58 else int(layout.n_bits),
        group_size=layout.group_size,
        axis=layout.axis,
        round_zero=layout.n_bits == 4,
        device=str(weight.device),
    )
    return HqqLinear(layout, words.contiguous(), meta["scale"].to(weight.dtype), meta["zero"].to(weight.dtype), bias)


def _viewed(words: Tensor, layout: HqqLayout) -> Tensor:
    """Words that were shown as floating numbers (`view_as_float`), as themselves."""
    try:
        return words.view(layout.word_dtype)
    except RuntimeError as error:
        raise QzoError(f"codes are {words.dtype} {tuple(words.shape)}, need {layout.word_dtype}") from error


def _new(layer: HqqLinear) -> Any:
    """A module of the library without tensors, for a layer that came from a file."""
    meta, layout = layer.origin.meta, layer.layout
    module = _library().HQQLinear(None, None, compute_dtype=layer.compute_dtype, initialize=False)
    weight = {"nbits": layout.n_bits, "group_size": layout.group_size, "axis": layout.axis}
    options = {"channel_wise": True, "optimize": True, "round_zero": False, "view_as_float": False}
    weight |= {key: meta.get(key, default) for key, default in options.items()}
    module.quant_config = {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None}
    module.in_features, module.out_features = layer.in_features, layer.out_features
    return module


def _library() -> Any:
    with quiet_libraries():
        return required("hqq.core.quantize", "'qzo[hqq]'")
