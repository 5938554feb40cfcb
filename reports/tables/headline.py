"""The result in a sentence, computed from the records."""

from __future__ import annotations

from collections.abc import Sequence

from reports.records import BASELINES, CPU, FRUGAL, PAPER_BASELINE, Record, find, is_ok, needed_bytes, ratio
from reports.tables.cards import CARDS_GIB, smallest_card, verdict
from reports.tables.reduction import times
from reports.tables.sizes import unit_for

QUOTED = (PAPER_BASELINE, *(name for name in BASELINES if name != PAPER_BASELINE))


def headline(records: Sequence[Record]) -> str:
    """What `qzo` takes, beside full fine-tuning and frugal backpropagation, and the smallest card; "" without it."""
    record = find(records, "qzo")
    if record is None:
        return ""
    if not is_ok(record):
        return " ".join(f"qzo: {record['status']}: {record['message']}".split())
    unit = unit_for(records)
    case = record["case"]
    sentence = (
        f"qzo: {unit.show(record['peak']['allocated'])} {unit.name} allocated at the peak "
        f"({record['world']}, batch {case['batch_size']}, {case['seq_len']} tokens)"
    )
    ratios = {baseline: ratio(find(records, baseline), record, "allocated") for baseline in QUOTED}
    known = [f"{times(value)} less than {baseline}" for baseline, value in ratios.items() if value is not None]
    return ", ".join([sentence, *known]) + f". {_beside_frugal(records, record)}{_room(record)}."


def _beside_frugal(records: Sequence[Record], record: Record) -> str:
    """What backpropagation needs where it saves all it can, which is less than `qzo` needs in some cases."""
    ratios = {name: ratio(find(records, name), record, "allocated") for name in FRUGAL}
    known = [f"{times(value)} as much with {name}" for name, value in ratios.items() if value is not None]
    return f"Frugal backpropagation allocates {' and '.join(known)}. " if known else ""


def _room(record: Record) -> str:
    nbytes, kind = needed_bytes(record)
    assert nbytes is not None  # an ok record has allocated bytes
    unit = unit_for([record])
    if record["world"] == CPU:
        return f"Peak RSS {unit.show(nbytes)} {unit.name}" if kind == "process" else "Peak RSS unknown"
    card = smallest_card(nbytes) or CARDS_GIB[-1]
    return f"By its {unit.show(nbytes)} {unit.name} of {kind} bytes, on a card of {card} GiB: {verdict(nbytes, card)}"
