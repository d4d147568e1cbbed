"""Parts of stored tensors are those of the tensors, and reading them reads little else."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from merge_callback.checkpoints.merge import merge_checkpoints
from merge_callback.checkpoints.stored import Piece, StoredTensor

# As the weights of all experts in one layer.
EXPERTS = (3, 64, 2**11)
PART = 2**13


def written(folder, whole, sizes, permutation):
    """A stored tensor in pieces of those sizes, each piece with its dimensions in another order in its file."""
    pieces = []
    cuts = [range(0, size, step) for size, step in zip(whole.shape, sizes, strict=True)]
    for offsets in itertools.product(*cuts):
        ends = [offset + step for offset, step in zip(offsets, sizes, strict=True)]
        part = whole[tuple(slice(*each) for each in zip(offsets, ends, strict=True))]
        stored = part.permute(permutation).contiguous()
        back = stored.permute([permutation.index(dim) for dim in range(whole.dim())])
        file = folder / f"piece{len(pieces)}"
        # Something else comes before.
        file.write_bytes(bytes(12) + stored.view(-1).numpy().tobytes())
        pieces.append(Piece(file, 12, offsets, tuple(back.shape), back.stride()))
    return StoredTensor(tuple(whole.shape), whole.dtype, tuple(pieces))


def bytes_read():
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("sizes", "permutation"),
    [
        ((3, 64, 2048), (0, 1, 2)),
        ((1, 64, 2048), (0, 1, 2)),
        ((2, 64, 2048), (0, 1, 2)),
        ((3, 20, 2048), (0, 1, 2)),
        ((3, 64, 600), (0, 1, 2)),
        ((1, 30, 1000), (0, 1, 2)),
        ((2, 64, 2048), (1, 0, 2)),
    ],
    ids=["whole", "by expert", "by two experts", "by row", "by column", "by all", "rows first"],
)
def test_parts_of_a_large_tensor_are_read_without_the_rest_of_it(tmp_path, sizes, permutation):
    whole = torch.arange(float(math.prod(EXPERTS))).view(EXPERTS)
    stored, numel = written(tmp_path, whole, sizes, permutation), whole.numel()
    before = bytes_read()
    parts = [stored[start : start + PART] for start in range(0, numel, PART)]
    read = bytes_read() - before
    assert torch.equal(torch.cat(parts), whole.view(-1))
    # A part ends in the middle of a row, and rows of two experts may lie between each other.
    assert read < 2 * whole.nbytes


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("sizes", [(4, 5, 6), (4, 5, 1), (3, 2, 4), (1, 1, 1)])
def test_every_part_is_that_of_the_tensor(tmp_path, sizes, permutation):
    whole = torch.randn(4, 5, 6, dtype=torch.float64)
    stored = written(tmp_path, whole, sizes, list(permutation))
    for start in range(0, 120, 7):
        for stop in (start, start + 1, start + 5, start + 29, 120, 200):
            assert torch.equal(stored[start:stop], whole.view(-1)[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("is_first_transposed", [True, False])
def test_a_merge_of_transposed_tensors_reads_each_file_about_once(tmp_path, dtype, is_first_transposed):
    tensors = [torch.randint(0, 9, (1000, 700)).to(dtype).t() for _ in range(2)]
    if dtype == torch.int64:
        tensors[1] = tensors[0]
    if not is_first_transposed:
        tensors[0] = tensors[0].contiguous()
    paths = [tmp_path / f"step-{step}.ckpt" for step in (1, 2)]
    for step, (path, tensor) in enumerate(zip(paths, tensors, strict=True), 1):
        torch.save({"state_dict": {"weight": tensor}, "global_step": step}, path)
    before = bytes_read()
    merge_checkpoints(paths, tmp_path / "merged.ckpt", "sma")
    if is_first_transposed:
        assert bytes_read() - before < 1.5 * sum(path.stat().st_size for path in paths)
    merged = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]["weight"]
    assert torch.equal(merged, tensors[0] if dtype == torch.int64 else (tensors[0] + tensors[1]) / 2)
