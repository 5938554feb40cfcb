"""A MODEL of the hub: its config alone is fetched, and what goes wrong is one line."""

import pytest
from transformers import LlamaConfig

from bench.cases import models as catalog
from bench.cases.models import resolve
from qzo.errors import QzoError


def test_a_hub_id_without_a_network_is_one_line(monkeypatch):
    monkeypatch.setattr(catalog, "_hub_is_reachable", lambda: False)
    with pytest.raises(
        QzoError, match=r"^no folder someone/thing here, and the hub cannot be reached [^\n]*list models`$"
    ):
        resolve("someone/thing")


def test_a_hub_id_downloads_the_config_alone(monkeypatch):
    asked = []

    def from_pretrained(*place, **options):
        asked.append((place, options))
        return LlamaConfig(num_hidden_layers=2)

    monkeypatch.setattr(catalog, "_hub_is_reachable", lambda: True)
    monkeypatch.setattr(catalog.AutoConfig, "from_pretrained", from_pretrained)
    source = resolve("Some-one/Thing_1.0")
    assert (source.name, source.hub, source.weights) == (
        "Some-one--Thing_1.0",
        "Some-one/Thing_1.0",
        "Some-one/Thing_1.0",
    )
    assert asked == [(("Some-one/Thing_1.0",), {"trust_remote_code": False, "local_files_only": False})]


def test_what_the_hub_answers_is_in_the_line(monkeypatch):
    def from_pretrained(*place, **options):
        raise OSError("404: nothing\n\nof that name")

    monkeypatch.setattr(catalog, "_hub_is_reachable", lambda: True)
    monkeypatch.setattr(catalog.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(
        QzoError, match=r"^no folder some/one here, and .*404: nothing of that name; check the spelling"
    ):
        resolve("some/one")


@pytest.mark.parametrize("model", ["a/b/c", "/a/b", "../a", "a/", "-a/b", "a b/c"])
def test_what_only_looks_like_a_hub_id_is_unknown(model, monkeypatch):
    monkeypatch.setattr(catalog, "_from_hub", pytest.fail)
    with pytest.raises(QzoError, match="unknown model"):
        resolve(model)
