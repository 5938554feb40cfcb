"""Every architecture of transformers under every method, simulated: `python -m bench.studies.architectures --out FILE`.

For each model type that AutoModelForCausalLM knows, the config that transformers makes by default is shortened to the
first layers that show every kind of layer, and to 16 experts, written to a folder, and given to the bench as a user
would.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.cases.case import BenchCase
from bench.cases.messages import one_line
from bench.cases.methods import METHODS
from bench.cases.pretrained import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from bench.commands.parser import Parser
from bench.records.environment import environment
from bench.records.record import Record
from bench.worlds.cell import run
from qzo.errors import QzoError

GPU = "rtx-4090"
BATCH_SIZE, SEQ_LEN = 2, 128
FEWEST_LAYERS = 2
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_EXPERTS = 16
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FIELDS: dict[str, dict[str, Any]] = {  # what a type's defaults leave out and its model needs
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and write the record; 0, or 2 and one line on stderr."""
    parser = Parser(prog="python -m bench.studies.architectures", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--types", help="model types separated by commas (default: all)")
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        options = parser.parse_args(arguments)
        types = options.types.split(",") if options.types else model_types()
        record = {
            "gpu": GPU, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "methods": list(METHODS),
            "environment": environment(), "types": {name: architecture(name) for name in types},
        }  # fmt: skip
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (QzoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def model_types() -> list[str]:
    """The model types that AutoModelForCausalLM builds."""
    return sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})


def architecture(model_type: str) -> dict[str, Any]:
    """What a type builds, and for each method its peak in bytes, or in one line why not."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / model_type  # messages name it
        try:
            config = short_config(model_type)
        except Exception as error:
            log.info("%s: %s", model_type, one_line(error))
            return {"config": f"the defaults make no config: {one_line(error)}"}
        config.save_pretrained(folder)
        methods = {}
        for method in METHODS:
            record = run(BenchCase(str(folder), method, gpu=GPU, batch_size=BATCH_SIZE, seq_len=SEQ_LEN))
            methods[method] = _outcome(record, parent)
    failed = {method: outcome for method, outcome in methods.items() if "allocated" not in outcome}
    log.info("%s: %d of %d, %.1f s %s", model_type, len(methods) - len(failed), len(methods),
             time.process_time() - began, failed or "")  # fmt: skip
    return {"config": None, "layers": _layers(config), "methods": methods}


def _outcome(record: Record, parent: str) -> dict[str, Any]:
    if record["status"] == "ok":
        return {"allocated": record["peak"]["allocated"], "parameters": record["parameters"]["total"]}
    return {"status": record["status"], "message": (record["message"] or "").replace(f"{parent}/", "")}


def short_config(model_type: str) -> PreTrainedConfig:
    """The type's default config, with only the first layers: as many as show every kind of layer, or twice as many and
    so on where these do not build (Zamba ties its second shared block). Where all do not build, they: the bench will
    say why.
    """
    kind = CONFIG_MAPPING[model_type]
    whole = kind(**FIELDS.get(model_type, {})).to_dict()
    model = _built(kind.from_dict(whole))
    if model is None:
        return kind.from_dict(whole)
    wanted = max(FEWEST_LAYERS, shown_by(model))
    fields = shortened(whole, wanted)
    while fields != whole and _built(kind.from_dict(dict(fields))) is None:
        wanted *= 2
        fields = shortened(whole, wanted)
    return kind.from_dict(fields)


def _built(config: PreTrainedConfig) -> nn.Module | None:
    """The model without data, None where the config does not build."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception:
        return None


def shown_by(model: nn.Module) -> int:
    """The number of first layers among which is every kind that one of the model's lists of layers has."""
    most = 0
    for holder in model.modules():
        if isinstance(holder, nn.ModuleList) and len(holder) > FEWEST_LAYERS:
            kinds = [_structure(layer) for layer in holder]
            most = max(most, 1 + max(kinds.index(kind) for kind in set(kinds)))
    return most


def _structure(layer: nn.Module) -> tuple:
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    kinds = [(type(module).__name__, getattr(module, "sliding_window", None)) for module in layer.modules()]
    return tuple(shapes), tuple(kinds)


def shortened(fields: dict[str, Any], wanted: int) -> dict[str, Any]:
    """The fields of a config, and of configs in it, with at most `wanted` layers and lists of layers cut to as many."""
    counts = {name: fields[name] for name in COUNTS if isinstance(fields.get(name), int)}
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):  # settings of layers
            result[name] = {key: item for key, item in value.items() if int(key) < wanted}
        elif isinstance(value, dict):
            result[name] = shortened(value, wanted)
        elif name in counts:
            result[name] = min(value, wanted)
        elif name in EXPERTS and isinstance(value, int):
            result[name] = min(value, MOST_EXPERTS)
        elif isinstance(value, (list, tuple)) and len(value) in counts.values():
            result[name] = list(value[:wanted])
        else:
            result[name] = value
    return result


def _layers(config: PreTrainedConfig) -> int | None:
    try:
        text = config.get_text_config()
    except ValueError:  # several
        return None
    return next((getattr(text, name) for name in COUNTS if isinstance(getattr(text, name, None), int)), None)


if __name__ == "__main__":
    sys.exit(main())
