from types import SimpleNamespace

import pytest
import torch

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import free_bytes, required_bytes
from merge_callback.live.random_states import preserved_rng
from merge_callback.utilities.devices import wait_for_device, works_beside_host


@pytest.fixture
def xpu(monkeypatch):
    """Says that this machine has an accelerator of that kind. Nothing can be computed on it."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))


def test_the_accelerator_works_beside_the_host_whatever_its_name(xpu, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    wait_for_device(torch.device("xpu", 1))
    assert waited == [torch.device("xpu", 1)]
    assert works_beside_host(torch.device("xpu", 1))
    assert not works_beside_host(torch.device("cuda"))
    assert not works_beside_host(torch.device("cpu"))


def test_a_device_that_shares_the_hosts_memory_copies_at_once(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert not works_beside_host(torch.device("mps"))


def test_on_a_cpu_there_is_nothing_to_wait_for_and_memory_is_the_hosts(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert wait_for_device(torch.device("cpu")) >= 0
    assert waited == []
    assert free_bytes(torch.device("cpu")) > 2**20
    assert free_bytes(torch.device("meta")) is None


def test_rows_for_an_accelerator_in_host_memory_are_counted_as_pinned(xpu):
    layout = RowLayout({"weight": torch.zeros(1000)})
    layout.groups[:] = [(torch.float32, torch.device("xpu"))]
    assert required_bytes(layout, 2, None, torch.device("cpu")) == {torch.device("cpu"): 2 * 4096}


def test_random_states_of_any_accelerator_are_restored(xpu, monkeypatch):
    """With generators of the CPU in the place of the device's own. Says nothing of how its kernels draw."""
    generators = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)]
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(default_generators=generators))
    before = [generator.get_state() for generator in generators]
    with pytest.raises(KeyError), preserved_rng():
        drawn = [torch.rand(3, generator=generator) for generator in generators]
        raise KeyError
    assert all(map(torch.equal, before, [generator.get_state() for generator in generators]))
    assert all(map(torch.equal, drawn, [torch.rand(3, generator=generator) for generator in generators]))


def test_an_accelerator_that_lists_no_generators_changes_nothing(xpu, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    before = torch.get_rng_state()
    with preserved_rng():
        torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
