"""Does the training loss run away? A robust deviation from what it was of late. Pure, on floats."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

# Standard deviations in a median absolute deviation of a normal distribution.
_MAD_TO_DEVIATION = 1.4826
# The median of fewer losses than that is noise itself.
_MIN_RECENT = 25


@dataclass
class SpikeDetector:
    """Finds the step at which the loss began to run away.

    The mean of the latest ``patience`` losses is compared with the median of the ``window`` losses before them, or of
    the last quarter of those (25 at least) where that is lower, as it is while the loss falls. A falling loss lies
    below both, so it does not look like a spike. A deviation is that of the noise between one step and the next, taken
    from the median of absolute differences, so that neither outliers nor a falling loss widen it. A loss that is NaN or
    infinite is a spike at once.

    Args:
        threshold: How many deviations above the median are a spike.
        patience: Over how many steps; one bad batch alone is none.
        window: How many losses before them are compared with. No verdict until half of it is there; of a dozen losses
            and fewer the noise is not known well, and a false alarm is likely.

    Raises:
        ValueError: If one of them makes no sense.

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
        """Takes note of the loss of a step; returns the step at which a spike began, if there is one now."""
        if not math.isfinite(loss):
            return step
        self._steps.append(step)
        self._losses.append(loss)
        losses = list(self._losses)
        before, latest = losses[: -self.patience], losses[-self.patience :]
        if len(before) < self.window // 2:
            return None
        # With the whole window alone, a rise that comes while the loss falls is found late.
        recent = before[-max(self.window // 4, _MIN_RECENT) :]
        level, deviation = min(median(before), median(recent)), noise(before)
        if sum(latest) / self.patience - level <= self.threshold * deviation:
            return None
        # Where the losses that end here left the noise.
        begin = len(losses) - 1
        while begin > 0 and losses[begin - 1] - level > deviation:
            begin -= 1
        return self._steps[begin]

    def clear(self) -> None:
        """Forgets all losses; for a model that has others from here on."""
        self._steps.clear()
        self._losses.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """Losses that the next verdict depends on."""
        return {"steps": list(self._steps), "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Takes over what `state_dict` gave."""
        self.clear()
        self._steps.extend(map(int, state["steps"]))
        self._losses.extend(state["losses"])


def noise(losses: Sequence[float]) -> float:
    """Standard deviation of the noise between one loss and the next, whatever the trend."""
    differences = [newer - older for older, newer in pairwise(losses)]
    middle = median(differences)
    return _MAD_TO_DEVIATION * median(abs(each - middle) for each in differences) / math.sqrt(2)
