"""The checksums of a qmodel.pt: what is not what was written is told, also where each number is still one."""

import shutil
import zipfile

import pytest
import torch
from tiny_models import write_plain

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect

hqq = pytest.importorskip("hqq")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    from cases_hqq import write

    place = tmp_path_factory.mktemp("hqq")
    write(write_plain("llama", place / "plain"), place / "model", nbits=4, group_size=32)
    return place / "model"


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def test_one_changed_bit_of_the_codes_is_refused(folder):
    file = folder / "qmodel.pt"
    with zipfile.ZipFile(file) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray(file.read_bytes())
    data[record.header_offset + 500] ^= 1
    file.write_bytes(data)
    with pytest.raises(QzoError, match=r"qmodel.pt is damaged: Bad CRC-32 .*; copy or download it again"):
        load(folder)
    assert inspect(folder).reason is None  # which reads no codes


def test_an_archive_without_checksums_is_read(folder):
    state = torch.load(folder / "qmodel.pt", weights_only=True)
    expected = load(folder).state_dict()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, folder / "qmodel.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    found = load(folder).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
