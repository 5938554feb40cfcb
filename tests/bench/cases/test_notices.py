"""What a run of the bench needs is imported without a word on stdout or stderr."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMPORTS = (
    "import bench.cases.models",
    "from bench.methods.quantized.nf4 import _library; _library()",
    "from qzo.quiet import quiet_libraries\nwith quiet_libraries():\n    import peft",
    "from bench.simulator.cuda.products import Products; Products((8, 0)).rules()",
)


@pytest.mark.parametrize("code", IMPORTS)
def test_importing_what_a_run_needs_prints_nothing(code):
    if "nf4" in code:
        pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
