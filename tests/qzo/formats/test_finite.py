"""NaN and infinity anywhere in a checkpoint of any format: inspect and load refuse it, with the name of the tensor."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from cases_aqlm import CASES as AQLM
from cases_awq import CASES as AWQ
from cases_bnb import CASES as BNB
from cases_compressed import CASES as COMPRESSED
from cases_gptq import CASES as GPTQ
from cases_hqq import CASES as HQQ
from cases_torchao import CASES as TORCHAO
from gguf_files import K_QUANTS, SIMPLE, stored_tensors, tiny, write_gguf
from optional import gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import write_plain

from qzo import QzoError, load
from qzo.checkpoints.inspect import inspect
from qzo.files import finite
from qzo.files.finite import is_finite
from qzo.formats.gguf.finite import HALVES

ALL = [*AQLM, *AWQ, *BNB, *COMPRESSED, *GPTQ, *HQQ, *TORCHAO]
CASES = list({case.name.rpartition("-")[0] or case.name: case for case in ALL if case.family == "llama"}.values())
KINDS = ("scale", "absmax", "SCB", "codebooks", "zero_point", "norm.weight", "lm_head", "embed_tokens", ".zero")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain("llama", tmp_path_factory.mktemp("plain") / "model")


def refusals(path, **options):
    """What loading and inspecting say."""
    with pytest.raises(QzoError) as caught:
        load(path, **options)
    told = str(caught.value), str(inspect(path).reason)
    assert all("NaN or infinite" in text and "\n" not in text for text in told), told
    return told


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_format_loads_a_number_that_is_none(plain, tmp_path, case):
    for module in case.needs:
        pytest.importorskip(module)
    folder = tmp_path / "model"
    case.write(plain, folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            metadata = tensors.metadata()
        tensors = load_file(file)
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
        last = {kind: [name for name in floats if kind in name][-1:] for kind in KINDS}
        for number, name in enumerate(name for names in last.values() for name in names):
            bad = tensors[name].clone()
            bad.view(-1)[-1] = (torch.nan, torch.inf, -torch.inf)[number % 3]
            save_file({**tensors, name: bad}, file, metadata)
            assert all(f"{name} has 1 numbers" in told for told in refusals(folder))
        save_file(tensors, file, metadata)
    if (folder / "qmodel.pt").is_file():
        state = torch.load(folder / "qmodel.pt", weights_only=True)
        for path, part in (("model.layers.1.mlp.up_proj", "scale"), ("model.norm", "weight"), ("lm_head", "weight")):
            damaged = {key: dict(about) for key, about in state.items()}
            damaged[path][part] = damaged[path][part].clone()
            damaged[path][part].view(-1)[0] = torch.nan
            torch.save(damaged, folder / "qmodel.pt")
            assert all(f"{path}.{part}" in told for told in refusals(folder))


@pytest.mark.parametrize("where", ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_an_unquantized_model_with_one_is_refused_too(plain, tmp_path, where):
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[where].view(-1)[3] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert all(where in told for told in refusals(folder))


def test_a_load_looks_at_every_number_once(plain, tmp_path, monkeypatch):
    case = next(case for case in CASES if case.name.startswith("gptq"))
    case.write(plain, tmp_path / "model")
    seen = []
    monkeypatch.setattr(finite, "is_finite", lambda tensor: bool(seen.append(tensor)) or True)
    for folder in (plain, tmp_path / "model"):
        seen.clear()
        made = [buffer for name, buffer in load(folder).named_buffers() if name.endswith("inv_freq")]
        held = [*load_file(folder / "model.safetensors").values(), *made]
        looked_at, there = (sum(t.numel() for t in own if t.is_floating_point()) for own in (seen, held))
        assert looked_at == there


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "gguf packed"])
def test_a_number_that_the_dtype_asked_for_cannot_hold_is_refused(plain, tmp_path, kind):
    file = plain
    if kind == "safetensors":
        folder = tmp_path / "model"
        next(case for case in CASES if case.name.startswith("gptq")).write(plain, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        tensors["model.norm.weight"][2] = 1e6
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        file = folder
    else:
        model = tiny(hidden=256)
        model.model.norm.weight.data[2] = 1e6
        file = write_gguf(model, tmp_path / "model.gguf", "Q4_0")
    load(file, dtype=torch.bfloat16)
    with pytest.raises(QzoError, match=r"model\.norm\.weight has 1 numbers of .* NaN or infinite"):
        load(file, dtype=torch.float16, **({"dequantize": False} if kind == "gguf packed" else {}))


@pytest.mark.parametrize("kind", [*SIMPLE, *K_QUANTS])
def test_every_scale_of_a_gguf_file_is_looked_at(tmp_path, kind):
    name = "blk.1.ffn_up.weight"
    file = write_gguf(tiny(hidden=256), tmp_path / "model.gguf", kind)
    stored = stored_tensors(file)[name]
    assert stored.tensor_type.name == kind
    data, end = file.read_bytes(), stored.data_offset + stored.n_bytes
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    for number in HALVES[kind]:
        changed = bytearray(data)
        place = end - block + number
        changed[place : place + 2] = np.array([np.inf], "<f2").tobytes()
        file.write_bytes(changed)
        for dequantize in (True, False):
            told = refusals(file, dequantize=dequantize)
            assert all(f"{name} has 1 scales" in text for text in told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_among_many_is_found_wherever_it_is(dtype, bad):
    numbers = torch.linspace(-3, 3, 101, dtype=dtype)
    assert is_finite(numbers) and is_finite(numbers[:0]) and is_finite(torch.ones(3, dtype=torch.int32))
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    for place in (0, 50, 100):
        changed = numbers.clone()
        changed[place] = bad
        assert not is_finite(changed) and not is_finite(changed.expand(2, 101).t())


@pytest.mark.parametrize("kind", list(HALVES))
def test_the_places_of_scales_are_those_of_the_library(kind):
    """A NaN there, and in no other two bytes, makes weights that are no numbers; types it cannot rebuild aside."""
    number = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[number][1]
    for place in HALVES[kind]:
        block = np.zeros(size, np.uint8)
        block[place : place + 2] = np.array([np.nan], "<f2").view(np.uint8)
        try:
            weights = gguf.dequantize(block[None], number)
        except NotImplementedError:
            pytest.skip(f"the library cannot rebuild {kind}")
        assert np.isnan(weights).any()
