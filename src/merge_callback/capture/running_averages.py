"""Shadows: exponential averages of the weights over every optimizer step, which need no snapshots.

A shadow is moved towards the live weights by ``1 - beta`` at each update. Two profiles give ``beta`` over a gap of
``g`` steps that ends at step ``t``:

- *half-life* ``h``: ``beta = 0.5 ** (g / h)``, so that a weight vector counts half as much for every ``h`` steps of
  age, whatever the gap. As a share of training, ``h`` grows with the steps so far.
- *power function* (EDM2, arXiv 2312.02696, section 3): ``beta = (1 - g / t) ** (gamma + 1)``, which weights step ``s``
  in proportion to ``s ** gamma``. Its width ``sigma_rel`` is the profile's standard deviation as a share of training.
  From a few stored averages `synthesis_coefficients` makes one of any other width (section 3.2).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.storage import HostStorage, host_row
from merge_callback.live.sharding import local_clones
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


class RunningAverages:
    """The averages over every step that merges ask for, with the buffers that go with them.

    Args:
        averages: Name -> profile of every average.
        device: Where they are kept; None is where the model is. Elsewhere they are updated by a thread of their own.
    """

    def __init__(self, averages: Mapping[str, Average], device: torch.device | None) -> None:
        self.device = device
        self.layout: RowLayout | None = None
        # Floating-point buffers when the averages were last updated.
        self.buffers: dict[str, Tensor] = {}
        self._shadows = {name: Shadow(average) for name, average in averages.items()}
        self._beside: HostShadows | None = None

    def __len__(self) -> int:
        return len(self._shadows)

    @property
    def names(self) -> list[str]:
        """Names of the averages."""
        return list(self._shadows)

    def __getitem__(self, name: str) -> Shadow:
        """The average of that name, as of the latest step."""
        self.wait()
        return self._shadows[name]

    def fit_to(self, layout: RowLayout | None) -> None:
        """Prepares for live tensors of a layout; None frees what was prepared for others."""
        self.layout = layout
        # Otherwise both copies would take their memory at once.
        self._beside = None
        if layout is not None and self._shadows and self.device is not None:
            self._beside = HostShadows(self._shadows.values(), layout)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy that averages beside the training are moved towards."""
        return self._beside.size_bytes if self._beside is not None else 0

    def wait(self) -> None:
        """Returns when updates beside the training are done; raises what went wrong there."""
        if self._beside is not None:
            self._beside.wait()

    def finish(self) -> None:
        """Called before anything writes to the live tensors."""
        if self._beside is not None:
            self._beside.finish()

    def update(self, step: int, live: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Moves all averages towards the live weights.

        Args:
            step: Optimizer steps done.
            live: Name -> live tensor.
            buffers: Name -> live floating-point buffer.
        """
        if self._beside is not None:
            self._beside.update(step, live)
        else:
            for shadow in self._shadows.values():
                shadow.update(step, live)
        self.buffers = local_clones(buffers)

    def clear(self) -> None:
        """Begins all of them anew with the next update."""
        self.wait()
        for shadow in self._shadows.values():
            shadow.clear()

    def drop_nonfinite(self, gather: Callable[[Mapping[str, None]], Mapping[str, None]]) -> list[str]:
        """Begins averages anew that hold NaN or inf, which would stay for good; returns their names.

        Waits for the device. Whether weights are finite is not asked at every step: that would cost another pass over
        them.

        Args:
            gather: Gives the entries of all ranks. What one drops all have to drop, or they would validate other
                merges.
        """
        self.wait()
        bad = {name: None for name, shadow in self._shadows.items() if shadow.tensors and not shadow.is_finite}
        dropped = list(gather(bad))
        for name in dropped:
            self._shadows[name].clear()
        return dropped

    def row(self, name: str) -> list[Tensor]:
        """A copy of the average of that name, as a row of the layout."""
        assert self.layout is not None
        row = self.layout.new_row() if self.device is None else host_row(self.layout)
        return self[name].write_row_(row, self.layout)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Every tensor of every average, by reference: name of the average, name of the live tensor, tensor."""
        self.wait()
        for average, shadow in self._shadows.items():
            for name, tensor in shadow.tensors.items():
                yield average, name, tensor

    def state_dict(self) -> dict[str, Any]:
        """Everything but the averages' `tensors`."""
        self.wait()
        profiles = {name: {"profile": repr(s.average), "step": s.step} for name, s in self._shadows.items()}
        return {"profiles": profiles, "buffers": self.buffers}

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        read: Callable[[str], Mapping[str, Tensor]],
        buffers: Mapping[str, Tensor],
    ) -> list[str]:
        """Takes over the saved averages of the same name and profile.

        Args:
            state: As `state_dict` made it.
            read: Gives the tensors of the average of a name; only what can be taken over is asked for.
            buffers: Live floating-point buffers, on whose devices the saved ones are kept.

        Returns:
            What could not be taken over, in words.
        """
        lost = []
        for name, shadow in self._shadows.items():
            saved = state["profiles"].get(name)
            if saved is None or saved["profile"] != repr(shadow.average):
                lost.append(name)
            elif saved["step"] is not None:
                shadow.step, shadow.tensors = saved["step"], dict(read(name))
        if len(lost) < len(self._shadows):
            saved_buffers = state["buffers"].items()
            self.buffers = {name: buffer.to(buffers[name].device, copy=True) for name, buffer in saved_buffers}
        return [f"there is nothing of the average {name!r} to go on from: it starts anew" for name in lost]


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
