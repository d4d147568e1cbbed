"""Where work runs beside the host's: on a GPU with TEST_DEVICE=cuda, and on a CPU as in every run of the tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn import functional as F

from merge_callback import Ema, MergeCallback
from tests.helpers.ranks import Ranks
from tests.helpers.sharded_toys import Sharded, fit_sharded, weights
from tests.helpers.toys import (
    DEVICE,
    Base,
    BusyToy,
    ResumableBatches,
    Toy,
    Tracker,
    assert_same_training,
    batches,
    fit,
    make,
    same,
)

pytestmark = [
    pytest.mark.gpu,
    # Of what compiles for a GPU.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
]

ON_CPU = DEVICE.type == "cpu"
# On a GPU, a copy of the weights to the host takes longer than a step.
WIDTH = 32 if ON_CPU else 4096
# On a CPU, memory is memory.
STORAGES = ["device", *(pytest.param(each, marks=pytest.mark.slow) for each in ("cpu", "files"))]


def newest(steps):
    return [0.0] * (len(steps) - 1) + [1.0]


def oldest(steps):
    return [1.0] + [0.0] * (len(steps) - 1)


class Wide(Base):
    """Every step writes to all of its many weights at once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("kind", STORAGES)
def test_a_snapshot_holds_the_weights_of_its_step_though_the_next_step_writes_at_once(tmp_path, kind):
    tracker = Tracker()
    merges = {"newest": newest, "oldest": oldest, "ema": Ema(half_life_steps=3)}
    callback = MergeCallback(1, 3, merges=merges, start=0, storage=place(tmp_path, kind))
    fit(make(Wide), tmp_path, callback, tracker, max_steps=8, val_check_interval=8)
    first, _, last = callback.snapshot_steps
    for name, step in (("oldest", first), ("newest", last)):
        expected = {**tracker.parameters[step], **tracker.buffers[last]}
        assert same(dict(callback.merged_state_dict(name)), expected)
    average = tracker.parameters[1]
    for step in range(2, 9):
        average = {
            k: v.double().lerp(tracker.parameters[step][k].double(), 1 - 0.5 ** (1 / 3)) for k, v in average.items()
        }
    for key, tensor in callback.merged_state_dict("ema").items():
        torch.testing.assert_close(tensor.cpu().double(), average[key].cpu().double(), rtol=1e-5, atol=1e-7)


def place(folder: Path, kind: str) -> Any:
    return folder / "snapshots" if kind == "files" else kind


