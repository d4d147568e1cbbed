"""Small things that really train: modules, data and a fit that records everything a callback could disturb."""

import csv
import importlib
import inspect
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers import reference

# Where the toys train. The tests marked `gpu` run on a GPU as well: TEST_DEVICE=cuda python -m pytest -m gpu.
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
NUM_CLASSES = 3
# What the callback logs begins so.
OWN_NAMES = ("merge", "annealed", "forecast")

# Lightning lives under two names whose classes know nothing of each other. Toys are written without a base class and
# get the one of the name in use.
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
namespace = NAMESPACES[0]
if TYPE_CHECKING:
    Base = LightningModule
else:
    Base = object


def lightning(submodule: str = "") -> Any:
    """The Lightning package that is in use, or one of its modules."""
    return importlib.import_module(namespace + submodule)


def make(toy_class: Any, **arguments: Any) -> Any:
    """A toy as a LightningModule of the Lightning in use, with the same first weights each time."""
    torch.manual_seed(0)
    bases = (toy_class, lightning().LightningModule)
    return type(toy_class.__name__, bases, {"__module__": toy_class.__module__})(**arguments)


def batches(num_samples: int = 64, batch_size: int = 8, shuffle: bool = True, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 6, generator=generator)
    y = (x @ torch.randn(6, NUM_CLASSES, generator=generator)).argmax(-1)
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle)


