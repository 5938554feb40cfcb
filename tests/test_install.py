"""What an installation puts into site-packages: qzo alone, the bench where the checkout itself is installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import runpy, sys, setuptools
sys.argv = ["setup.py", {command!r}]
setuptools.setup = lambda packages, entry_points: print({{p.partition(".")[0] for p in packages}}, sorted(entry_points))
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize(
    ("command", "packages", "groups"),
    [
        ("bdist_wheel", {"qzo"}, ["console_scripts"]),
        ("editable_wheel", {"qzo", "bench", "reports"}, ["console_scripts", "pytest11", "qzo.peaks"]),
    ],
)
def test_a_wheel_holds_qzo_alone_and_an_editable_installation_the_bench_too(command, packages, groups):
    code = CODE.format(command=command)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names, found = done.stdout.strip().split("} ")
    assert eval(f"{names}}}") == packages and eval(found) == groups


def test_what_is_needed_to_train_brings_no_tools_for_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {name.split(">")[0] for name in project["dependencies"]}
    assert {"torch", "transformers", "safetensors"} <= needed
    assert not needed & {"pytest", "pytest-benchmark", "matplotlib", "jinja2", "pandas", "psutil"}
    extras = next(name for name in project["optional-dependencies"]["dev"] if name.startswith("qzo["))
    assert "bench" in extras.removeprefix("qzo[").rstrip("]").split(",")
