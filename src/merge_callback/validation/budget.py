"""Limits the wall time that a callback takes to a share of the run's. Pure Python on seconds."""

from dataclasses import dataclass


@dataclass
class Budget:
    """Spaces out a costly task so that all time spent stays under a share of the run's time so far.

    The task may always run the first time, since its cost is not known yet. After that it waits until it fits.

    Args:
        share: Largest share of the time, in (0, 1); None sets no limit.
        elapsed: Seconds of the run before the current fit.
        spent: Seconds spent so far.
        latest: Seconds that the task took the last time.
        num_skipped: Number of times that the task did not fit.
        validating: Of the seconds spent, those that validations took; the others captured and merged weights.

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
    validating: float = 0.0

    def allows(self, elapsed: float) -> bool:
        """Returns whether the task fits now, if it takes as long as the last time.

        Args:
            elapsed: Seconds of the run so far.
        """
        if self.share is None or self.latest == 0:
            return True
        return self.spent + self.latest <= self.share * elapsed

    def summary(self) -> str:
        """Returns what was spent and on what, in words for the user.

        Examples:
            >>> print(Budget(share=None, elapsed=100.0, spent=12.0, validating=9.0).summary())
            merges took 12.0 s, 12.0% of the run
            (9.0% validating them, 3.0% capturing, merging, drawing)
        """
        all_, validating = (seconds / self.elapsed for seconds in (self.spent, self.validating))
        parts = f"{validating:.1%} validating them, {all_ - validating:.1%} capturing, merging, drawing"
        return f"merges took {self.spent:.1f} s, {all_:.1%} of the run\n({parts})"

    def spend(self, seconds: float, *, is_costly: bool = False) -> None:
        """Records seconds that were spent; ``is_costly`` marks those of the task that is spaced out."""
        self.spent += seconds
        if is_costly:
            self.latest = seconds
