"""The layout of a flat row: where each tensor lies in it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tensors start at multiples of this many elements, so that kernels find them aligned as in the live model.
ALIGNMENT_NUMEL = 16


@dataclass(frozen=True)
class _Place:
    group: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class RowLayout:
    """Where each tensor lies in a flat row. A row is one flat tensor per dtype and device of the live tensors.

    Args:
        tensors: Name -> live tensor; only shapes, strides, dtypes and devices are read.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.groups: list[tuple[torch.dtype, torch.device]] = []
        self.num_elements: list[int] = []
        self.places: dict[str, _Place] = {}
        for name, tensor in tensors.items():
            key = (tensor.dtype, tensor.device)
            if key not in self.groups:
                self.groups.append(key)
                self.num_elements.append(0)
            group = self.groups.index(key)
            # Rows keep a tensor's memory order (channels last, transposed), so copying stays one linear pass.
            stride = torch.empty_like(tensor, device="meta").stride()
            self.places[name] = _Place(group, self.num_elements[group], tensor.shape, stride)
            self.num_elements[group] += _padded(tensor.numel())

    def views(self, row: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns the tensors inside a row by name: views with the shapes and strides of the live tensors."""
        return {
            name: row[place.group].as_strided(
                place.shape, place.stride, row[place.group].storage_offset() + place.offset
            )
            for name, place in self.places.items()
        }

    def runs(self, labels: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
        """Returns the stretches of a row whose tensors share a label, as (group, start, stop, label).

        A tensor without a label has label 1. Padding belongs to the tensor before it.
        """
        found: list[tuple[int, int, int, int]] = []
        for group in range(len(self.groups)):
            for name, place in self.places.items():
                if place.group != group:
                    continue
                label = labels.get(name, 1)
                stop = place.offset + _padded(place.shape.numel())
                if found and (found[-1][0], found[-1][3]) == (group, label):
                    found[-1] = (*found[-1][:2], stop, label)
                else:
                    found.append((group, place.offset, stop, label))
        return found

    def new_row(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None, *, pin_memory: bool = False
    ) -> list[Tensor]:
        """Allocates an uninitialised row. A device or dtype of None keeps that of each live tensor."""
        return [
            torch.empty(numel, dtype=dtype or own_dtype, device=device or own_device, pin_memory=pin_memory)
            for (own_dtype, own_device), numel in zip(self.groups, self.num_elements, strict=True)
        ]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Returns whether tensors have the names, shapes, dtypes and devices that this layout was made for."""
        return self.places.keys() == tensors.keys() and all(
            place.shape == tensors[name].shape
            and self.groups[place.group] == (tensors[name].dtype, tensors[name].device)
            for name, place in self.places.items()
        )


def _padded(numel: int) -> int:
    return math.ceil(numel / ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL
