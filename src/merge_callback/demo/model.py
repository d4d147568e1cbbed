"""A byte-level GPT, trained with AdamW, a linear warmup and then a constant rate: the phase that merging is for."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BYTES = 256


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm, each added to its input."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        # [batch, length, width] -> three of [batch, heads, length, width / heads]
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0)
        query, key, value = heads.transpose(-3, -2)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(x)


class ByteGPT(LightningModule):
    """Predicts the next byte; logs ``val_loss`` in nats a byte.

    Args:
        num_layers: Number of blocks.
        width: Size of the residual stream.
        num_heads: Attention heads a block.
        context: Bytes that a prediction can see.
        dropout: Probability, in attention and after the feed-forward layer.
        learning_rate: The constant rate, reached after the warmup.
        warmup_steps: Optimizer steps of linear warmup.
        weight_decay: Of matrices; norms have none.
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.byte_embedding = nn.Embedding(NUM_BYTES, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads, dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.byte_embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte: ``[batch, length]`` -> ``[batch, length, 256]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.blocks(self.byte_embedding(tokens) + self.position_embedding(positions))
        return self.head(self.norm(hidden))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.hparams["learning_rate"],
            betas=(0.9, 0.95),
            weight_decay=self.hparams["weight_decay"],
        )
        warmup_steps = self.hparams["warmup_steps"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
