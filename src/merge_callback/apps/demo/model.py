"""A byte-level GPT, trained with a linear warmup and then a constant rate: the stable phase, where merges help."""

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BYTES = 256
# Weight of the loss that keeps the load of the experts even.
BALANCE_WEIGHT = 0.01


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of several experts. Every token uses those that the router scores highest for it.

    The active experts together are as wide as the dense layer that they replace.

    Args:
        width: Size of the residual stream.
        num_experts: Number of experts.
        num_active: Number of experts that a token uses.
    """

    def __init__(self, width: int, num_experts: int, num_active: int = 2) -> None:
        super().__init__()
        self.num_active = num_active
        hidden = 4 * width // num_active
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden) * 0.02)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) * 0.02)
        # Loss of the latest forward pass, until `training_step` takes it; one if all experts have the same load.
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        probabilities = self.router(tokens).softmax(-1)
        weights, chosen = probabilities.topk(self.num_active)  # [tokens, num_active]
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows, ranks = (chosen == expert).nonzero(as_tuple=True)
            hidden = F.gelu(tokens[rows] @ up) @ down
            mixed = mixed.index_add(0, rows, hidden * weights[rows, ranks, None])
        num_experts = len(self.up)
        load = F.one_hot(chosen, num_experts).float().mean((0, 1))
        self.balance_loss = num_experts * (load * probabilities.mean(0)).sum()
        return mixed.view_as(x)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm, each added to its input."""

    def __init__(self, width: int, num_heads: int, dropout: float, num_experts: int = 0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        dense = [nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)]
        layers = [MixtureOfExperts(width, num_experts)] if num_experts else dense
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), *layers, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        # [batch, length, width] -> three of [batch, heads, length, width / heads]
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0)
        query, key, value = heads.transpose(-3, -2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(x)


class ByteGPT(LightningModule):
    """Predicts the next byte; logs ``val_loss`` in nats per byte.

    Args:
        num_layers: Number of blocks.
        width: Size of the residual stream.
        num_heads: Attention heads per block.
        context: Number of bytes that a prediction can see.
        dropout: Probability of dropout, in attention and after the feed-forward layer.
        learning_rate: The constant rate, reached after the warmup.
        warmup_steps: Optimizer steps of linear warmup.
        weight_decay: Weight decay of matrices; norms have none.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        num_experts: Experts in each feed-forward layer, of which a token uses two; 0 is a dense layer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_heads: int,
        context: int,
        dropout: float,
        learning_rate: float,
        warmup_steps: int,
        weight_decay: float,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        num_experts: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.byte_embedding = nn.Embedding(NUM_BYTES, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, dropout, num_experts) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.byte_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of the next byte: ``[batch, length]`` -> ``[batch, length, 256]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.byte_embedding(tokens) + self.position_embedding(positions))
        return self.head(self.norm(hidden))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        experts = [module for module in self.modules() if isinstance(module, MixtureOfExperts)]
        for layer in experts:
            assert layer.balance_loss is not None
            loss = loss + BALANCE_WEIGHT * layer.balance_loss / len(experts)
            layer.balance_loss = None
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        shared = {"lr": self.hparams["learning_rate"], "weight_decay": self.hparams["weight_decay"]}
        optimizer = (
            torch.optim.AdamW(groups, betas=(0.9, 0.95), **shared)
            if self.hparams["optimizer"] == "adamw"
            else torch.optim.SGD(groups, momentum=0.9, **shared)
        )
        warmup_steps = self.hparams["warmup_steps"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
