"""The public names: handed on when first asked for, and what is imported until then."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import qzo

LIBRARIES = "transformers peft bitsandbytes torchao hqq aqlm accelerate safetensors gguf tokenizers huggingface_hub"
LIBRARIES += " compressed_tensors"
LATE = ("numpy", "torch", "torch._dynamo", *LIBRARIES.split(), "bench", "reports")
EVERY_NAME_BUT_THE_TRAINER = "import qzo; [getattr(qzo, name) for name in qzo.__all__ if name != 'QZOTrainer']"


def imported(code: str) -> set[str]:
    """Which of `LATE` a process has imported that ran `code`."""
    code += f"\nimport sys; print(*set({LATE!r}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import qzo",
        "import qzo.commands.main; qzo.commands.main._parser()",
        "from qzo import QzoError, keep_freed_memory",
        "from qzo.training.settings import TrainSettings; TrainSettings()",
    ],
)
def test_neither_pytorch_nor_any_other_library_is_imported_unasked(code):
    assert imported(code) == set()


@pytest.mark.parametrize(
    "code", [EVERY_NAME_BUT_THE_TRAINER, "import qzo.optim.phases, qzo.kernels.rounding.gptq, qzo.tasks"]
)
def test_functions_and_optimizers_import_pytorch_and_no_library_of_models(code):
    assert imported(code) - {"numpy"} == {"torch"}


def test_every_name_is_there_and_listed():
    assert set(qzo.__all__) <= set(dir(qzo)) and len(qzo.__all__) == 26
    everything: dict[str, object] = {}
    exec("from qzo import *", everything)
    assert {name: getattr(qzo, name) for name in qzo.__all__}.items() <= everything.items()


def test_parts_that_were_imported_are_not_among_the_names():
    import qzo.checkpoints.inspect
    import qzo.trainer.trainer

    shown = {name for name in dir(qzo) if not name.startswith("__")}
    assert shown == set(qzo.__all__) and {"QZOTrainer", "inspect", "load_tokenizer", "save"} <= shown
    assert "__version__" in dir(qzo) and callable(qzo.inspect) and callable(qzo.load_tokenizer)


def test_no_part_of_the_package_bears_the_name_of_a_public_function():
    """Else one of the two is what the other's import finds; `tasks` is a part itself."""
    parts = {path.stem for path in Path(qzo.__file__).parent.iterdir()}
    assert parts & set(qzo.__all__) == {"tasks"}


def test_the_version_is_that_of_the_installed_package(capsys):
    from qzo.commands.main import main

    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"qzo {qzo.__version__}\n"
    assert metadata.version("qzo") == qzo.__version__


def test_type_checkers_are_told_the_same_places():
    tree = ast.parse(Path(qzo.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: line.module for line in block.body for alias in line.names}
    assert told.pop("tasks") == "qzo" and told == qzo._PLACES and {*told, "tasks"} == set(qzo.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'qzo' has no attribute 'scale'$"):
        qzo.scale  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'scale'"):
        from qzo import scale  # noqa: F401


def test_names_are_the_things_themselves():
    from qzo.formats.gptq.layer import QuantLinear
    from qzo.training.tuned.models import load

    assert qzo.load is load and pickle.loads(pickle.dumps(qzo.QuantLinear)) is QuantLinear
    arguments = ["source", "dtype", "device", "dequantize", "revision", "model"]
    assert list(inspect.signature(qzo.load).parameters) == arguments
    assert qzo.tasks is sys.modules["qzo.tasks"]
