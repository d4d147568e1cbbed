import os

import pytest

from tests.helpers import toys

# Read when they are imported: nothing is sent anywhere.
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_X_DISABLE_STATS": "true"}

# How many cases of each test were collected so far.
SAMPLED = pytest.StashKey[dict]()


@pytest.fixture(params=[toys.NAMESPACES[0], pytest.param(toys.NAMESPACES[1], marks=pytest.mark.slow)])
def both_lightnings(request, monkeypatch):
    """Runs a test under `lightning.pytorch` and under `pytorch_lightning`."""
    monkeypatch.setattr(toys, "namespace", request.param)


def pytest_itemcollected(item):
    """Marks a test's cases as slow, all but the first ones, where `sample` says so."""
    if (marker := item.get_closest_marker("sample")) and not item.get_closest_marker("slow"):
        numbers, test = item.config.stash.setdefault(SAMPLED, {}), (item.path, item.originalname)
        numbers[test] = numbers.get(test, 0) + 1
        if numbers[test] > marker.args[0]:
            item.add_marker("slow")
