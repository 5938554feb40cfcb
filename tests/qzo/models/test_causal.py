"""Encoders are no language models: refused by loading and inspection alike; decoders of their kind are not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import qzo
from qzo.checkpoints.inspect import inspect
from qzo.checkpoints.save import save
from qzo.commands.main import main
from qzo.errors import QzoError
from qzo.models.build import build
from qzo.models.causal import check_causal, check_whole

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
OTHERS = {
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 96},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "cpmant": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64},
}
BERTS = [
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
]


def made(kind, **options):
    config = AutoConfig.for_model(kind, **{"vocab_size": 96, **OTHERS.get(kind, SMALL), **options})
    check_whole(Path("it"), config)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", BERTS)
def test_an_encoder_is_refused_and_a_decoder_of_the_same_kind_is_not(kind):
    with pytest.raises(QzoError, match=rf'^it: .* model_type "{kind}" tokens see .* \(is_decoder is false\)'):
        check_causal(Path("it"), *made(kind))
    check_causal(Path("it"), *made(kind, is_decoder=True))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("xlm", {}, "causal is false"),
        ("xlm", {"causal": True}, None),
        ("xlnet", {}, "a permutation language model"),
        ("cpmant", {}, "its context is read in both directions"),
        ("llama", {}, None),
        ("llama", {"is_causal": False}, "is_causal is false"),
        ("llama", {"is_decoder": False}, None),  # what older versions wrote for every model, and none reads
        ("gpt_neox", {}, None),  # its configuration has is_decoder, false, which the model never reads
        ("gemma3_text", {}, None),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("bart", {}, "is an encoder with a decoder"),
        ("bart", {"is_encoder_decoder": False}, None),  # what BartForCausalLM writes
    ],
)
def test_the_switches_that_a_model_reads_decide(kind, options, reason):
    if reason is None:
        check_causal(Path("it"), *made(kind, **options))
        return
    with pytest.raises(QzoError, match=reason):
        check_causal(Path("it"), *made(kind, **options))


@pytest.mark.parametrize("kind", ["roberta", "bert", "bart"])
def test_no_command_takes_an_encoder(kind, tmp_path, capsys):
    folder = str(tmp_path / "model")
    small = {"vocab_size": 96, "max_position_embeddings": 64}
    if kind == "bart":
        sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        BartForConditionalGeneration(BartConfig(d_model=32, **sizes, **small)).save_pretrained(folder)
    elif kind == "bert":
        BertForMaskedLM(BertConfig(**SMALL, **small)).save_pretrained(folder)
    else:
        RobertaForMaskedLM(RobertaConfig(**SMALL, **small)).save_pretrained(folder)
    with pytest.raises(QzoError, match="give a decoder"):
        qzo.load(folder)
    assert "give a decoder" in str(inspect(folder).reason)
    assert main(["quantize", folder, str(tmp_path / "out")]) == 2 and main(["eval", folder, "--task", "sst2"]) == 2
    assert "give a decoder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_quantized_encoder_is_refused_too(tmp_path):
    config = AutoConfig.for_model("bert", vocab_size=96, **SMALL, is_decoder=True)
    save(qzo.quantize(AutoModelForCausalLM.from_config(config), 4, 32), tmp_path / "model")
    assert inspect(tmp_path / "model").reason is None and qzo.load(tmp_path / "model")
    about = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**about, "is_decoder": False}))
    with pytest.raises(QzoError, match="is_decoder is false"):
        qzo.load(tmp_path / "model")
    assert "is_decoder is false" in str(inspect(tmp_path / "model").reason)


@pytest.mark.parametrize("kind", ["distilbert", "deberta-v2", "clip", "vit"])
def test_a_kind_without_a_language_model_is_named(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(QzoError, match=rf'model_type "{kind}" has no causal language model .*; give a decoder'):
        build(tmp_path, torch.float32, part=True)
