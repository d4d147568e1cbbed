import pytest
import torch

from merge_callback.capture import ring as snapshots
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.memory import refuse_if_too_large, required_bytes
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.storage import DeviceStorage
from merge_callback.merging.combine import CHUNK_NUMEL
from tests.helpers import reference


def tensors(seed, dtypes=(torch.float32,)):
    """A mixture of shapes and memory orders: matrices, a transposed one, an image kernel, a scalar, an empty one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 7), (3,), (4, 3, 2, 2), (), (0, 4)]
    made = {
        f"tensor{i}": torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    }
    made["transposed"] = torch.randn(4, 6, generator=generator).t().to(dtypes[0])
    made["channels_last"] = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
    return made


def ring_of(capacity, example, dtype=None):
    return SnapshotRing(DeviceStorage(RowLayout(example), capacity, dtype), capacity)


def merged(ring, coefficients):
    return ring.storage.layout.views(ring.combine(coefficients))


def uniform(ring):
    return [1 / len(ring.steps)] * len(ring.steps)


@pytest.mark.parametrize("num_taken", [1, 2, 4, 5, 9, 13])
@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_the_ring_keeps_the_newest_in_order_before_and_after_it_wraps_around(capacity, num_taken):
    ring = ring_of(capacity, tensors(0))
    for step in range(num_taken):
        ring.append(step, tensors(step))
    kept = list(range(num_taken))[-capacity:]
    assert ring.steps == kept
    for position, step in enumerate(kept):
        alone = merged(ring, [float(i == position) for i in range(len(kept))])
        for name, tensor in tensors(step).items():
            assert torch.equal(alone[name], tensor), name


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float64, torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("storage_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_a_merge_agrees_with_the_float64_twin_of_what_was_stored(dtypes, storage_dtype):
    ring = ring_of(4, tensors(0, dtypes), storage_dtype)
    taken = [tensors(seed, dtypes) for seed in range(4)]
    for step, snapshot in enumerate(taken):
        ring.append(step, snapshot)
    stored = [{name: t.to(storage_dtype or t.dtype) for name, t in snapshot.items()} for snapshot in taken]
    coefficients = [0.1, 0.2, 0.3, 0.4]
    expected = reference.merge(stored, coefficients)
    for name, tensor in merged(ring, coefficients).items():
        live = taken[0][name]
        assert tensor.dtype == live.dtype
        assert tensor.shape == live.shape
        # Accumulated in float32 or better and rounded once, whatever the storage dtype.
        rounding = torch.finfo(live.dtype).eps
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=rounding, atol=1e-6 if rounding > 1e-10 else 1e-14
        )


def test_the_memory_order_of_the_live_tensors_is_kept():
    ring = ring_of(2, tensors(0))
    ring.append(1, tensors(1))
    for name, tensor in merged(ring, [1.0]).items():
        assert tensor.stride() == tensors(0)[name].stride(), name


def test_a_model_larger_than_one_chunk_is_merged_whole():
    size = 2 * CHUNK_NUMEL + 17
    ring = ring_of(3, {"weight": torch.empty(size)})
    taken = [torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for step, tensor in enumerate(taken):
        ring.append(step, {"weight": tensor})
    expected = sum(tensor.double() for tensor in taken) / 3
    torch.testing.assert_close(merged(ring, uniform(ring))["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_storage_keeps_what_a_bfloat16_sum_would_lose():
    ring = ring_of(3, {"weight": torch.empty(1000)}, torch.bfloat16)
    taken = [1 + 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for step, tensor in enumerate(taken):
        ring.append(step, {"weight": tensor})
    stored = [tensor.bfloat16() for tensor in taken]
    expected = sum(tensor.double() for tensor in stored) / 3
    error = (merged(ring, uniform(ring))["weight"].double() - expected).abs().max()
    error_in_bfloat16 = (sum(stored) / 3 - expected).abs().max()
    assert error < 1e-6
    assert error_in_bfloat16 > 1e-3


def test_snapshots_without_a_coefficient_are_not_read():
    ring = ring_of(2, {"weight": torch.empty(3)})
    ring.append(1, {"weight": torch.full((3,), torch.nan)})
    ring.append(2, {"weight": torch.ones(3)})
    assert torch.equal(merged(ring, [0.0, 1.0])["weight"], torch.ones(3))


@pytest.mark.parametrize("ample_share", [0.25, 0.0])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_merges_made_at_once_are_those_made_alone_to_the_bit(monkeypatch, ample_share, dtype):
    # Without memory to spare they are made one after the other.
    monkeypatch.setattr(snapshots, "AMPLE_SHARE", ample_share)
    ring = ring_of(4, tensors(0), dtype)
    for step in range(4):
        ring.append(step, tensors(step))
    many = [[0.25] * 4, [0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0], [-0.5, 0.5, 0.5, 0.5], [0.7, 0.7, 0.0, -0.4]]
    for _ in range(2):
        made = [[part.clone() for part in row] for row in ring.merges(many)]
        for coefficients, row in zip(many, made, strict=True):
            assert all(map(torch.equal, row, ring.combine(coefficients)))
    assert len(ring._kept_rows) == (5 if ample_share else 1)


def test_a_merge_to_keep_is_not_overwritten_by_the_next_one():
    ring = ring_of(2, {"weight": torch.empty(3)})
    for step in (1.0, 2.0):
        ring.append(int(step), {"weight": torch.full((3,), step)})
    kept = merged(ring, [1.0, 0.0])
    (fleeting,) = map(ring.storage.layout.views, ring.merges([[0.5, 0.5]]))
    assert torch.equal(fleeting["weight"], torch.full((3,), 1.5))
    list(ring.merges([[0.0, 1.0]]))
    assert torch.equal(kept["weight"], torch.ones(3))
    assert torch.equal(fleeting["weight"], torch.full((3,), 2.0))


def test_a_merge_needs_a_coefficient_for_every_snapshot():
    ring = ring_of(3, tensors(0))
    for step in range(3):
        ring.append(step, tensors(step))
    for coefficients in ([1.0], [0.25] * 4):
        with pytest.raises(ValueError, match="zip"):
            ring.combine(coefficients)


def test_the_ring_owns_its_snapshots():
    live = {"weight": torch.ones(3)}
    ring = ring_of(2, live)
    ring.append(1, live)
    live["weight"].add_(1)
    merged(ring, [1.0])["weight"].add_(1)
    assert torch.equal(merged(ring, [1.0])["weight"], torch.ones(3))


@pytest.mark.parametrize(("capacity", "kept"), [(4, [0, 2]), (5, [0, 2, 4]), (2, [0])])
def test_thinning_keeps_the_oldest_and_every_second(capacity, kept):
    ring = ring_of(capacity, tensors(0))
    for step in range(capacity):
        ring.append(step, tensors(step))
    ring.thin()
    assert ring.steps == kept
    ring.append(99, tensors(99))
    for position, step in enumerate([*kept, 99]):
        alone = merged(ring, [float(i == position) for i in range(len(kept) + 1)])
        assert torch.equal(alone["tensor0"], tensors(step)["tensor0"])


def test_spread_agrees_with_the_float64_twin():
    ring = ring_of(4, tensors(0))
    taken = [tensors(seed) for seed in range(4)]
    for step, snapshot in enumerate(taken):
        ring.append(step, snapshot)
    coefficients = [0.0, 0.5, 0.25, 0.25]
    expected = reference.spread(taken[1:], reference.merge(taken[1:], coefficients[1:]))
    assert ring.spread(coefficients, ring.combine(coefficients)) == pytest.approx(expected, rel=1e-5)
    assert ring.spread([0.0, 0.0, 0.0, 1.0], ring.combine([0.0, 0.0, 0.0, 1.0])) == 0


def test_a_saved_ring_continues_in_another_one_with_as_many_of_the_newest_as_fit():
    ring = ring_of(4, tensors(0))
    for step in range(6):
        ring.append(step, tensors(step))
    for capacity in (4, 2, 7):
        other = ring_of(capacity, tensors(0))
        changes = other.restore_(ring.steps, ring.begins, dict(ring.snapshots()).__getitem__, {})
        assert changes == (["the oldest 2 of 4 snapshots were dropped"] if capacity == 2 else [])
        assert other.steps == [2, 3, 4, 5][-capacity:]
        newest = [0.0] * (len(other.steps) - 1) + [1.0]
        assert torch.equal(merged(other, newest)["transposed"], tensors(5)["transposed"])


def test_tensors_lie_aligned_in_a_row():
    storage = DeviceStorage(RowLayout(tensors(0)), 2)
    row = storage.row(1)
    for view in storage.layout.views(row).values():
        assert view.numel() == 0 or view.data_ptr() % 64 == row[0].data_ptr() % 64


def test_a_ring_that_does_not_fit_is_refused_with_both_sizes():
    required = required_bytes(RowLayout({"weight": torch.empty(2**20, device="cpu")}), 10, torch.bfloat16)
    assert required == {torch.device("cpu"): 10 * 2 * 2**20}
    with pytest.raises(
        MemoryError,
        match=r"num_snapshots=10 snapshots and a merge of them need 1048576.00 GiB on cpu, but only .* GiB are free",
    ):
        refuse_if_too_large({torch.device("cpu"): 2**50}, 10)
    with pytest.raises(MemoryError, match=r"2 averages and a merge of them for 4 processes need 4194304.00 GiB on cpu"):
        refuse_if_too_large({torch.device("cpu"): 2**50}, 10, 2, num_processes=4)
    refuse_if_too_large(required, 10)
