import pytest

from tests import toys


@pytest.fixture(params=toys.NAMESPACES)
def both_lightnings(request, monkeypatch):
    """Runs a test under `lightning.pytorch` and under `pytorch_lightning`."""
    monkeypatch.setattr(toys, "namespace", request.param)
