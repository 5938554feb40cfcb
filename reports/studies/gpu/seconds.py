"""Tables of a GPU's seconds: steps, what they launch, and products beside cuBLAS and the memory limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reports.tables.table import Table

Row = Mapping[str, Any]
ORDER = (
    "two forward passes", "qzo", "qzo by kernels", "qzo-full", "qzo-2bit", "qzo-reference", "mezo", "mezo-reference",
    "lora", "qlora", "ft-sgd",
)  # fmt: skip
OURS, RELEASED = "qzo by kernels", "mezo-reference"
SHOWN = (1, 128, 512)  # tokens of a product


def steps(seconds: Row) -> Table:
    """Seconds of a step by model, method and shape of the batch."""
    shapes = list(dict.fromkeys((s["batch_size"], s["seq_len"]) for row in seconds["rows"] for s in row["shapes"]))
    best = fastest(seconds)
    names = list(dict.fromkeys((row["model"], row["method"]) for row in in_order(seconds["rows"])))
    rows = []
    for name in names:
        rows.append([*name, *(f"{best[*name, shape]:.3f}" if (*name, shape) in best else "" for shape in shapes)])
    headers = ["model", "method", *(f"{batch} x {tokens}, s" for batch, tokens in shapes)]
    notes = [
        "Medians of steps, each ended by a synchronization; of several sessions the lower. Nothing else ran on the "
        "card, but others used the processors beside it, and a step of a small batch waits for these: in session 2 two "
        "forward passes of Llama-2-7B took 0.083 s at 1 x 128 and 0.047 at 1 x 512.",
        "Two forward passes: of the bf16 model, logits at the label alone; no method that evaluates twice can be "
        "faster on this model without kernels of its own.",
        "qzo: by PyTorch's operators, which launch 36,000 kernels; by kernels: `QZO_KERNELS=triton` and z of Philox.",
        *(f"{OURS}, {model}: {faster} as fast as MeZO as released." for model, faster in ratios(best).items()),
    ]
    return Table("Seconds of a step", headers, rows, notes, text_columns=2)


def fastest(seconds: Row) -> dict[Any, float]:
    """(model, method, shape) -> the lowest median of the sessions."""
    found: dict[Any, float] = {}
    for row in seconds["rows"]:
        for s in row["shapes"]:
            key = row["model"], row["method"], (s["batch_size"], s["seq_len"])
            found[key] = min(found.get(key, s["median"]), s["median"])
    return found


def ratios(best: Mapping[Any, float]) -> dict[str, str]:
    """Model -> how many times as fast as MeZO as released a step by kernels is, shape by shape."""
    found: dict[str, list[str]] = {}
    for (model, method, shape), taken in best.items():
        if method == OURS and (model, RELEASED, shape) in best:
            times = f"{best[model, RELEASED, shape] / taken:.1f} times at {shape[0]} x {shape[1]}"
            found.setdefault(model, []).append(times)
    return {model: ", ".join(times) for model, times in found.items()}


def launches(seconds: Row) -> Table:
    """Launches of a step, and how much of its time the GPU worked."""
    rows = []
    for row in in_order(seconds["rows"]):
        profile = row["profile"]
        if profile is None:
            continue
        last = row["shapes"][-1]
        rows.append(
            [row["model"], row["method"], str(row["session"]), f"{last['batch_size']} x {last['seq_len']}",
             f"{profile['launches']:,}", f"{profile['device_seconds']:.3f}", f"{last['median']:.3f}",
             f"{100 * profile['device_seconds'] / last['median']:.0f} %"]
        )  # fmt: skip
    headers = ["model", "method", "session", "tokens", "launches", "kernels, s", "step, s", "GPU busy"]
    return Table("Kernels of a step", headers, rows, text_columns=4)


def products(measured: Row) -> Table:
    """Microseconds of x Wᵀ, by format, shape and tokens."""
    rows = []
    for row in measured["rows"]:
        if row["status"] != "ok":
            continue
        for entry in row["tokens"]:
            if entry["tokens"] in SHOWN:
                taken = {name: f"{found * 1e6:,.0f}" for name, found in entry["seconds"].items()}
                rows.append(
                    [row["format"], " x ".join(map(str, row["shape"])), str(entry["tokens"]),
                     *(taken[name] for name in ("dense", "operators", "rebuilt", "codes", "both")),
                     f"{row['rebuild_seconds'] * 1e6:.0f}", f"{row['rebuild_limit'] * 1e6:.0f}"]
                )  # fmt: skip
    notes = [
        "Medians of ten, with nothing in the cache; a layer of Llama-2-7B, its widest, and one of the 13B model. "
        "dense: cuBLAS with a bf16 weight. rebuilt: the weight by one launch, then cuBLAS. codes: multiplied with as "
        "they are. both: two products along ±eps z, drawn within. The last two columns: the rebuild alone, and for how "
        "long the memory is busy with it.",
        f"Rebuilt weights have the bits of the operators: {_same(measured)}.",
    ]
    headers = [
        "format", "N x K", "tokens", "dense, µs", "operators", "rebuilt", "codes", "both", "rebuild alone", "its limit",
    ]  # fmt: skip
    return Table("Products with packed weights", headers, rows, notes, text_columns=3)


def _same(measured: Row) -> str:
    good = [row for row in measured["rows"] if row.get("same_bits")]
    return f"{len(good)} of {len(measured['rows'])}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Larger models first, methods as in `ORDER`; failed ones are left out."""
    peaks: dict[str, int] = {}
    for row in rows:
        for s in row["shapes"]:
            peaks[row["model"]] = max(peaks.get(row["model"], 0), s["peak_allocated"] or 0)
    good = [row for row in rows if row["status"] == "ok"]
    return sorted(good, key=lambda row: (-peaks[row["model"]], row["model"], ORDER.index(row["method"])))
