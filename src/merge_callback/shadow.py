"""Shadows: exponential averages of the weights over every optimizer step, which need no snapshots.

A shadow is moved towards the live weights by ``1 - beta`` at each update. Two profiles give ``beta`` over a gap of
``g`` steps that ends at step ``t``:

- *half-life* ``h``: ``beta = 0.5 ** (g / h)``, so that a weight vector counts half as much for every ``h`` steps of
  age, whatever the gap. As a share of training, ``h`` grows with the steps so far.
- *power function* (EDM2, arXiv 2312.02696, section 3): ``beta = (1 - g / t) ** (gamma + 1)``, which weights step ``s``
  in proportion to ``s ** gamma``. Its width ``sigma_rel`` is the profile's standard deviation as a share of training.
  From a few stored averages `synthesis_coefficients` makes one of any other width (section 3.2).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from operator import not_
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeIs

from merge_callback.background import Background
from merge_callback.combine import Room, parts
from merge_callback.rules import check_exactly_one, check_numbers, in_steps
from merge_callback.snapshots import RowLayout
from merge_callback.storage import HostStorage
from merge_callback.weights import nonfinite_names


class Average(Protocol):
    """What tells a shadow how much of it stays at an update."""

    def beta(self, step: int, gap: int) -> float:
        """Share that stays, over ``gap`` optimizer steps that end at ``step``."""

    def span_steps(self, step: int) -> float:
        """Length of the linear decay whose merge is as old on average."""


@dataclass(frozen=True)
class Ema:
    """An exponential average of the weights with a given half-life, updated at every optimizer step.

    Unlike the rule ``"ema"``, which averages snapshots, it costs one more copy of the weights and no snapshots.

    Args:
        half_life_steps: Optimizer steps after which a weight vector counts half as much.
        half_life: The same as a share of the steps trained so far, in (0, 1]. Give exactly one of the two.

    Raises:
        ValueError: If neither or both are given, or one is out of its range.

    Examples:
        >>> Ema(half_life_steps=100).beta(step=1000, gap=100)
        0.5
        >>> Ema(half_life=0.1).beta(step=1000, gap=100)
        0.5
    """

    half_life_steps: float | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        check_exactly_one("Ema", half_life_steps=self.half_life_steps, half_life=self.half_life)
        check_numbers(half_life_steps=self.half_life_steps, half_life=self.half_life)
        if self.half_life_steps is not None and not 0 < self.half_life_steps < math.inf:
            raise ValueError(f"half_life_steps must be > 0 and finite, got {self.half_life_steps}")
        if self.half_life is not None and not 0 < self.half_life <= 1:
            raise ValueError(f"half_life must be a share of training in (0, 1], got {self.half_life}")

    def beta(self, step: int, gap: int) -> float:
        """Share that stays, over ``gap`` optimizer steps that end at ``step``."""
        return 0.5 ** (gap / in_steps(self.half_life_steps, self.half_life, step))

    def span_steps(self, step: int) -> float:
        """Length of the linear decay whose merge is as old on average: twice the mean age."""
        if self.half_life is not None:
            # beta is (1 - gap / step) ** (ln 2 / half_life) to first order, a power function.
            return 2 * step / (math.log(2) / self.half_life + 1)
        return 2 * in_steps(self.half_life_steps, self.half_life, step) / math.log(2)


@dataclass(frozen=True)
class PowerEma:
    """The power-function average of EDM2 (arXiv 2312.02696), updated at every optimizer step.

    Args:
        sigma_rel: Width of the profile as a share of training, in (0, 0.28).

    Raises:
        ValueError: If the width is out of its range.

    Examples:
        >>> round(PowerEma(sigma_rel=0.05).gamma, 2), round(PowerEma(sigma_rel=0.10).gamma, 2)
        (16.97, 6.94)
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        check_numbers(sigma_rel=self.sigma_rel)
        # At gamma = 0 the profile is flat, and its width sqrt(1/12).
        if not 0 < self.sigma_rel < math.sqrt(1 / 12):
            raise ValueError(f"sigma_rel must lie in (0, {math.sqrt(1 / 12):.4f}), got {self.sigma_rel}")

    @cached_property
    def gamma(self) -> float:
        """Exponent of the profile: the largest real root that gives it its width (algorithm 2)."""
        inverse = self.sigma_rel**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def beta(self, step: int, gap: int) -> float:
        """Share that stays, over ``gap`` optimizer steps that end at ``step``."""
        return (1 - gap / step) ** (self.gamma + 1)

    def span_steps(self, step: int) -> float:
        """Length of the linear decay whose merge is as old on average: twice the mean age."""
        return 2 * step / (self.gamma + 2)


def synthesis_coefficients(stored: Sequence[tuple[int, PowerEma]], step: int, average: PowerEma) -> list[float]:
    """How to combine stored power-function averages into one of another width: least squares over their profiles.

    Args:
        stored: Step and profile of every average at hand, all begun at step zero.
        step: The step at which the wanted average ends.
        average: Its profile.

    Returns:
        One coefficient for each stored average, summing to one.

    Raises:
        ValueError: If nothing is stored.

    Examples:
        >>> stored = [(step, PowerEma(width)) for step in (500, 1000) for width in (0.05, 0.1)]
        >>> [abs(round(c, 6)) for c in synthesis_coefficients(stored, 1000, PowerEma(0.1))]
        [0.0, 0.0, 0.0, 1.0]
    """
    if not stored:
        raise ValueError("no stored averages to combine")
    steps = np.array([at for at, _ in stored], dtype=float)
    gammas = np.array([profile.gamma for _, profile in stored])
    grams = _profile_product(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _profile_product(steps, gammas, np.array(float(step)), np.array(average.gamma))
    # Many profiles are nearly alike: the smallest coefficients among the best fits.
    coefficients = np.linalg.lstsq(grams, wanted, rcond=1e-12)[0]
    return [float(c) for c in coefficients / coefficients.sum()]


def _profile_product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Any:
    """Integral of the product of two profiles ``(gamma + 1) s^gamma / t^(gamma + 1)`` on ``[0, t]`` (appendix C)."""
    shorter = np.minimum(t_a, t_b)
    both = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return both * (shorter / t_a) ** gamma_a * (shorter / t_b) ** gamma_b * shorter / (t_a * t_b)


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
        rooms: dict[tuple[torch.dtype, torch.device], Room] = {}
        for shadow, now in compress(pairs, map(not_, alike)):
            room = rooms.setdefault((shadow.dtype, shadow.device), Room(shadow.dtype))
            for moved, part in parts(shadow, now):
                moved.lerp_(room.like(part).copy_(part), share)

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


def is_average(merge: Any) -> TypeIs[Average]:
    """Whether a merge is kept as a shadow rather than made of snapshots."""
    return callable(getattr(merge, "beta", None))
