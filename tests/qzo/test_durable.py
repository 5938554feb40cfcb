"""Files and folders that are whole or absent, and places that a user names: links, devices, leftovers, permissions."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qzo import QzoError, output
from qzo.durable import check_target, create_file, read_tensors, replace_file, whole_folder, write_tensors
from qzo.output import check_output, write_output


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_has_ordinary_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "t", {"x": torch.ones(2)}, {})
        whole_folder(tmp_path / "out", lambda folder: save_file({"x": torch.ones(2)}, folder / "y"))
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("t", "out", "out/y")] == [0o640, 0o750, 0o640]


def test_leftovers_of_killed_writers_go_those_of_living_ones_stay(tmp_path):
    for left in (".out.1.part", f".out.{os.getpid()}.part", ".out.0123456789ab.part"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("half")
    (tmp_path / ".out.part").write_text("of an older version")
    (tmp_path / ".other.1.part").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / ".out.2.part").symlink_to(tmp_path / "victim")

    def write(folder):
        (folder / "a").write_text("whole")
        with pytest.raises(QzoError, match="no room"):  # another writer of the same place meanwhile
            whole_folder(tmp_path / "out", lambda other: (_ for _ in ()).throw(QzoError("no room")))
        assert (folder / "a").read_text() == "whole"

    whole_folder(tmp_path / "out", write)
    assert names(tmp_path) == [".other.1.part", ".out.2.part", "out", "victim"] and names(tmp_path / "out") == ["a"]


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".x.json.part").symlink_to(tmp_path / "victim")
    write_output(tmp_path / "x.json", "{}\n")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "x.json").read_text() == "{}\n"
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "nowhere").symlink_to("gone")
    for link in ("link", "nowhere"):
        with pytest.raises(QzoError, match=f"--json .*{link} is a link to .*links are not followed"):
            check_output(tmp_path / link)
        with pytest.raises(QzoError, match="links are not followed"):
            write_output(tmp_path / link, "{}")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "link").is_symlink()


def test_a_device_a_pipe_and_an_open_file_are_written_to(tmp_path, capfd):
    write_output("/dev/null", "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    print("table")
    write_output("/dev/stdout", "json\n")
    assert capfd.readouterr().out == "table\njson\n"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "through\n")
    reader.join()
    assert read == ["through\n"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with (tmp_path / "file").open("w") as file:
        file.write("before\n")
        file.flush()
        write_output(f"/dev/fd/{file.fileno()}", "after\n")
    assert (tmp_path / "file").read_text() == "before\nafter\n"
    with pytest.raises(QzoError, match="--json /dev/full could not be written: No space left on device"):
        write_output("/dev/full", "text")


def test_a_fifo_without_a_reader_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "PATIENCE", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(QzoError, match=r"pipe is a FIFO that no program opened for reading within .*; start its"):
        write_output(tmp_path / "pipe", "nobody hears this")


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in (("no/where", "there is no such folder"), ("file/x", "no such folder"), ("", "is a folder")):
        with pytest.raises(QzoError, match=message):
            check_output(tmp_path / place)
    with pytest.raises(QzoError, match="does not allow it; choose another place"):
        check_target(tmp_path / "file/out")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(QzoError, match="its path is links in a circle; choose another place"):
        check_target(tmp_path / "circle/out")


def test_a_folder_may_be_written_through_a_link_to_an_empty_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    whole_folder(tmp_path / "out", lambda folder: (folder / "a").write_text("x"))
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["a"] and names(tmp_path) == ["disk", "out"]
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(QzoError, match="gone is a link to nothing, where nothing is"):
        whole_folder(tmp_path / "gone", lambda folder: None)


def test_folders_made_on_the_way_go_again_where_nothing_comes_of_it(tmp_path):
    def full(folder):
        (folder / "a").write_text("half")
        raise RuntimeError("PytorchStreamWriter failed writing file\nmore")

    with pytest.raises(QzoError, match="out could not be written: PytorchStreamWriter failed writing file; nothing"):
        whole_folder(tmp_path / "a/b/out", full)
    assert names(tmp_path) == []


def test_a_file_that_somebody_else_made_first_stays(tmp_path):
    create_file(tmp_path / "x", lambda file: file.write_text("first"))
    create_file(tmp_path / "x", lambda file: file.write_text("second"))
    assert (tmp_path / "x").read_text() == "first" and names(tmp_path) == ["x"]
    replace_file(tmp_path / "x", lambda file: file.write_text("third"))
    assert (tmp_path / "x").read_text() == "third"


def test_every_bit_of_sealed_tensors_counts_and_unsealed_ones_are_read(tmp_path):
    path = tmp_path / "t"
    tensors = {"a": torch.tensor([0.5, 2.0], dtype=torch.float16), "b": torch.tensor(3), "c": torch.empty(0)}
    write_tensors(path, tensors, {"step": "4"})
    found, metadata = read_tensors(path)
    assert metadata == {"step": "4"} and all(torch.equal(found[name], tensors[name]) for name in tensors)
    data = path.read_bytes()
    for place in range(8, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            changed, about = read_tensors(path)
        except QzoError:
            continue
        # bits that mean nothing, as a blank after the header
        assert about == metadata and all(torch.equal(changed[name], tensors[name]) for name in tensors), place
    for _ in range(3):
        write_tensors(path, tensors, {"step": "4"})
        assert path.read_bytes() == data
    save_file(tensors, path, {"step": "4"})
    assert read_tensors(path)[1] == {"step": "4"} and json.dumps(sorted(load_file(path))) == '["a", "b", "c"]'
    assert names(tmp_path) == ["t"] and Path(path).is_file()


@pytest.mark.parametrize("name", ["\0", "\ud800"])
def test_a_name_that_no_file_can_have_is_told(name, tmp_path):
    with pytest.raises(QzoError, match="no file can have that name"):
        check_target(tmp_path / name)
