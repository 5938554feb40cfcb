"""What the tables say: every cell from a record, unknown never as 0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sample_records import CODES, EMBEDDINGS_AND_NORMS, RANDOM_CODES, SCALES, make_failed, make_record

from reports.tables import cards, published
from reports.tables.breakdown import roles_table, totals_table
from reports.tables.document import build, to_markdown
from reports.tables.headline import headline
from reports.tables.reduction import reduction_table
from reports.tables.sizes import GIB, GIBI, MEBI, unit_for
from reports.tables.table import Table

MIB = 1 << 20
SMALL = {"weights": 57 * MIB, "quantization": 55 * MIB, "noise": 3 * MIB, "temporaries": 9 * MIB}


def cells(table: Table, method: str) -> dict[str, str]:
    """Header -> cell of a method's row."""
    row = next(row for row in table.rows if row[0] == method)
    return dict(zip(table.headers, row, strict=True))


def test_sizes_have_two_decimals_and_zero_is_told_from_little_and_from_unknown():
    assert [GIBI.show(n) for n in (None, 0, 1, GIB // 100, GIB, 1500 * GIB)] == [
        "n/a", "0", "<0.01", "0.01", "1.00", "1,500.00",
    ]  # fmt: skip


def test_unit_is_gib_unless_a_method_lies_below_one(records):
    assert unit_for(list(records.values())) is GIBI
    assert unit_for([make_record("qzo", {"weights": GIB})]) is GIBI
    assert unit_for([make_record("qzo", {"weights": GIB - 1}), records["ft-amp"]]) is MEBI
    assert unit_for([make_failed("qzo")]) is GIBI


def test_breakdown_shows_each_role_and_the_sum(records):
    row = cells(roles_table(list(records.values())), "ft-mixed")
    assert row == {
        "method": "ft-mixed", "status": "ok", "weights": "24.24", "quantization": "0", "gradients": "24.24",
        "optimizer": "96.98", "activations": "0", "noise": "0", "temporaries": "0.52", "unattributed": "0",
        "allocated": "145.98",
    }  # fmt: skip


def test_totals_show_floor_and_distance_to_it(records):
    record = records["qzo"] | {"step_seconds": 1.23456}
    row = cells(totals_table([record]), "qzo")
    floor = EMBEDDINGS_AND_NORMS + CODES + 4 * SCALES
    assert record["floor"] == floor
    assert row["peak/floor"] == f"{record['peak']['allocated'] / floor:.2f}" == "1.02"
    assert row["s/step"] == "1.235"
    assert (row["world"], row["reserved"], row["process"]) == ("simulated", "7.13", "7.53")


def test_failed_cell_shows_status_and_reason_and_no_zero(records):
    rows = [records["qzo"], make_failed("ft-amp", "oom", "CUDA out of memory")]
    roles = cells(roles_table(rows), "ft-amp")
    assert (roles.pop("status"), roles.pop("reason"), roles.pop("method")) == ("oom", "CUDA out of memory", "ft-amp")
    assert set(roles.values()) == {"n/a"}
    assert set(list(cells(totals_table(rows), "ft-amp").values())[3:]) == {"n/a"}
    assert set(list(cells(cards.cards_table(rows), "ft-amp").values())[1:]) == {"n/a"}
    assert cells(roles_table(rows), "qzo")["reason"] == ""


def test_reason_column_is_there_only_when_something_failed(records):
    assert "reason" not in roles_table(list(records.values())).headers


def test_unknown_process_bytes_are_not_zero():
    row = cells(totals_table([make_record("qzo", process=None, reserved=None)]), "qzo")
    assert (row["reserved"], row["process"], row["s/step"]) == ("n/a", "n/a", "n/a")


def test_reduction_stands_beside_all_three_conventions(records):
    table = reduction_table(list(records.values()))
    row = cells(table, "qzo")
    qzo, mixed = records["qzo"]["peak"], records["ft-mixed"]["peak"]
    assert row["allocated, vs ft-mixed"] == f"{mixed['allocated'] / qzo['allocated']:.2f}x" == "20.75x"
    assert row["process, vs ft-mixed"] == f"{mixed['process'] / qzo['process']:.2f}x" == "19.48x"
    assert (row["allocated, vs ft-bf16"], row["allocated, vs ft-amp"]) == ("13.86x", "27.71x")
    text = " ".join(table.notes)
    for words in ("8 bytes a parameter", "12 bytes", "16 bytes", "batch 1, 128 tokens"):
        assert words in text


def test_reduction_is_unknown_across_worlds_cases_and_failures(records):
    qzo = records["qzo"]
    for baseline in (make_failed("ft-mixed"), make_record("ft-mixed", world="measured-cuda"),
                     make_record("ft-mixed", batch_size=2)):  # fmt: skip
        table = reduction_table([baseline, qzo])
        assert cells(table, "qzo")["allocated, vs ft-mixed"] == "n/a"
        assert any(note.startswith("n/a: ") for note in table.notes)


@pytest.mark.parametrize(
    ("nbytes", "card", "words"),
    [
        (8 * GIB, 8, "fits, 0.0 GiB left"),
        (8 * GIB + 1, 8, "needs 0.1 GiB more"),
        (8 * GIB - 1, 8, "fits, 0.0 GiB left"),
        (int(7.51 * GIB), 8, "fits, 0.4 GiB left"),
        (int(9.91 * GIB), 8, "needs 2.0 GiB more"),
    ],
)
def test_room_never_promises_more_than_there_is(nbytes: int, card: int, words: str):
    assert cards.verdict(nbytes, card) == words


def test_smallest_card():
    assert [cards.smallest_card(n) for n in (1, 8 * GIB, 8 * GIB + 1, 80 * GIB, 80 * GIB + 1)] == [8, 8, 12, 80, None]


def test_cards_go_by_process_bytes_and_mark_the_fallback(records):
    known = cells(cards.cards_table([records["qzo"]]), "qzo")
    assert (known["needs, GiB"], known["smallest card"]) == ("7.53", "8 GiB")
    assert (known["8 GiB"], known["24 GiB"]) == ("fits, 0.4 GiB left", "fits, 16.4 GiB left")
    table = cards.cards_table([records["qzo"], make_record("mezo", process=None)])
    assert cells(table, "mezo")["needs, GiB"] == "24.30†"
    assert any(note.startswith("† process bytes unknown: allocated") for note in table.notes)
    assert not any("†" in note for note in cards.cards_table([records["qzo"]]).notes)
    assert cells(cards.cards_table([records["ft-amp"]]), "ft-amp")["smallest card"] == "over 80 GiB"


def test_cpu_world_says_that_process_bytes_are_rss(records):
    record = make_record("qzo", SMALL, world="measured-cpu", gpu=None, reserved=None)
    for table in (cards.cards_table([record]), totals_table([record]), reduction_table([record])):
        assert "peak RSS" in " ".join(table.notes)
    assert "peak RSS" not in " ".join(cards.cards_table([records["qzo"]]).notes)


def test_paper_stands_beside_ours_in_its_own_unit():
    record = make_record("qzo", {"weights": 5_100_000_000}, model="llama2-7b", reserved=5_250_000_000, process=None)
    mixed = make_record("ft-mixed", {"weights": 90_000_000_000}, model="llama2-7b")
    table = published.published_table([mixed, record])
    row = cells(table, "qzo")
    assert (row["the paper's column"], row["paper"]) == ("QZO 4-bit", "5.0")
    assert (row["our allocated"], row["our reserved"], row["our process"]) == ("5.10 (+2.0%)", "5.25 (+5.0%)", "n/a")
    assert cells(table, "ft-mixed")["our allocated"] == "90.00 (-2.4%)"
    text = " ".join(table.notes)
    for words in ("FSDP", "first 100 optimization steps on SST-2", "RTX 4090", "batch 1, 128 tokens, flash attention",
                  "the paper 18.4x, our ft-mixed over qzo by allocated bytes 17.65x"):  # fmt: skip
        assert words in text


def test_caveats_of_the_paper_stand_only_beside_what_they_concern():
    without = published.published_table([make_record("ft-sgd", model="llama2-7b")])
    assert "FSDP" not in " ".join(without.notes)
    assert "differ in the last digit" not in " ".join(without.notes)


def test_paper_table_is_absent_for_other_models_and_methods_not_run():
    assert published.published_table([make_record("qzo", model="llama3.2-1b")]) is None
    assert published.published_table([make_record("lora", model="llama2-7b")]) is None
    assert published.published_table([make_record("qzo", model="llama2-7b"), make_record("lora", model="gpt2")]) is None


def test_failed_cell_beside_the_paper_is_unknown():
    row = cells(published.published_table([make_failed("qzo", model="llama2-7b")]), "qzo")
    assert (row["paper"], row["our allocated"]) == ("5.0", "n/a")


def test_printed_numbers_are_the_papers():
    models = json.loads(published.PAPER.read_text())["models"]
    printed = {name: {row["method"]: row["gb"] for row in model["rows"]} for name, model in models.items()}
    assert printed == {
        "opt-6.7b": {"ft-mixed": 87.6, "ft-sgd": 26.8, "lora": 14.0, "qlora": 5.6, "mezo": 14.8, "qzo": 4.8},
        "llama2-7b": {"ft-mixed": 92.2, "ft-sgd": 26.0, "mezo": 14.8, "qzo": 5.0},
        "llama3.1-8b": {"ft-mixed": 113.7, "ft-sgd": 31.9, "mezo": 20.4, "qzo": 6.2},
        "llama2-13b": {"qzo-2bit": 5.78},
    }
    for name in ("opt-6.7b", "llama2-7b", "llama3.1-8b"):
        assert models[name]["adamw_over_qzo"] == pytest.approx(
            printed[name]["ft-mixed"] / printed[name]["qzo"], abs=0.06
        )


def test_headline_is_computed(records):
    assert headline(list(records.values())) == (
        "qzo: 7.04 GiB allocated at the peak (simulated, batch 1, 128 tokens), 20.75x less than ft-mixed, "
        "13.86x less than ft-bf16, 27.71x less than ft-amp. "
        "Frugal backpropagation allocates 0.98x as much with qlora-lean and 1.01x as much with peqa-lean. "
        "By its 7.53 GiB of process bytes, on a card of 8 GiB: fits, 0.4 GiB left."
    )


def test_headline_without_a_baseline_or_room_or_gpu(records):
    assert "less than" not in headline([records["qzo"]])
    huge = make_record("qzo", {"quantization": 90 * GIB}, process=90 * GIB)
    assert headline([huge]).endswith("on a card of 80 GiB: needs 10.0 GiB more.")
    cpu = make_record("qzo", SMALL, world="measured-cpu", gpu=None, reserved=None, process=824 * MIB)
    assert headline([cpu]).endswith(". Peak RSS 824.00 MiB.")
    assert headline([make_failed("qzo", "oom", "no\nroom")]) == "qzo: oom: no room"
    assert headline([records["lora"]]) == ""


def test_headline_beside_frugal_backpropagation_of_another_case_says_nothing_of_it(records):
    assert "allocates 0.98x as much with qlora-lean. " in headline([records["qzo"], records["qlora-lean"]])
    assert "Frugal" not in headline([records["qzo"], make_record("qlora-lean", seq_len=512)])


def test_facts_name_the_methods_that_differ_and_pass_over_the_unknown(records):
    rows = [*records.values(), make_failed("zz-mine")]
    rows[5] = make_record("qlora", attention="eager", gradient_checkpointing=True)
    facts = dict(build(rows).facts)
    assert facts["attention"] == "flash; eager (qlora)"
    assert facts["gradient checkpointing"] == "off; on (qlora)"
    assert facts["parameters"] == "13,015,864,320"
    assert facts["world and GPU"] == "simulated rtx-4090"
    assert facts["versions"] == "torch 2.13.0, transformers 5.23.0, python 3.11.7, commit 0123456789ab"


def test_notes_of_the_records_are_shown_once_with_their_methods(records):
    assert build(list(records.values())).notes == [f"note (qzo-2bit): {RANDOM_CODES}"]
    assert build([records["qzo-2bit"]]).notes == [f"note: {RANDOM_CODES}"]


def test_markdown_survives_pipes_and_line_breaks_in_a_reason(records):
    text = to_markdown(build([records["qzo"], make_failed("lora", "error", "a | b\nc")]))
    line = next(line for line in text.splitlines() if line.startswith("| lora") and "error" in line)
    assert "a \\| b c" in line


def test_reports_imports_neither_torch_nor_the_other_rooms():
    code = "import sys, reports; print(sorted({'torch', 'bench', 'qzo', 'matplotlib', 'pandas'} & set(sys.modules)))"
    root = Path(published.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