class Drawing(BusyToy):
    """Draws on its device in validations, and trains with the dropout of a recurrent layer, which has a state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(6, 6, num_layers=2, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.recurrent(x)[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        super().validation_step((x + 0.1 * torch.rand_like(x), y), batch_idx)


class Fused(BusyToy):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.05, fused=True)


class Narrow(BusyToy):
    """In bfloat16, all of it."""


class Compiled(BusyToy):
    def __init__(self) -> None:
        super().__init__()
        self.inner.compile(backend="eager" if ON_CPU else "inductor")


class Graphed(BusyToy):
    """On a GPU, a graph that holds the addresses of its weights."""

    def __init__(self) -> None:
        super().__init__()
        how: Any = {"backend": "eager"} if ON_CPU else {"mode": "reduce-overhead"}
        self.inner.compile(**how)


# Recurrent layers compact the weights of a merge, which are not theirs.
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize(
    ("module_class", "options"),
    [
        (Drawing, {}),
        (Fused, {}),
        (BusyToy, {"precision": "bf16-mixed" if ON_CPU else "16-mixed"}),
        (Narrow, {"precision": "bf16-true"}),
        (Compiled, {}),
        (Graphed, {}),
    ],
    ids=["drawing", "fused", "half", "narrow", "compiled", "graphed"],
)
@pytest.mark.sample(1)
def test_training_on_the_device_is_bit_identical_with_and_without_the_callback(tmp_path, module_class, options, kind):
    without = fit(make(module_class), tmp_path / "without", **options)
    callback = MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=3)}, storage=place(tmp_path, kind))
    watched = fit(make(module_class), tmp_path / "with", callback, **options)
    assert watched.logged("merged/val_loss")
    assert_same_training(without, watched)


@pytest.mark.parametrize("toy_class", [Compiled, Graphed])
@pytest.mark.slow
def test_a_compiled_module_validates_the_merged_weights(tmp_path, toy_class):
    plain, compiled = (
        fit(make(each), tmp_path / each.__name__, MergeCallback(2, 3)).logged("merged/val_loss")
        for each in (BusyToy, toy_class)
    )
    assert [step for step, _ in plain] == [step for step, _ in compiled]
    for (_, expected), (_, found) in zip(plain, compiled, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.slow
def test_a_run_that_stopped_on_the_device_goes_on_as_if_it_had_not(tmp_path, kind):
    def watched(name, max_steps, ckpt_path=None):
        module = make(Toy)
        # Lightning's checkpoints hold no random states.
        module.dropout.p = 0.0
        merges = {"sma": "sma", "sqrt": "1-sqrt", "ema": Ema(half_life_steps=3)}
        callback = MergeCallback(2, 3, merges=merges, storage=place(tmp_path / name, kind))
        options = {"train": ResumableBatches(), "max_steps": max_steps, "ckpt_path": ckpt_path}
        return fit(module, tmp_path / name, callback, **options), callback

    whole, whole_callback = watched("whole", 24)
    stopped, _ = watched("stopped", 13)
    path = tmp_path / "stopped.ckpt"
    stopped.trainer.save_checkpoint(path)
    resumed, callback = watched("resumed", 24, str(path))
    assert same(dict(resumed.module.state_dict()), dict(whole.module.state_dict()))
    assert callback.snapshot_steps == whole_callback.snapshot_steps
    for name in ("sma", "sqrt", "ema"):
        assert same(dict(callback.merged_state_dict(name)), dict(whole_callback.merged_state_dict(name)))
    later = [pair for pair in whole.logged("merged/val_loss") if pair[0] >= 13]
    assert resumed.logged("merged/val_loss") == later


class Offloaded(Sharded):
    """FSDP2 whose shards are kept in host memory."""

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        policy = CPUOffloadPolicy(pin_memory=not ON_CPU)
        for layer in (self.up, self.down, self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"], offload_policy=policy)


class Offloading(ModelParallelStrategy):
    """Leaves parameters where they are; Lightning's own would move them to the device."""

    def model_to_device(self) -> None:
        assert self.model is not None
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.root_device)


def sharded_run(folder: Path, how: str, kind: str, is_watched: bool) -> dict[str, Any]:
    """What is left of a fit under FSDP2 on one rank, in host memory."""
    callback = MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=3)}, storage=place(folder, kind))
    module = make(Offloaded) if how == "offloaded" else None
    options: dict[str, Any] = {"reshard": False} if how == "gathered" else {}
    if how == "offloaded":
        options["strategy"] = Offloading(1, 1)
    run = fit_sharded(folder, "fsdp1", *([callback] if is_watched else []), module=module, **options)
    merged = {}
    if is_watched:
        callback.save_merged(folder / "merged.ckpt")
        merged = torch.load(folder / "merged.ckpt", weights_only=True)["state_dict"]
    own = {name: tensor.cpu() for name, tensor in weights(run.module).items()}
    return {
        "weights": own,
        "rows": run.live_rows(),
        "rng": run.rng,
        "merged": merged,
        "logged": run.logged("merged/val_loss"),
    }


@pytest.fixture(scope="module")
def one_rank():
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORAGES)
@pytest.mark.parametrize("how", ["plain", "gathered", "offloaded"])
def test_shards_on_the_device_train_the_same_and_their_merge_is_that_of_the_whole_model(tmp_path, one_rank, how, kind):
    (without,) = one_rank.run(sharded_run, tmp_path / "without", how, kind, False)
    (watched,) = one_rank.run(sharded_run, tmp_path / "with", how, kind, True)
    for key in ("weights", "rows", "rng"):
        assert same(without[key], watched[key]), key
    whole = MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=3)})
    run = fit(make(Sharded), tmp_path / "whole", whole, max_steps=12, train=batches(shuffle=False))
    assert [step for step, _ in watched["logged"]] == [step for step, _ in run.logged("merged/val_loss")]
    for (_, found), (_, expected) in zip(watched["logged"], run.logged("merged/val_loss"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    for name, tensor in whole.merged_state_dict().items():
        torch.testing.assert_close(watched["merged"][name].cpu(), tensor.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_script_for_gpus_runs_here_as_a_trial(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"
    environment = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path), "RECORDS": str(tmp_path)}
    done = subprocess.run([script, "--device", "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in sorted(done.stdout.splitlines())] == ["costs", "demo", "tests"]
    assert "1 passed" in (tmp_path / "tests.txt").read_text()
    assert "live" in (tmp_path / "demo.txt").read_text()
