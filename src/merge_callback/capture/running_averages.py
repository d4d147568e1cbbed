"""Shadows: running averages of the weights over every optimizer step, which need no snapshots.

Each update moves a shadow towards the live weights by ``1 - beta``. Two profiles define ``beta`` for a gap of ``g``
steps that ends at step ``t``:

- *half-life* ``h``: ``beta = 0.5 ** (g / h)``, so that a weight vector counts half as much for every ``h`` steps of
  age, whatever the gap. If ``h`` is given as a share of training, it grows with the steps so far.
- *power function* (EDM2, arXiv 2312.02696, section 3): ``beta = (1 - g / t) ** (gamma + 1)``, which weights step ``s``
  in proportion to ``s ** gamma``. Its width ``sigma_rel`` is the profile's standard deviation as a share of training.
  `synthesis_coefficients` combines a few stored averages into one of any other width (section 3.2).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from merge_callback.capture.layout import RowLayout
from merge_callback.capture.moving import DirectUpdates, HostUpdates, move_, shadow_like
from merge_callback.capture.storage import host_row
from merge_callback.live.sharding import local_clones
from merge_callback.live.weights import nonfinite_names
from merge_callback.merging.averages import Average

# Smallest share of an average that an update replaces. float32 keeps what is added then to a ten-thousandth of the
# distance, where weights move by a thousandth; of a share ten times smaller it would lose some per cent.
MIN_SHARE = 1e-4


class Shadow:
    """One running average of the weights, kept beside the live model.

    Weights of less than 32 bits are averaged in float32. In their own dtype, an increment below half a unit in the last
    place would be lost.

    Args:
        average: The profile of the average.
    """

    def __init__(self, average: Average) -> None:
        self.average = average
        self.step: int | None = None
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, live: Mapping[str, Tensor]) -> None:
        """Moves the average towards the live weights, in one pass and without waiting for the device.

        Args:
            step: Optimizer steps done.
            live: Name -> live tensor. At the first update, or if the names change, the average starts as their copy.
        """
        if self.step is None or self.tensors.keys() != live.keys():
            self.tensors = {name: shadow_like(tensor).copy_(tensor) for name, tensor in live.items()}
        elif not self.is_due(step, live):
            return
        elif step > self.step:
            share = 1 - self.average.beta(step, step - self.step)
            # Meanwhile an average of no step: one that an interrupt leaves half moved restarts.
            self.step = None
            move_(self.tensors, live, share)
        self.step = step

    def is_due(self, step: int, live: Mapping[str, Tensor]) -> bool:
        """Whether the live weights of this step move the average by more than rounding would take from it.

        Late in a long run the share of a step is so small that float32 would lose a part of what it adds. Several steps
        then count as one.
        """
        if self.step is None or step <= self.step:
            return True
        return 1 - self.average.beta(step, step - self.step) >= MIN_SHARE or self.tensors.keys() != live.keys()

    def write_row_(self, out: list[Tensor], layout: RowLayout) -> list[Tensor]:
        """Writes the average into a row of the layout, in the row's dtypes, and returns the row."""
        for name, view in layout.views(out).items():
            view.copy_(self.tensors[name])
        return out

    @property
    def is_finite(self) -> bool:
        """Whether the average holds neither NaN nor inf; waits for the device."""
        return not nonfinite_names(self.tensors)

    def clear(self) -> None:
        """Resets the average: it restarts at the next update."""
        self.step, self.tensors = None, {}


