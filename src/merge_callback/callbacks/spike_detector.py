"""Detects spikes of the training loss by a robust deviation from recent losses. Pure Python on floats."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

# The standard deviation of a normal distribution, divided by its median absolute deviation.
_MAD_TO_DEVIATION = 1.4826
# The median of fewer losses is too noisy.
_MIN_RECENT = 25


@dataclass
class SpikeDetector:
    """Finds the step at which a spike of the loss began.

    The mean of the latest ``patience`` losses is compared with the median of the ``window`` losses before them. If the
    median of the last quarter of those (at least 25) is lower, as it is while the loss falls, it is used instead. A
    falling loss lies below both medians, so it is no spike. The deviation is that of the noise between one step and the
    next. It comes from the median of absolute differences, so neither outliers nor a falling loss increase it. A loss
    that is NaN or infinite is a spike at once.

    Args:
        threshold: Number of deviations above the median that make a spike.
        patience: Number of latest losses whose mean is compared, so that one bad batch alone is no spike.
        window: Number of earlier losses to compare with. There is no verdict until half of them are there. With a dozen
            losses or fewer the noise is poorly known, and a false alarm is likely.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> detector = SpikeDetector(patience=2, window=24)
        >>> noise = [0.1, -0.1, 0.2, 0.0, -0.2, 0.1, 0.0, -0.1] * 4
        >>> [detector.update(step, 2 + each) for step, each in enumerate(noise)] == [None] * 32
        True
        >>> detector.update(32, 2.5), detector.update(33, 2.6)
        (None, 32)
    """

    threshold: float = 3.0
    patience: int = 4
    window: int = 100
    _steps: deque[int] = field(default_factory=deque, repr=False)
    _losses: deque[float] = field(default_factory=deque, repr=False)

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above zero, got {self.threshold}")
        if self.patience < 1:
            raise ValueError(f"patience must be >= 1, got {self.patience}")
        if self.window < 4:
            raise ValueError(f"window must be >= 4, got {self.window}")
        self._steps = deque(self._steps, self.window + self.patience)
        self._losses = deque(self._losses, self.window + self.patience)

    def update(self, step: int, loss: float) -> int | None:
        """Records the loss of a step; returns the step at which a spike began, or None if there is no spike now."""
        if not math.isfinite(loss):
            return step
        self._steps.append(step)
        self._losses.append(loss)
        losses = list(self._losses)
        before, latest = losses[: -self.patience], losses[-self.patience :]
        if len(before) < self.window // 2:
            return None
        # The whole window alone would find a rise late if it comes while the loss falls.
        recent = before[-max(self.window // 4, _MIN_RECENT) :]
        level, deviation = min(median(before), median(recent)), noise(before)
        if sum(latest) / self.patience - level <= self.threshold * deviation:
            return None
        # Goes back to the first of the latest losses that lie above the noise.
        begin = len(losses) - 1
        while begin > 0 and losses[begin - 1] - level > deviation:
            begin -= 1
        return self._steps[begin]

    def clear(self) -> None:
        """Forgets all losses, for when the model was changed and its losses with it."""
        self._steps.clear()
        self._losses.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the losses that the next verdict depends on, with their steps."""
        return {"steps": list(self._steps), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restores what `state_dict` returned."""
        self.clear()
        self._steps.extend(map(int, state["steps"]))
        self._losses.extend(state["losses"])


def noise(losses: Sequence[float]) -> float:
    """Returns the standard deviation of the noise between one loss and the next, whatever the trend."""
    differences = [newer - older for older, newer in pairwise(losses)]
    middle = median(differences)
    return _MAD_TO_DEVIATION * median(abs(each - middle) for each in differences) / math.sqrt(2)
