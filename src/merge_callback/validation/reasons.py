"""Why a merge may be worse than the live model, by what is known of the run."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_callback.capture.merge_set import MergeSet
from merge_callback.prediction.validations import StableValidation, validation_at
from merge_callback.utilities.tables import WIDTH
from merge_callback.validation.evaluation import Evaluation

# Of a shorter window, and in an earlier part of the run, a merge is rarely better.
YOUNG_SHARE = 0.02
EARLY_SHARE = 0.1


@dataclass(frozen=True)
class Circumstances:
    """What is known of a run at a validation of its merges.

    Args:
        step: Optimizer steps so far.
        num_steps: Planned steps of the run; None if unknown.
        num_snapshots: Snapshots in the ring; None if the primary merge is an average over every step.
        capacity: Most snapshots that the ring holds.
        is_growing: Whether the ring has not been full yet, at this learning rate.
        span_steps: Optimizer steps that the primary merge covers.
        is_rate_constant: Whether the learning rate was constant in the window.
        has_stale_statistics: Whether the merge has batch norm statistics of the newest snapshot.
        history: Validations at constant rates, ascending; the newest one is the present one.
    """

    step: int
    num_steps: int | None
    num_snapshots: int | None
    capacity: int
    is_growing: bool
    span_steps: float
    is_rate_constant: bool
    has_stale_statistics: bool
    history: Sequence[StableValidation] = ()

    def explain(self, worse: Mapping[str, float]) -> list[str]:
        """Returns lines for the user on why the primary merge may be worse than the live model.

        Args:
            worse: Metric -> negative gain.
        """
        found = [self._window(), self._early(), self._falling(worse), self._moving(), self._statistics()]
        reasons = [reason for reason in found if reason]
        if not reasons:
            reasons = ["chance: none of the usual reasons is seen, so compare merge_gain at more validations"]
        metrics = f"{len(worse)} metrics" if len(worse) > 3 else ", ".join(worse)
        return [
            f"{metrics} {'are' if len(worse) > 1 else 'is'} worse merged than live. What may be the reason:",
            *(textwrap.fill(f"- {reason}", WIDTH, subsequent_indent="  ") for reason in reasons),
        ]

    def _window(self) -> str:
        if self.num_snapshots is not None and self.is_growing:
            return f"the window is young: {self.num_snapshots} of {self.capacity} snapshots"
        if self.span_steps < YOUNG_SHARE * self.step:
            share = self.span_steps / self.step
            return f"the window is short: {self.span_steps:.0f} steps, {share:.1%} of the training so far"
        return ""

    def _early(self) -> str:
        if self.num_steps is not None and self.step < EARLY_SHARE * self.num_steps:
            return f"it is early: step {self.step} of {self.num_steps}, where losses fall fast and merges lag behind"
        return ""

    def _falling(self, worse: Mapping[str, float]) -> str:
        if not self.history or self.history[-1].step != self.step:
            return ""
        now = self.history[-1]
        age = round(now.composition.age if now.composition is not None else self.span_steps / 2)
        earlier = validation_at(self.history, self.step - age, max_gap_steps=4 * age)
        if earlier is None or earlier.phase != now.phase:
            return ""
        for metric, gain in worse.items():
            if metric in now.live and metric in earlier.live:
                moved = abs(now.live[metric] - earlier.live[metric])
                if moved > -gain / 2:
                    shorter = "an average" if self.num_snapshots is None else "Window(span=...)"
                    return (
                        f"{metric} moved by {moved:.2g} in {age} steps, the mean age of what is merged, which is"
                        f" more than averaging gains; {shorter} over fewer steps lags less"
                    )
        return ""

    def _moving(self) -> str:
        if self.is_rate_constant:
            return ""
        return "the learning rate moved while the snapshots were taken, which anneals the live model, too"

    def _statistics(self) -> str:
        if not self.has_stale_statistics:
            return ""
        return "batch norm statistics do not fit averaged weights; recalibrate_batches=10 calculates them"


def circumstances(
    evaluation: Evaluation,
    merges: MergeSet,
    num_steps: int | None,
    history: Sequence[StableValidation],
    *,
    has_batch_norms: bool,
) -> Circumstances | None:
    """Returns what is known of a run at a validation; None if the primary merge was not validated.

    Args:
        evaluation: The validation of the merges.
        merges: The merges of the run.
        num_steps: Planned steps of the run; None if unknown.
        history: Validations at constant rates, ascending.
        has_batch_norms: Whether the module has batch norm layers.
    """
    if (primary := evaluation.merges.get(merges.primary)) is None:
        return None
    span_steps, ring, window = evaluation.diagnostics["span_steps"], merges.capture.ring, merges.capture.window
    is_held = window.phase.is_stable and (window.start == "stable" or window.phase.num_steps >= span_steps)
    return Circumstances(
        step=evaluation.step,
        num_steps=num_steps,
        num_snapshots=len(merges.capture.steps) if primary.coefficients else None,
        capacity=merges.capture.num_snapshots,
        is_growing=ring is not None and not ring.is_full and not window.was_thinned,
        span_steps=span_steps,
        is_rate_constant=is_held,
        has_stale_statistics=has_batch_norms and not merges.is_recalibrated,
        history=history,
    )
