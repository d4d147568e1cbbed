import os

import pytest

from tests.helpers import toys

# Read when they are imported: nothing is sent anywhere.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_STATS": "true"}


@pytest.fixture(params=[toys.NAMESPACES[0], pytest.param(toys.NAMESPACES[1], marks=pytest.mark.slow)])
def both_lightnings(request, monkeypatch):
    """Runs a test under `lightning.pytorch` and under `pytorch_lightning`."""
    monkeypatch.setattr(toys, "namespace", request.param)
