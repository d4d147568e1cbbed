"""The kernel of all merges: against float64, exact where rows are equal, each row read once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_callback.merging.combine import CHUNK_NUMEL, combine_, flat_chunks


@given(st.integers(1, 12), st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(0, 2**16))
@settings(deadline=None)
def test_a_merge_of_equal_snapshots_returns_them_exactly(count, raw, seed):
    raw = (raw * count)[:count]
    total = sum(raw)
    coefficients = [c / total for c in raw] if abs(total) > 0.1 else [1 / count] * count
    coefficients = [c if c != 0 else 0.0 for c in coefficients]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        row = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        out = torch.empty_like(row)
        used = [c for c in coefficients if c != 0]
        combine_([out], [row] * len(used), [used])
        assert torch.equal(out, row)


@given(
    st.lists(st.floats(-1, 1).filter(lambda c: abs(c) > 1e-3), min_size=1, max_size=12).filter(lambda c: sum(c) > 0.2),
    st.integers(0, 2**16),
)
@settings(deadline=None)
def test_the_kernel_agrees_with_a_float64_sum_also_for_negative_coefficients(raw, seed):
    coefficients = [c / sum(raw) for c in raw]
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(257, generator=generator) for _ in raw]
    out = torch.empty(257)
    combine_([out], rows, [coefficients])
    expected = sum(c * row.double() for c, row in zip(coefficients, rows, strict=True))
    scale = sum(abs(c) for c in coefficients)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5 * scale)


class CountedRow:
    """A row that counts how many of its elements were asked for."""

    def __init__(self, row):
        self.row = row
        self.num_read = 0

    def __getitem__(self, part):
        found = self.row[part]
        self.num_read += found.numel()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_read_once_for_several_sums_and_never_without_a_coefficient(dtype):
    size = 2 * CHUNK_NUMEL + 17
    rows = [CountedRow(torch.randn(size).to(dtype)) for _ in range(4)]
    outs = [torch.empty(size) for _ in range(3)]
    coefficients = [[0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.5, 0.25, 0.0]]
    combine_(outs, rows, coefficients)
    assert [row.num_read for row in rows] == [size, size, size, 0]
    for out, values in zip(outs, coefficients, strict=True):
        expected = sum(c * row.row.double() for c, row in zip(values, rows, strict=True))
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@given(
    st.lists(
        st.lists(st.floats(-0.3, 1), min_size=5, max_size=5).filter(lambda c: sum(c) > 0.5), min_size=1, max_size=4
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None)
def test_sums_made_together_are_those_made_alone_to_the_bit(raw, dtype, stored):
    rows = [torch.randn(100, generator=torch.Generator().manual_seed(seed)).to(stored) for seed in range(5)]
    coefficients = [[c / sum(each) for c in each] for each in raw]
    together = [torch.empty(100, dtype=dtype) for _ in coefficients]
    combine_(together, rows, coefficients)
    for values, out in zip(coefficients, together, strict=True):
        alone = torch.empty(100, dtype=dtype)
        combine_([alone], rows, [values])
        assert torch.equal(out, alone)


@pytest.mark.parametrize("shape", [(2 * CHUNK_NUMEL + 1,), (3, CHUNK_NUMEL), (), (0, 3)])
def test_two_tensors_are_gone_through_in_matching_parts(shape):
    first, second = torch.zeros(shape), torch.arange(torch.Size(shape).numel()).float().reshape(shape)
    for part, other in flat_chunks(first, second):
        assert part.numel() <= CHUNK_NUMEL * torch.get_num_threads()
        part.copy_(other)
    assert torch.equal(first, second)
    for part, other in flat_chunks(
        first.t() if first.dim() == 2 else first, second.t() if second.dim() == 2 else second
    ):
        assert torch.equal(part, other)