class RunningAverages:
    """All averages over every step that the merges use, with the buffers that belong to them.

    Args:
        averages: Name -> profile of each average.
        device: Where the averages are kept; None is the model's device. Elsewhere a background thread updates them.
    """

    def __init__(self, averages: Mapping[str, Average], device: torch.device | None) -> None:
        self.device = device
        self.layout: RowLayout | None = None
        # Floating-point buffers at the latest update of the averages.
        self.buffers: dict[str, Tensor] = {}
        self._shadows = {name: Shadow(average) for name, average in averages.items()}
        self._updates: DirectUpdates | HostUpdates = DirectUpdates(self._update)

    def __len__(self) -> int:
        return len(self._shadows)

    @property
    def names(self) -> list[str]:
        """Names of the averages."""
        return list(self._shadows)

    def __getitem__(self, name: str) -> Shadow:
        """Returns the average with this name, up to date with the latest step."""
        self.wait()
        return self._shadows[name]

    def fit_to(self, layout: RowLayout | None) -> None:
        """Prepares for live tensors of this layout; None frees the memory that an earlier layout took."""
        self.layout = layout
        # Free the old copy first, so that both never take memory at once.
        self._updates = DirectUpdates(self._update)
        if layout is not None and self._shadows and self.device is not None:
            self._updates = HostUpdates(self._update, layout)

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy of the live weights that a background update reads; zero without such updates."""
        return self._updates.size_bytes

    def wait(self) -> None:
        """Waits until background updates are done; raises the error of one that failed."""
        self._updates.wait()

    def finish(self) -> None:
        """Makes it safe to write to the live tensors; call it before any write."""
        self._updates.finish()

    def update(self, step: int, live: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Moves all averages towards the live weights.

        Args:
            step: Optimizer steps done.
            live: Name -> live tensor.
            buffers: Name -> live floating-point buffer.
        """
        self.wait()
        if any(shadow.is_due(step, live) for shadow in self._shadows.values()):
            self._updates.begin(live, step)
            self.buffers = local_clones(buffers)

    def _update(self, live: Mapping[str, Tensor], step: int) -> None:
        for shadow in self._shadows.values():
            shadow.update(step, live)

    def clear(self) -> None:
        """Resets all averages: they restart at the next update."""
        self.wait()
        for shadow in self._shadows.values():
            shadow.clear()

    def drop_nonfinite(self, gather: Callable[[Mapping[str, None]], Mapping[str, None]]) -> list[str]:
        """Resets averages that hold NaN or inf, which would never disappear, and returns their names.

        Waits for the device. `update` does not look for NaN, since that would cost another pass over the weights.

        Args:
            gather: Returns the entries of all ranks. All ranks must drop the same averages, or they would validate
                different merges.
        """
        self.wait()
        bad = {name: None for name, shadow in self._shadows.items() if shadow.tensors and not shadow.is_finite}
        dropped = list(gather(bad))
        for name in dropped:
            self._shadows[name].clear()
        return dropped

    def row(self, name: str) -> list[Tensor]:
        """Returns a copy of the average with this name, as a row of the layout."""
        assert self.layout is not None
        row = self.layout.new_row() if self.device is None else host_row(self.layout)
        return self[name].write_row_(row, self.layout)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yields every tensor of every average by reference: (name of the average, name of the live tensor, tensor)."""
        self.wait()
        for average, shadow in self._shadows.items():
            for name, tensor in shadow.tensors.items():
                yield average, name, tensor

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the averages, except their `tensors`."""
        self.wait()
        profiles = {name: {"profile": repr(s.average), "step": s.step} for name, s in self._shadows.items()}
        return {"profiles": profiles, "buffers": self.buffers}

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        read: Callable[[str], Mapping[str, Tensor]],
        buffers: Mapping[str, Tensor],
    ) -> list[str]:
        """Restores the saved averages that have the same name and profile.

        Args:
            state: The state that `state_dict` returned.
            read: Returns the saved tensors of the average with a given name; called only for averages to restore.
            buffers: Live floating-point buffers; the saved ones are moved to their devices.

        Returns:
            A clause for the user about each average that could not be restored, or is not needed.
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
        unused = [name for name in state["profiles"] if name not in self._shadows]
        return [
            *(f"the checkpoint holds no average {name!r} with this profile: it restarts" for name in lost),
            *(f"the average {name!r} of the checkpoint is left out: no merge needs it" for name in unused),
        ]
