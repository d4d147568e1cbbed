"""Blocks of bytes for next-byte prediction."""

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from merge_callback.demo.corpus import load_corpus


class ByteBlocks(Dataset[Tensor]):
    """Consecutive blocks of a text, each with one byte more than the context, as ``[context + 1]`` int64 tensors."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text = text
        self.context = context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.text[start : start + self.context + 1].long()


class TextDataModule(LightningDataModule):
    """A corpus in batches: shuffled blocks to train on, evenly spaced blocks of the kept-back documents to validate.

    Args:
        corpus: As `load_corpus` takes it.
        context: Bytes a block.
        batch_size: Blocks a batch.
        num_validation_blocks: How many blocks the validation takes.
    """

    def __init__(self, corpus: str, context: int, batch_size: int, num_validation_blocks: int) -> None:
        super().__init__()
        self.corpus = load_corpus(corpus)
        self.context = context
        self.batch_size = batch_size
        self.num_validation_blocks = num_validation_blocks

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            ByteBlocks(self.corpus.train, self.context), self.batch_size, shuffle=True, drop_last=True, num_workers=0
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        blocks = ByteBlocks(self.corpus.validation, self.context)
        stride = max(1, len(blocks) // self.num_validation_blocks)
        chosen = [blocks[index] for index in range(0, len(blocks), stride)][: self.num_validation_blocks]
        return DataLoader(chosen, self.batch_size, num_workers=0)  # type: ignore[arg-type]
