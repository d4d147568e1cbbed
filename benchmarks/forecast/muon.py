"""The demo's model, trained with Muon."""

from collections import defaultdict
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer

from merge_callback.apps.demo.model import ByteGPT


class MuonAndAdamW(Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with the groups and states of both.

    Args:
        hidden: Matrices that Muon updates.
        groups: Parameter groups that AdamW updates.
        lr: Rate of both; Muon's updates are scaled to the size of AdamW's.
        weight_decay: Of both.
    """

    def __init__(
        self, hidden: list[torch.nn.Parameter], groups: list[dict[str, Any]], lr: float, weight_decay: float
    ) -> None:
        self._muon = Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self.state = defaultdict(dict)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a state replaces the groups.
        first, *others = self.param_groups
        for optimizer, groups in ((self._muon, [first]), (self._adamw, others)):
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()
        return loss


class MuonGPT(ByteGPT):
    """`ByteGPT` with Muon for the matrices of its blocks, and AdamW for embeddings, norms and biases."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        hidden = [parameter for parameter in self.blocks.parameters() if parameter.ndim > 1]
        taken = set(map(id, hidden))
        groups = [
            {"params": [p for p in self.parameters() if id(p) not in taken and p.ndim > 1]},
            {"params": [p for p in self.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = MuonAndAdamW(hidden, groups, self.hparams["learning_rate"], self.hparams["weight_decay"])
        schedule = found["lr_scheduler"]["scheduler"].lr_lambdas[0]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
