"""The page that sets the paper's printed memory beside simulations."""

import copy

import pytest

from bench.studies import paper as simulations
from bench.studies.fsdp import MODES, PRECISIONS
from reports.errors import ReportError
from reports.studies.paper import fsdp as paper_fsdp
from reports.studies.paper import page as paper_validation
from reports.studies.paper.page import AS_RELEASED, PAPER, RECORDS, REPORT, load, pick, printed_rows, report
from reports.tables.sizes import GIBI


@pytest.fixture
def printed() -> dict:
    return load(PAPER)


@pytest.fixture
def simulated() -> dict:
    return load(RECORDS)


def test_the_committed_page_is_what_the_committed_records_give(printed, simulated):
    assert report(printed, simulated) == REPORT.read_text(encoding="utf-8")


def test_the_committed_records_are_those_of_the_cases_that_the_bench_runs(simulated):
    def key(case) -> tuple:
        return case["model"], case["method"], case["gradient_checkpointing"], case["batch_size"], case["seq_len"]

    wanted = [key(vars(case)) for case in simulations.cases()]
    assert [key(record["case"]) for record in simulated["records"]] == wanted
    assert all(record["status"] == "ok" for record in simulated["records"])
    grid = [(model, setting) for model in simulations.MODELS for setting in simulations.settings()]
    assert len(simulated["fsdp"]) == len(grid)
    for entry, (model, setting) in zip(simulated["fsdp"], grid, strict=True):
        assert (entry["model"], entry["gpus"], entry["mode"], entry["precision"]) == (
            model, setting.gpus, setting.mode, setting.precision,
        )  # fmt: skip
    assert set(paper_fsdp.WORDS) == set(PRECISIONS)
    assert {entry["mode"] for entry in simulated["fsdp"]} == set(MODES)


def test_every_printed_number_has_its_row(printed, simulated):
    rows = printed_rows(printed, simulated["records"])
    expected = sum(len(model["rows"]) for model in printed["models"].values())
    sharded = paper_fsdp.printed_adamw(printed)
    assert len(rows) + len(sharded) == expected == 15
    assert all(row.released["case"]["method"] == AS_RELEASED.get(row.method, row.method) for row in rows)


def test_as_released_every_row_is_near_and_each_other_one_has_a_cause(printed, simulated):
    for row in printed_rows(printed, simulated["records"]):
        if row.method in AS_RELEASED or row.method == "ft-sgd":
            assert abs(row.error(row.released, "process", GIBI)) < 0.05, (row.model, row.method)
    table = paper_validation.causes_table(printed_rows(printed, simulated["records"]), simulated["records"])
    assert table.rows and "Not found." not in str(table.notes)
    assert all(abs(float(row[3].rstrip("%"))) < 5 for row in table.rows)


def test_an_error_is_ours_over_the_papers(printed, simulated):
    row = printed_rows(printed, simulated["records"])[0]
    row.own["peak"]["process"] = round(1.1 * row.printed * GIBI.nbytes)
    assert row.error(row.own, "process", GIBI) == pytest.approx(0.1)


def test_fsdp_sums_all_ranks(printed, simulated):
    entry = copy.deepcopy(simulated["fsdp"][0])
    entry |= {"gpus": 4, "rank": {"process": GIBI.nbytes * 20}}
    figures = paper_fsdp.printed_adamw(printed)
    (by_model,) = paper_fsdp.errors([entry], figures).values()
    assert by_model == {entry["model"]: pytest.approx(80 / figures[entry["model"]] - 1)}


def test_a_missing_record_names_the_command_that_makes_it(simulated):
    with pytest.raises(ReportError, match=r"qlora on llama2-7b.*bench\.studies\.paper"):
        pick(simulated["records"], "llama2-7b", "qlora")


def test_a_missing_file_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_validation, "RECORDS", tmp_path / "absent.json")
    assert paper_validation.main() == 2
    assert capsys.readouterr().err.startswith("error: cannot read")


def test_the_page_tolerates_and_the_tables_show_the_extra_methods(tmp_path):
    from sample_records import ROLES, make_record, save

    import reports

    records = {method: make_record(method) for method in ("mezo", "qzo")}
    records["mezo-reference"] = make_record("mezo", ROLES["mezo"])
    records["mezo-reference"]["case"]["method"] = "mezo-reference"
    folder = save(tmp_path / "llama2-7b", records)
    assert "mezo-reference" in reports.tables(folder)
    assert reports.write(folder, ["md", "csv", "html", "png"])