class ResumableBatches:
    """Batches in a fixed order that go on, after a restart, where the checkpoint says they were."""

    def __init__(self, num_batches: int = 32) -> None:
        self.batches = list(batches(8 * num_batches, 8, shuffle=False))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Toy(Base):
    """A classifier with all that a merge has to tell apart: dropout, batch norm, tied, frozen and integer tensors."""

    def __init__(self, warmup_steps: int = 0, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.warmup_steps = warmup_steps
        self.learning_rate = learning_rate
        self.inner = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.inner.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(6, NUM_CLASSES)
        self.register_buffer("position_ids", torch.arange(6))
        self.register_buffer("mask", torch.full((6,), float("-inf")), persistent=False)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(torch.relu(self.inner(x)))
        return self.out(self.dropout(self.norm(x + self.frozen(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.log("val_loss", F.cross_entropy(logits, y), prog_bar=True)
        self.accuracy(logits, y)
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.learning_rate)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (self.warmup_steps + 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class BusyToy(Toy):
    """A validation that does what people do: draws, collects, counts, logs in many ways, keeps metrics in a list."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.outputs: dict[str, list[Tensor]] = {"noise": []}
        self.total = torch.zeros(())
        self.best = float("inf")
        self.num_validations = 0
        self.hidden_metrics = [MeanMetric()]
        self.collection = MetricCollection({"micro": MulticlassAccuracy(NUM_CLASSES, average="micro")})
        self.seen: list[Tensor] = []

    def on_validation_epoch_start(self) -> None:
        self.num_validations += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        x, y = batch
        noise = torch.rand(()) + random.random() + np.random.rand()
        self.outputs["noise"].append(noise)
        self.total += noise
        self.hidden_metrics[0].update(noise)
        self.seen.append(x.sum())
        logits = self(x + 0.1 * noise)
        self.log("val/noisy_loss", F.cross_entropy(logits, y), on_step=True, on_epoch=True)
        self.log_dict(self.collection)
        self.collection.update(logits, y)

    def on_validation_epoch_end(self) -> None:
        noise = torch.stack(self.outputs["noise"]).mean()
        self.outputs["noise"].clear()
        self.best = min(self.best, float(noise))
        self.log("mean_noise", noise)
        self.log("best_noise", self.best)
        self.log("running_total", self.total.clone())
        self.log("hidden", self.hidden_metrics[0].compute())
        self.log("num_validations", float(self.num_validations))


@dataclass
class Run:
    """All that is left of a fit."""

    module: LightningModule
    trainer: Trainer
    rows: list[dict[str, str]]
    rng: list[Any]
    epoch_metrics: list[dict[str, Tensor]] = field(default_factory=list)

    def live_rows(self) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if v and not k.startswith(OWN_NAMES)} for row in self.rows]

    def logged(self, key: str) -> list[tuple[int, float]]:
        return [(int(row["step"]), float(row[key])) for row in self.rows if row.get(key)]


class Recorder(Callback):
    """Keeps the trainer's metrics at the end of each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Tensor]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: value.clone() for name, value in trainer.callback_metrics.items()})


class Tracker(Callback):
    """Keeps the trainable parameters and the buffers after every optimizer step."""

    def __init__(self) -> None:
        self.parameters: dict[int, dict[str, Tensor]] = {}
        self.buffers: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
        step = trainer.global_step // len(trainer.optimizers)
        named = {name: tensor for name, tensor in pl_module.named_parameters() if tensor.requires_grad}
        self.parameters[step] = {name: tensor.detach().clone() for name, tensor in named.items()}
        self.buffers[step] = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}

    def merged(self, coefficients: dict[int, float]) -> dict[str, Tensor]:
        """The float64 twin of a merge of these steps."""
        return reference.merge([self.parameters[step] for step in coefficients], list(coefficients.values()))


# Lightning averages weights itself from 2.6 on.
averages_weights = pytest.mark.skipif(
    not hasattr(lightning(".callbacks"), "EMAWeightAveraging"), reason="this Lightning has no EMAWeightAveraging"
)


def loading(trainer: Any, weights_only: bool | None) -> dict[str, Any]:
    """How `Trainer.fit` reads a checkpoint, as an argument where it has one: from Lightning 2.6 on."""
    is_told = "weights_only" in inspect.signature(trainer.fit).parameters
    return {"weights_only": weights_only} if is_told else {}


def fit(
    module: LightningModule,
    folder: Path,
    *callbacks: Callback,
    max_steps: int = 24,
    train: Any = None,
    validation: Any = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> Run:
    seed_everything(7)
    recorder = Recorder()
    arguments: dict[str, Any] = {
        "val_check_interval": 4,
        "log_every_n_steps": 1,
        "accelerator": DEVICE.type,
        "devices": 1,
        "deterministic": DEVICE.type != "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": lightning(".loggers").CSVLogger(folder),
    }
    trainer = lightning().Trainer(
        max_steps=max_steps, callbacks=[*callbacks, recorder], **(arguments | trainer_arguments)
    )
    train = batches() if train is None else train
    validation = batches(24, 8, shuffle=False, seed=1) if validation is None else validation
    trainer.fit(module, train, validation, ckpt_path=ckpt_path, **loading(trainer, weights_only))
    rng = [torch.get_rng_state(), random.getstate(), np.random.get_state(), *torch.cuda.get_rng_state_all()]
    assert trainer.logger is not None
    metrics_file = Path(str(trainer.logger.log_dir)) / "metrics.csv"
    rows = list(csv.DictReader(metrics_file.read_text().splitlines())) if metrics_file.exists() else []
    return Run(module, trainer, rows, rng, recorder.metrics)


@contextmanager
def interrupted_between_tensors() -> Iterator[None]:
    """An average is interrupted in here when those tensors have moved that are read in place, and no others."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("merge_callback.capture.moving.flat_chunks", interrupted)
        yield


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(left, Tensor | np.ndarray):
        left, right = torch.as_tensor(left).cpu(), torch.as_tensor(right).cpu()
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def assert_same_training(left: Run, right: Run) -> None:
    """Parameters, buffers, optimizers, schedulers, random states, logged live values and progress are bit-identical."""
    assert same(left.module.state_dict(), right.module.state_dict())
    for ours, theirs in zip(left.trainer.optimizers, right.trainer.optimizers, strict=True):
        assert same(ours.state_dict(), theirs.state_dict())
    rates = [[c.scheduler.get_last_lr() for c in run.trainer.lr_scheduler_configs] for run in (left, right)]
    assert rates[0] == rates[1]
    assert same(left.rng, right.rng)
    assert left.live_rows() == right.live_rows()
    assert same(*([live(metrics) for metrics in run.epoch_metrics] for run in (left, right)))
    assert same(live(left.trainer.logged_metrics), live(right.trainer.logged_metrics))
    assert same(live(left.trainer.progress_bar_metrics), live(right.trainer.progress_bar_metrics))
    assert left.trainer.fit_loop.state_dict() == right.trainer.fit_loop.state_dict()


def live(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(OWN_NAMES)}
