"""Other libraries are quiet within, and as they were before and after."""

import logging
import warnings
from types import SimpleNamespace

import pytest
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from qzo.quiet import LIBRARIES, quiet_libraries


@pytest.fixture
def told():
    """What loggers of libraries, and ours, hand on to the handlers of a user."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    for name in (*LIBRARIES, "qzo"):
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in (*LIBRARIES, "qzo"):
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("library", LIBRARIES)
def test_warnings_of_a_library_are_silent_within_and_errors_are_not(library, told):
    logger = logging.getLogger(f"{library}.some.module")
    logger.warning("before")
    with quiet_libraries():
        logger.warning("within")
        logger.error("wrong")
    logger.warning("after")
    assert [record.msg for record in told] == ["before", "wrong", "after"]


def test_warnings_of_ours_and_of_python_go_through(told):
    with quiet_libraries(), pytest.warns(UserWarning, match="of Python"):
        logging.getLogger("qzo.quantizers").warning("of ours")
        warnings.warn("of Python", stacklevel=1)
    assert [record.msg for record in told] == ["of ours"]


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_every_level_is_afterwards_what_it_was(level, monkeypatch):
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "level", level)
    with pytest.raises(KeyError), quiet_libraries(), quiet_libraries():
        assert logger.getEffectiveLevel() >= max(level, logging.ERROR - 1)
        raise KeyError
    assert logger.level == level


def test_a_level_that_a_library_sets_itself_stands(monkeypatch):
    logger = logging.getLogger("torchao")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    with quiet_libraries():
        logger.setLevel(logging.ERROR)
    assert logger.level == logging.ERROR


@pytest.mark.parametrize("module", [transformers_logging, modeling_gguf_pytorch_utils], ids=["weights", "gguf"])
def test_progress_bars_are_hidden_within_alone(module, capfd):
    with quiet_libraries():
        assert list(module.tqdm([1, 2], desc="hidden")) == [1, 2]
    assert list(module.tqdm([1, 2], desc="shown")) == [1, 2]
    shown = capfd.readouterr().err
    assert "hidden" not in shown and "shown" in shown


def test_a_hook_of_the_user_is_back_afterwards():
    def hook(bar, arguments, named):
        return SimpleNamespace(bar=bar)

    before = transformers_logging.set_tqdm_hook(hook)
    try:
        with quiet_libraries():
            pass
        assert transformers_logging.set_tqdm_hook(before) is hook
    finally:
        transformers_logging.set_tqdm_hook(before)
