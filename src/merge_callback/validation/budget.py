"""How much wall time a callback may take, as a share of the run's. Pure, on seconds."""

from dataclasses import dataclass


@dataclass
class Budget:
    """Spaces out something costly so that all that was spent stays under a share of the time so far.

    The first time is free, since nobody knows yet what it costs; later ones wait until they fit.

    Args:
        share: Largest share of the time, in (0, 1); None allows everything.
        elapsed: Seconds of the run before the fit that goes on.
        spent: Seconds spent so far.
        latest: What it cost the last time.
        num_skipped: How many times it did not fit.

    Examples:
        >>> budget = Budget(share=0.02)
        >>> budget.allows(elapsed=10.0)
        True
        >>> budget.spend(1.0, is_costly=True)
        >>> budget.allows(elapsed=90.0), budget.allows(elapsed=100.0)
        (False, True)
    """

    share: float | None
    elapsed: float = 0.0
    spent: float = 0.0
    latest: float = 0.0
    num_skipped: int = 0

    def allows(self, elapsed: float) -> bool:
        """Whether as much as the last time fits now.

        Args:
            elapsed: Seconds of the run so far.
        """
        if self.share is None or self.latest == 0:
            return True
        return self.spent + self.latest <= self.share * elapsed

    def spend(self, seconds: float, *, is_costly: bool = False) -> None:
        """Takes note of seconds that were spent; the costly ones are what is spaced out."""
        self.spent += seconds
        if is_costly:
            self.latest = seconds
