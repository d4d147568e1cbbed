"""Noisy points on a line."""

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class LineDataModule(LightningDataModule):
    def __init__(self, batch_size: int = 4, num_points: int = 128) -> None:
        super().__init__()
        self.batch_size = batch_size
        x = torch.randn(num_points, 1, generator=torch.Generator().manual_seed(0))
        y = 2 * x + 1 + torch.randn(num_points, 1, generator=torch.Generator().manual_seed(1))
        self.points = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, self.batch_size)
