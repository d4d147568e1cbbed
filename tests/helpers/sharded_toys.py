"""A toy that shards itself, and what a test wants to know of its fit, for `tests.helpers.ranks`."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from merge_callback import MergeCallback
from merge_callback.live.sharding import reshard
from tests.helpers import reference
from tests.helpers.toys import Base, Run, batches, fit, make

WIDTH = 10


class Sharded(Base):
    """A classifier with uneven shards (7 rows on two ranks) and empty ones (a scale of one element).

    Args:
        form: "fsdp", "tp", "fsdp+tp", or "" for a plain one.
        reshard: FSDP2's ``reshard_after_forward``.
        narrow: Whether FSDP2 computes in bfloat16.
    """

    def __init__(self, form: str = "", reshard: bool | int = True, narrow: bool = False) -> None:
        super().__init__()
        self.form, self.reshard_after_forward, self.narrow = form, reshard, narrow
        self.up = nn.Linear(6, WIDTH)
        self.down = nn.Linear(WIDTH, 7)
        self.norm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(7, 3)
        self.register_buffer("seen", torch.zeros(1))

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()) or not self.form:
            return
        mesh = self.device_mesh
        assert mesh is not None
        if "tp" in self.form:
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self, mesh["tensor_parallel"], plan)
        if "fsdp" in self.form:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.narrow else None)
            for layer in (*self.sharded_alone(), self.up, self.down, self):
                fully_shard(
                    layer,
                    mesh=mesh["data_parallel"],
                    reshard_after_forward=self.reshard_after_forward,
                    mp_policy=policy,
                )

    def sharded_alone(self) -> tuple[nn.Module, ...]:
        """Layers of a subclass that FSDP2 shards by themselves."""
        return ()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scale * self.norm(self.down(torch.relu(self.up(x)))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.get_buffer("seen").add_(1)
        loss = F.cross_entropy(self(x).float(), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x).float(), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05, foreach=False)


class FullTracker(Callback):
    """Gathers all weights after every step."""

    def __init__(self) -> None:
        self.parameters: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        pl_module_parameters = dict(pl_module.named_parameters())
        self.parameters[trainer.global_step] = {name: full(p) for name, p in pl_module_parameters.items()}


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, a copy."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def strategy(form: str, **options: Any) -> dict[str, Any]:
    """Trainer arguments for a form of parallelism over as many ranks as there are."""
    ranks = {"fsdp": (2, 1), "tp": (1, 2), "fsdp+tp": (2, 2), "fsdp1": (1, 1)}
    if form == "ddp":
        return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    if not form:
        return {}
    data, tensor = ranks[form]
    return {"strategy": ModelParallelStrategy(data, tensor, **options), "devices": data * tensor}


def fit_sharded(folder: Path, form: str, *callbacks: Any, module: Any = None, **options: Any) -> Run:
    """Trains it over the same batches on every rank, so that all forms train alike."""
    toy_form = "" if form == "ddp" else form.replace("fsdp1", "fsdp")
    names = ("reshard", "narrow")
    arguments = {name: options.pop(name) for name in names if name in options}
    module = module or make(Sharded, form=toy_form, **arguments)
    defaults: dict[str, Any] = {
        "use_distributed_sampler": False,
        "train": batches(shuffle=False),
        "max_steps": 12,
    } | strategy(form)
    return fit(module, folder, *callbacks, **(defaults | options))


def weights(module: Any) -> dict[str, Tensor]:
    """All parameters, whole. After a validation FSDP2 may leave gathered ones in their place."""
    reshard(module)
    return {name: full(tensor) for name, tensor in module.named_parameters()}


def merge_by_hand(tracker: FullTracker, callback: MergeCallback, name: str | None = None) -> dict[str, Tensor]:
    """The merge of whole weights in float64."""
    coefficients = callback.coefficients(name)
    return reference.merge([tracker.parameters[step] for step in coefficients], list(coefficients.values()))
