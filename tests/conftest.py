import pytest

from tests import toys


@pytest.fixture(params=[toys.NAMESPACES[0], pytest.param(toys.NAMESPACES[1], marks=pytest.mark.slow)])
def both_lightnings(request, monkeypatch):
    """Runs a test under `lightning.pytorch` and under `pytorch_lightning`."""
    monkeypatch.setattr(toys, "namespace", request.param)
