"""Shadows: exponential averages of the weights over every optimizer step, which need no snapshots.

A shadow is moved towards the live weights by ``1 - beta`` at each update. Two profiles give ``beta`` over a gap of
``g`` steps that ends at step ``t``:

- *half-life* ``h``: ``beta = 0.5 ** (g / h)``, so that a weight vector counts half as much for every ``h`` steps of
  age, whatever the gap. As a share of training, ``h`` grows with the steps so far.
- *power function* (EDM2, arXiv 2312.02696, section 3): ``beta = (1 - g / t) ** (gamma + 1)``, which weights step ``s``
  in proportion to ``s ** gamma``. Its width ``sigma_rel`` is the profile's standard deviation as a share of training.
  From a few stored averages `synthesis_coefficients` makes one of any other width (section 3.2).
"""

from collections.abc import Iterable, Mapping
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.storage import HostStorage
from merge_callback.live.weights import nonfinite_names
from merge_callback.merging.averages import Average
from merge_callback.merging.combine import ScratchBuffer, flat_chunks
from merge_callback.utilities.background import Background


class Shadow:
    """One average of the weights, kept beside the live model.

    Weights of less than 32 bits are averaged in float32: an increment below half a unit in their last place would be
    lost.

    Args:
        average: Its profile.
    """

    def __init__(self, average: Average) -> None:
        self.average = average
        self.step: int | None = None
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, live: Mapping[str, Tensor]) -> None:
        """Moves towards the live weights; begins with them. One pass, and nothing waits for the device.

        Args:
            step: Optimizer steps done.
            live: Name -> live tensor, always the same ones.
        """
        if self.step is None or self.tensors.keys() != live.keys():
            self.tensors = {name: shadow_like(tensor).copy_(tensor) for name, tensor in live.items()}
        elif step > self.step:
            self._move(live, 1 - self.average.beta(step, step - self.step))
        self.step = step

    def _move(self, live: Mapping[str, Tensor], share: float) -> None:
        pairs = [(shadow, live[name]) for name, shadow in self.tensors.items()]
        alike = [shadow.dtype == now.dtype for shadow, now in pairs]
        # Tensors of the shadow's own dtype, nearly all of them, are read where they are.
        if same := list(compress(pairs, alike)):
            torch._foreach_lerp_([shadow for shadow, _ in same], [now for _, now in same], share)
        scratches: dict[tuple[torch.dtype, torch.device], ScratchBuffer] = {}
        for shadow, now in compress(pairs, map(not_, alike)):
            scratch = scratches.setdefault((shadow.dtype, shadow.device), ScratchBuffer(shadow.dtype))
            for moved, part in flat_chunks(shadow, now):
                moved.lerp_(scratch.like(part).copy_(part), share)

    def write_row_(self, out: list[Tensor], layout: RowLayout) -> list[Tensor]:
        """Writes the average, in the live tensors' dtypes, into a row of the layout; returns the row."""
        for name, view in layout.views(out).items():
            view.copy_(self.tensors[name])
        return out

    @property
    def is_finite(self) -> bool:
        """Whether it holds neither NaN nor inf; waits for the device."""
        return not nonfinite_names(self.tensors)

    def clear(self) -> None:
        """Begins anew with the next update."""
        self.step, self.tensors = None, {}

    def state_dict(self) -> dict[str, Any]:
        return {"average": repr(self.average), "step": self.step, "tensors": self.tensors}

    def load_state_dict(
        self, state: Mapping[str, Any], live: Mapping[str, Tensor], device: torch.device | None = None
    ) -> bool:
        """Takes over a saved average of the same profile if it fits the live tensors; returns whether it did.

        Args:
            state: What was saved.
            live: Name -> live tensor.
            device: Where the average is kept; None is where the live tensors are.
        """
        saved: Mapping[str, Tensor] = state["tensors"]
        if state["average"] != repr(self.average):
            return False
        if state["step"] is None:
            return True
        if saved.keys() != live.keys() or any(saved[name].shape != live[name].shape for name in saved):
            return False
        self.step = state["step"]
        self.tensors = {name: tensor.to(device or live[name].device, copy=True) for name, tensor in saved.items()}
        return True


class HostShadows:
    """Shadows in host memory, updated by a thread of their own beside the training.

    An update copies the live weights (on a stream of its own where they are on a GPU), and the averages are moved
    towards the copy while the training goes on. The next update waits for it, and so does whoever asks for an average.

    Args:
        shadows: What is updated.
        layout: Of the live tensors.
    """

    def __init__(self, shadows: Iterable[Shadow], layout: RowLayout) -> None:
        self._shadows = list(shadows)
        self._copy = HostStorage(layout, capacity=1)
        self._background = Background("shadows")

    @property
    def size_bytes(self) -> int:
        """Bytes of the copy."""
        return self._copy.size_bytes

    def update(self, step: int, live: Mapping[str, Tensor]) -> None:
        """`Shadow.update` of each, which is under way when this returns; until `finish` the live tensors are read."""
        self.wait()
        self._copy.write(0, step, live)
        self._background.begin(self._move, step)

    def finish(self) -> None:
        """Called before anything writes to the live tensors."""
        self._copy.finish()

    def wait(self) -> None:
        """Returns when the averages are up to date; raises what their update raised."""
        self._background.wait()

    def _move(self, step: int) -> None:
        copied = self._copy.tensors(0)
        for shadow in self._shadows:
            shadow.update(step, copied)


def shadow_bytes(layout: RowLayout, device: torch.device | None = None) -> dict[torch.device, int]:
    """Bytes that a shadow of the live tensors of a layout takes by device; all on one device if that is given."""
    required: dict[torch.device, int] = {}
    for (dtype, own_device), numel in zip(layout.groups, layout.num_elements, strict=True):
        place = device or own_device
        required[place] = required.get(place, 0) + numel * _wide(dtype).itemsize
    return required


def shadow_like(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """An uninitialised tensor as a shadow of this one has it, on a device or on its own."""
    return torch.empty_like(tensor, dtype=_wide(tensor.dtype), device=device, requires_grad=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
