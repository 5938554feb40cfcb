"""Every refusal in the source of formats and checkpoints ends with what would help, or its caller puts it there."""

import ast
import re
from pathlib import Path

import pytest
import torch

import qzo
from qzo.checkpoints.write import write_checkpoint

ROOT = Path(qzo.__file__).parent
VERBS = (
    "adopt|attach|call|check|choose|copy|convert|download|give|go|join|leave|load|make|mend|merge|name|pass|put|qzo|"
    "quantize|remove|run|save|shorten|take|train|use|write|model.save_pretrained|the state is damaged, or"
)
HELPS = re.compile(rf"(; |, or |: )({VERBS})\b|\{{(AGAIN|OTHER|REMEDY|remedy|advice)\}}")
READ = "Stored.empty, Stored.load, plan and table.find, which all reading goes through, put AGAIN or OTHER behind it"
TAKEN_OVER = "qzo.adopt and qzo.release put a remedy behind it, and reading as above"
ADVISED = {
    **dict.fromkeys(("codes", "dynamic", "files", "layer", "nesting", "packed", "scheme", "schemes", "state"), READ),
    **dict.fromkeys(("families", "foreign", "header", "keys", "places", "rope", "source"), READ),
    "library": TAKEN_OVER,
}


def text(node):
    """A message as the source has it, what is put in between braces."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"{{{ast.unparse(node.value)}}}"
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return f"{{{ast.unparse(node)}}}"


def refusals(folder):
    """(file, line, message) of each error of ours that is raised there."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            made = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(made, ast.Call) and getattr(made.func, "id", "") in ("QzoError", "NotFinite") and made.args:
                yield file, node.lineno, text(made.args[0])


@pytest.mark.parametrize(("folder", "fewest"), [("checkpoints", 20), ("formats", 150)])
def test_each_refusal_in_the_source_says_what_helps(folder, fewest):
    found = list(refusals(folder))
    assert len(found) >= fewest
    bare = [
        f"{file.relative_to(ROOT)}:{line}: {message}"
        for file, line, message in found
        if not HELPS.search(message) and (folder == "checkpoints" or file.stem not in ADVISED)
    ]
    assert not bare, "\n".join(bare)


def test_a_layer_that_cannot_be_taken_over_is_told_with_what_helps():
    module = pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")
    module.weight.quant_state.shape = (32, 128)
    message = r"^0: its weight has the shape .*; load the model's files with qzo.load, or leave this layer unquantized$"
    with pytest.raises(qzo.QzoError, match=message):
        qzo.adopt(torch.nn.Sequential(module))


def test_tensors_of_another_checkpoint_are_told_with_what_helps(make_model, tmp_path):
    qzo.save(qzo.quantize(make_model(), group_size=32), tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.scales"
    with pytest.raises(qzo.QzoError, match=r"; give the checkpoint that these tensors were tuned on") as caught:
        write_checkpoint(tmp_path / "model", {name: torch.ones(3, 3)}, tmp_path / "out")
    assert name in str(caught.value) and not (tmp_path / "out").exists()
