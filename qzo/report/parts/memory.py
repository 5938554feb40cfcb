"""Memory by role: the run as it measured itself, and simulations of it and of what others would have needed."""

from __future__ import annotations

from collections.abc import Sequence

from qzo.report.html import Html, element, legend, table
from qzo.report.peaks import REST, ROLES, Peak
from qzo.report.reading import Story
from qzo.report.sizes import size

TITLES = {
    "qzo": "QZO",
    "mezo": "MeZO",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "ft": "full fine-tuning",
    "ft-bf16": "full, 8 bytes a parameter",
    "ft-amp": "full, 16 bytes a parameter",
}
NOTE = (
    "Simulated: one step on the run's largest batch, {rows:,} rows of {tokens:,} tokens, allocated bytes of tensors; "
    "LoRA and QLoRA as the Trainer of transformers runs them, full fine-tuning with weights, gradients and AdamW "
    "moments in bf16 (8 bytes) and in fp32 under bf16 autocast (16 bytes)."
)
RSS = (
    "Measured: the peak of the process's resident memory from its start, so libraries, the reading of the model and "
    "validations count; tensors of the model and the optimizer's state are counted, the rest is what is left."
)
CUDA = (
    "Measured: the peak of PyTorch's allocator on the GPU, validations included; tensors of the model and the "
    "optimizer's state are counted, the rest is what is left."
)


def memory_section(story: Story, peaks: Sequence[Peak], missing: str | None) -> Html:
    """Bars, all to one scale, a table of the same numbers, and how they came about."""
    notes = [missing[0].upper() + missing[1:] + "."] if missing else []
    if any(peak.world.startswith("simulated") for peak in peaks):
        batch = story.facts["batch"]
        notes.append(NOTE.format(rows=batch["rows"], tokens=batch["tokens"]))
        if story.settings.get("layers") is not None or story.settings.get("directions", 1) != 1:
            notes.append("The simulation of this run is of all layers and one direction.")
    if any(peak.world == "measured" for peak in peaks):
        notes.append(CUDA if "allocated" in story.peak else RSS)
    else:
        notes.append("The run recorded no peak of its own.")
    largest = max((peak.total for peak in peaks), default=0)
    shown = [_legend(peaks), element("div", *(_bar(peak, largest) for peak in peaks), klass="bars"), _numbers(peaks)]
    return element(
        "section",
        element("h2", "Peak memory by role"),
        *(shown if largest else ()),
        *(element("p", note, klass="quiet") for note in notes),
    )


def _used(peaks: Sequence[Peak]) -> list[str]:
    return [role for role in (*ROLES, REST) if any(role in peak.roles for peak in peaks)]


def _legend(peaks: Sequence[Peak]) -> Html:
    return legend([(role, _klass(role)) for role in _used(peaks)])


def _bar(peak: Peak, largest: int) -> Html:
    widths = {role: f"width:{100 * nbytes / largest:.3f}%" for role, nbytes in peak.roles.items()}
    parts = [
        element("span", klass=_klass(role), style=width, title=f"{role}: {size(peak.roles[role])}")
        for role, width in widths.items()
    ]
    return element(
        "div",
        element("div", element("b", _title(peak)), " ", element("span", peak.world, klass="quiet"), klass="method"),
        element("div", *parts, klass="stack", aria_hidden="true"),
        element("div", peak.reason or size(peak.total), klass="total"),
        klass="row own" if peak.own else "row",
    )


def _numbers(peaks: Sequence[Peak]) -> Html:
    roles = _used(peaks)
    rows = [
        [
            _title(peak),
            peak.world,
            peak.reason or peak.kind,
            *(size(peak.roles.get(role)) for role in roles),
            size(peak.total) if peak.roles else "–",
        ]
        for peak in peaks
    ]
    shown = table(["method", "world", "what", *roles, "sum"], rows, text_columns=2)
    return element("details", element("summary", "The same in numbers"), shown)


def _title(peak: Peak) -> str:
    name = TITLES.get(peak.name, peak.name)
    return f"this run, {name}" if peak.own else name


def _klass(role: str) -> str:
    return f"role-{role.replace(' ', '-')}"
