"""Serves a corpus as blocks of bytes, for next-byte prediction."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from merge_callback.apps.demo.corpus import load_corpus


class ByteBlocks(Dataset[Tensor]):
    """Consecutive blocks of a text: the context and one byte more, as ``[context + 1]`` int64 tensors."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()


class ShuffledBatches:
    """Batches of shuffled blocks, in another order each epoch. After a resume they continue with the next batch.

    A resumed run, and a branch that decays from a checkpoint, therefore see the data that the uninterrupted run sees.

    Args:
        blocks: The blocks to draw from.
        batch_size: Blocks per batch; an incomplete batch at the end of an epoch is left out.
        seed: Determines the order.
    """

    def __init__(self, blocks: ByteBlocks, batch_size: int, seed: int) -> None:
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.num_drawn = 0

    def __len__(self) -> int:
        return len(self.blocks) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        if self.num_drawn == len(self):
            self.epoch, self.num_drawn = self.epoch + 1, 0
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        batches = order[: len(self) * self.batch_size].view(-1, self.batch_size).tolist()
        while self.num_drawn < len(self):
            self.num_drawn += 1
            yield torch.stack([self.blocks[index] for index in batches[self.num_drawn - 1]])

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "num_drawn": self.num_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.num_drawn = state["epoch"], state["num_drawn"]


class TextDataModule(LightningDataModule):
    """A corpus in batches: shuffled blocks for training, evenly spaced blocks of held-out documents for validation.

    Args:
        corpus: Name or path of the corpus, as for `load_corpus`.
        context: Bytes per block.
        batch_size: Blocks per batch.
        num_validation_blocks: Number of blocks in the validation.
        seed: Determines the order of the training blocks.
    """

    def __init__(self, corpus: str, context: int, batch_size: int, num_validation_blocks: int, seed: int = 0) -> None:
        super().__init__()
        self.corpus = load_corpus(corpus)
        self.context = context
        self.batch_size = batch_size
        self.num_validation_blocks = num_validation_blocks
        self.seed = seed

    def train_dataloader(self) -> ShuffledBatches:
        return ShuffledBatches(ByteBlocks(self.corpus.train, self.context), self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader[Tensor]:
        blocks = ByteBlocks(self.corpus.validation, self.context)
        stride = max(1, len(blocks) // self.num_validation_blocks)
        chosen = [blocks[index] for index in range(0, len(blocks), stride)][: self.num_validation_blocks]
        return DataLoader(chosen, self.batch_size, num_workers=0)  # type: ignore[arg-type]
