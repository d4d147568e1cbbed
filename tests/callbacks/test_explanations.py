"""What is said of costs: by how much checkpoints grow, and when a window is larger than all else."""

import re

import pytest
import torch

from merge_callback import Ema, MergeCallback, SnapshotMemory
from merge_callback.callbacks import explanations
from tests.helpers.toys import Toy, fit, lightning, make


class Wide(Toy):
    """Some MiB of weights, so that what else a checkpoint holds is little beside them."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(1000, 500)

    def forward(self, x):
        return super().forward(x) + 0 * (self.wide.weight.sum() + self.wide.bias.sum())

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), 1e-3)


def run(tmp_path, callback, *, is_saved=True):
    """Trains it, with a checkpoint at the end."""
    saving = [lightning(".callbacks").ModelCheckpoint(tmp_path / "saved", every_n_train_steps=16)] if is_saved else []
    return fit(make(Wide), tmp_path / "run", callback, *saving, max_steps=16, enable_checkpointing=is_saved)


def said_of(caplog):
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if "each checkpoint" in text]


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_snapshots": 3},
        {"num_snapshots": 4, "snapshot": "mean", "dtype": "bfloat16"},
        {"num_snapshots": 2, "merges": {"sma": "sma", "ema": Ema(half_life_steps=5)}, "storage": "cpu"},
    ],
)
@pytest.mark.sample(1)
def test_the_size_of_checkpoints_is_said_as_it_will_be(tmp_path, caplog, arguments):
    with caplog.at_level("INFO"):
        run(tmp_path, MergeCallback(3, **arguments))
    (said,) = said_of(caplog)
    before, after = map(float, re.findall(r"([\d.]+) MiB", said))
    (path,) = (tmp_path / "saved").glob("*.ckpt")
    assert path.stat().st_size / 2**20 == pytest.approx(after, abs=0.1)
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {}
    torch.save(content, tmp_path / "without.ckpt")
    assert (tmp_path / "without.ckpt").stat().st_size / 2**20 == pytest.approx(before, abs=0.1)
    if arguments.get("dtype"):
        # The recommended window at most doubles what model and AdamW take.
        assert after <= 2 * before + 0.1


@pytest.mark.parametrize("is_saved", [True, False])
@pytest.mark.sample(1)
def test_nothing_is_said_of_checkpoints_that_do_not_grow_or_are_not_saved(tmp_path, caplog, is_saved):
    place = SnapshotMemory(in_checkpoints=not is_saved)
    with caplog.at_level("INFO"):
        run(tmp_path, MergeCallback(2, 3, storage=place), is_saved=is_saved)
    assert said_of(caplog) == []


@pytest.mark.slow
def test_a_ring_that_is_larger_than_model_and_optimizer_is_warned_of_once(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(explanations, "LARGE_RING_BYTES", 0)
    warned = []
    for num_snapshots in (2, 4):
        recwarn.clear()
        run(tmp_path / str(num_snapshots), MergeCallback(2, num_snapshots))
        warned.append([str(each.message) for each in recwarn if "the window takes" in str(each.message)])
    assert warned[0] == []
    (text,) = warned[1]
    assert "the window takes 7.6 MiB, and model and optimizer 5.7 MiB; each checkpoint 5.7 MiB -> 13.4 MiB" in text
    assert "(num_snapshots=4, snapshot='mean', dtype='bfloat16')" in text
