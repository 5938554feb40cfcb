"""The helper that kills work at its file operations: it sees them, and dies where it is told to."""

from pathlib import Path

import safetensors.torch
import torch
from crashes import alive, kill_at, operations


def test_each_operation_is_a_moment_and_the_work_stops_there(tmp_path):
    def work():
        (tmp_path / "new").mkdir()
        (tmp_path / "new/a").write_text("hello you")
        (tmp_path / "new/a").rename(tmp_path / "b")
        safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "c")
        Path("/dev/null").write_text("elsewhere")

    def left():
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    (tmp_path / "first").mkdir()
    wanted = ["os.mkdir new", "write_text new/a", "write_text new/a, half of it", "os.rename new/a", "save_file c"]
    names = operations(tmp_path, work)
    assert names == [*wanted, "save_file c, half of it"]
    seen = []
    for number in range(len(names)):
        for path in ("new/a", "b", "c", ".tmpHaLf01"):
            (tmp_path / path).unlink(missing_ok=True)
        (tmp_path / "new").exists() and (tmp_path / "new").rmdir()
        assert kill_at(tmp_path, number, work)
        seen.append(left())
    assert seen[0] == ["first"] and seen[1] == ["first", "new"] and seen[2] == ["first", "new", "new/a"]
    assert seen[4] == ["b", "first", "new"] and seen[5] == [".tmpHaLf01", "b", "first", "new"]
    assert not kill_at(tmp_path / "first", 0, lambda: None)


def test_what_a_child_prints_and_how_it_ends_are_told():
    def broken():
        print("so far")
        raise ValueError("and no further")

    code, text = alive(broken)
    assert code == 70 and "so far" in text and "ValueError: and no further" in text
    assert alive(lambda: 3)[0] == 3
