"""A plain training loop, as anybody would write it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_callback import Merger
from tests.helpers.toys import DEVICE, same


class Net(nn.Module):
    """Dropout draws random numbers, batch norm has buffers, and one parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.last = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x))))) * self.frozen


def constant(step: int) -> float:
    return 1.0


def warmup_stable_decay(step: int) -> float:
    """Five steps of warmup, a constant rate, and a decay over the last eight of 40 steps."""
    return min(1.0, (step + 1) / 5, max(0.0, (40 - step) / 8))


@dataclass
class Loop:
    """A run of a plain loop, which can be interrupted and resumed.

    Args:
        merger: Merges its weights; None for a run without.
        schedule: Multiplier of the learning rate by step.
    """

    merger: Merger | None = None
    schedule: Callable[[int], float] = constant
    optimizer_class: Any = torch.optim.AdamW
    validate_every: int = 5
    # Weights after each step, and what `observe` returned.
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    logged: dict[int, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model: Any = Net().to(DEVICE)
        self.optimizer = self.optimizer_class(self.model.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(96, 6, generator=generator).to(DEVICE)
        self.targets = torch.randint(3, (96,), generator=generator).to(DEVICE)

    def validate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            loss = F.cross_entropy(model(self.inputs[64:]), self.targets[64:])
        model.train()
        return {"val_loss": float(loss)}

    def run(self, until: int, begin: int = 0) -> "Loop":
        for step in range(begin + 1, until + 1):
            rows = torch.randint(64, (16,))
            F.cross_entropy(self.model(self.inputs[rows]), self.targets[rows]).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            if self.merger is not None:
                self.merger.step(self.model, self.optimizer)
            self.weights[step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            if step % self.validate_every == 0:
                self.observe(step, self.validate(self.model))
        return self

    def observe(self, step: int, live: dict[str, float]) -> None:
        if (merger := self.merger) is not None and merger.is_ready:
            found = {}
            for name in merger.merges:
                with merger.merged_weights(self.model, name):
                    found[name] = self.validate(self.model)
            primary, *others = found
            self.logged[step] = merger.observe(live, found[primary], {name: found[name] for name in others})

    def state(self) -> dict[str, Any]:
        """All that a checkpoint of this loop holds."""
        saved = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        random = {"rng": torch.get_rng_state(), "device_rng": torch.cuda.get_rng_state_all()}
        return saved | {"merger": self.merger.state_dict() if self.merger else {}, **random}

    def load(self, state: dict[str, Any]) -> "Loop":
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        if self.merger is not None:
            self.merger.load_state_dict(state["merger"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["device_rng"])
        return self


def assert_same_loop(left: Loop, right: Loop) -> None:
    """Fails unless two runs have trained alike, to the bit."""
    assert same(left.model.state_dict(), right.model.state_dict())
    assert same(left.optimizer.state_dict(), right.optimizer.state_dict())
    assert same(left.weights, right.weights)
