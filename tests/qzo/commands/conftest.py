"""What tests of `qzo train` share: a task of random words, and models to train on it."""

import pytest
import standin
import torch


@pytest.fixture
def models(make_model, tmp_path):
    """Folders of a quantized and an unquantized model."""
    return {
        kind: str(standin.write_model(make_model(dtype=torch.bfloat16), tmp_path / kind, kind == "quantized"))
        for kind in ("quantized", "plain")
    }
