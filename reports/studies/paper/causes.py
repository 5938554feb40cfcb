"""Why a printed number differs from what the bench's own method needs: one sentence a method, with its evidence."""

from __future__ import annotations

from reports.records import Record
from reports.tables.sizes import GIBI

CHECKPOINTED = ("lora", "qlora")  # the paper trains adapters with gradient checkpointing
MOVING = ("noise", "temporaries")


def cause(method: str, own: Record, tried: Record) -> str:
    """The cause of a row's distance.

    Args:
        method: the row's method.
        own: the record of the bench's own method.
        tried: the record of the simulation that has the cause in it.
    """
    moving = sum(tried["at_peak"][role] for role in MOVING)
    at_peak = f"{GIBI.show(moving)} GiB of noise and temporaries at the peak, ours {GIBI.show(_moving(own))}"
    slack = f"{GIBI.show(tried['peak']['reserved'] - tried['peak']['allocated'])} GiB reserved beyond allocated"
    if method == "mezo":
        return (
            "Out-of-place steps: z, d z, decay w and their sum exist at once, each as large as the embedding "
            f"({at_peak}), and the sizes of the other layers leave gaps in the allocator ({slack})."
        )
    if method == "qzo":
        return (
            "Each layer's weight is rebuilt whole in fp16, and while Triton tunes the kernel that does it a buffer of "
            f"256 MiB is held ({at_peak}; {slack}). The out-of-place step itself costs little: scales are small."
        )
    if method == "qzo-2bit":
        return (
            "The unquantized parts are trained too, by out-of-place steps: four tensors of the embedding's size "
            f"({at_peak}; {slack})."
        )
    if method in CHECKPOINTED:
        kept = tried["at_peak"]["activations"] - own["at_peak"]["activations"]
        return (
            f"Without gradient checkpointing {GIBI.show(kept)} GiB more activations are kept. The printed number is "
            "nearer to that: an inference, the paper says that checkpointing was on."
        )
    return "Not found."


def _moving(record: Record) -> int:
    return sum(record["at_peak"][role] for role in MOVING)
