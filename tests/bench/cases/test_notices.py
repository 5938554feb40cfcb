"""Libraries are silenced while they are imported and at no other time, and never about an error."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from bench.cases.notices import LOGGERS, without_notices

ROOT = Path(__file__).parents[3]
IMPORTS = (
    "import bench.cases.models",
    "from bench.methods.nf4 import _library; _library()",
    "from bench.cases.notices import without_notices\nwith without_notices():\n    import peft",
    "from bench.simulator.cuda.products import Products; Products((8, 0)).rules()",
)


@pytest.mark.parametrize("name", LOGGERS)
def test_only_errors_are_told_inside_and_everything_as_before_afterwards(name, caplog):
    logger = logging.getLogger(f"{name}.of_a_module")
    before = logger.getEffectiveLevel(), logging.getLogger(name).level
    with pytest.raises(ImportError), without_notices():
        logger.warning("a notice")
        logger.error("an error")
        logging.getLogger("bench").warning("ours")
        raise ImportError
    assert [record.message for record in caplog.records if record.name == logger.name] == ["an error"]
    assert "ours" in caplog.messages
    assert before == (logger.getEffectiveLevel(), logging.getLogger(name).level)


@pytest.mark.parametrize("code", IMPORTS)
def test_importing_what_a_run_needs_prints_nothing(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
