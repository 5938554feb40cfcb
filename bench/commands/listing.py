"""The names that `bench run` takes."""

from __future__ import annotations

from bench.cases import catalog, gpus
from bench.cases.methods import TABLE
from bench.cases.quantizations import FORMATS

GIB = 1 << 30


def print_names(what: str) -> int:
    """Print models with parameters, methods with their summary, GPUs with memory, or quantizations with their bits."""
    if what == "models":
        for name in catalog.names():
            entry = catalog.entry(name)
            weights = "weights here" if entry.weights else "architecture"
            print(f"{name:<16} {entry.parameters:>15,} parameters  {weights:<13} {entry.hub}")
    elif what == "gpus":
        for name in gpus.names():
            gpu = gpus.get(name)
            major, minor = gpu.compute_capability
            print(f"{name:<12} {gpu.memory_bytes / GIB:6.1f} GiB  compute capability {major}.{minor}")
    elif what == "quantizations":
        for name, known in FORMATS.items():
            groups = "groups of 128, 64 or 32" if known.group_size == 0 else f"groups of {known.group_size}"
            groups = "one scale a row" if known.group_size is None else groups
            print(f"{name:<13} {known.bits} bits, {groups}")
    else:
        from bench.methods import METHODS

        for method in TABLE:
            mark = "" if method.by_default else "[only where asked for] "
            print(f"{method.name:<18} {mark}{(METHODS[method.name].__doc__ or '').splitlines()[0]}")
    return 0
