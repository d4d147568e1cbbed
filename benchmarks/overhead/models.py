"""Modules that hold tensors of given shapes and train at no cost."""

import torch
from lightning.pytorch import LightningModule
from protocol import Shapes
from torch import Tensor, nn
from torch.utils.data import DataLoader


class _Layer(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        # Written to, since untouched zeros would all be one page of memory.
        self.weight = nn.Parameter(torch.empty(shape).fill_(0.25))


class Weights(LightningModule):
    """Tensors of the given shapes, each in a module of its own, and one number that is trained.

    Args:
        shapes: Of the tensors.
        device: Where they are.
    """

    def __init__(self, shapes: Shapes, device: str = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(_Layer, shapes))
        self.trained = nn.Parameter(torch.zeros(()))
        self.to(device)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.trained - batch).square()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(1000), batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.trained], lr=0.01)

    @property
    def live(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @property
    def description(self) -> dict[str, int]:
        """For records: how many tensors and parameters."""
        numels = [tensor.numel() for tensor in self.live.values()]
        return {"num_tensors": len(numels), "num_parameters": sum(numels)}


def touched_like(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Tensors of the same shapes, in memory already."""
    return [torch.empty_like(tensor).fill_(0.5) for tensor in tensors.values()]
