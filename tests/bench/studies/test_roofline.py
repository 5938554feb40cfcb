"""Launches and bytes of a step, counted on tensors without data."""

import json

import torch

from bench.studies import roofline


def test_an_operator_reads_its_inputs_and_writes_its_outputs_once():
    x, out = torch.ones(4, 8, device="meta"), torch.empty(4, 4, device="meta")
    for action, nbytes, operations in (
        (lambda: x.view(8, 4).t(), None, 0),
        (lambda: torch.empty_like(x), None, 0),
        (lambda: x.add_(1), 2 * 128, 0),
        (lambda: x.copy_(x[:, :1].expand(4, 8)), 128 + 16, 0),
        (lambda: torch.mm(x, x.t(), out=out), 2 * 128 + 64, 2 * 4 * 8 * 4),
    ):
        with roofline.Traffic() as traffic:
            action()
        assert (traffic.launches, traffic.bytes, traffic.operations) == (nbytes is not None, nbytes or 0, operations)


def test_a_step_by_kernels_launches_for_a_layer_one_product_or_a_rebuild_and_one(llama_folder):
    found = {way: roofline.counted(str(llama_folder), way, 1, 32) for way in roofline.WAYS}
    layers = (
        2 * 7 * json.loads((llama_folder / "config.json").read_text())["num_hidden_layers"]
    )  # in two forward passes
    forwards, mezo, operators, rebuilt, codes = (found[way] for way in roofline.WAYS)
    assert codes.forward_launches == forwards.launches == forwards.forward_launches
    assert rebuilt.forward_launches == forwards.launches + layers
    assert operators.forward_launches > rebuilt.forward_launches + 4 * layers
    assert codes.forward_bytes < rebuilt.forward_bytes < operators.forward_bytes
    assert len({way.operations for way in (forwards, operators, rebuilt, codes)}) == 1
    assert operators.launches - operators.forward_launches > 5 * layers
    assert forwards.launches < mezo.launches and forwards.operations < mezo.operations  # all logits
    for way in (rebuilt, codes):
        # two perturbations, the update and its d', two losses and their stack; once a table, and which block is whose
        assert way.launches - way.forward_launches == 9
        assert way.reads == forwards.reads + 1


def test_the_command_writes_a_row_for_each_way_and_codes_for_few_tokens_alone(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SHAPES", ((1, 8), (2, 40)))
    monkeypatch.setattr(roofline, "WAYS", roofline.WAYS[-2:])
    assert roofline.main(["--models", str(llama_folder), "--out", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [roofline.REBUILT, roofline.CODES, roofline.REBUILT]
    assert all(row["reads"] >= 2 for row in rows)
