"""Validates merges at each validation of the live model, and logs the results."""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer

from merge_callback.capture.merge_set import MergeSet
from merge_callback.live.batch_norm import batch_norms
from merge_callback.live.evaluate import LoggedValue, evaluate, num_limited_batches
from merge_callback.live.learning_rates import optimizer_step
from merge_callback.live.observe import logged_step, observe_validations, stop_observing_validations
from merge_callback.utilities.devices import wait_for_device
from merge_callback.utilities.messages import Messages, noted
from merge_callback.validation.budget import Budget
from merge_callback.validation.closing import Compared
from merge_callback.validation.comparison import Comparison, are_sums_known, compare, merged_and_gains
from merge_callback.validation.count import ValidationCount
from merge_callback.validation.dashboards import Dashboards
from merge_callback.validation.directions import monitored
from merge_callback.validation.evaluation import Evaluated, Evaluation, Results, without_sums
from merge_callback.validation.frozen import FrozenValues
from merge_callback.validation.logged import LoggedName, Names
from merge_callback.validation.moment import moment_of
from merge_callback.validation.monitors import warn_of_contrary_modes, warn_of_missing_values, warn_of_repeated_values
from merge_callback.validation.predictions import LoggedPredictions
from merge_callback.validation.reasons import circumstances
from merge_callback.validation.results import begin_fit, collect, fit_result
from merge_callback.validation.routers import Choices, Routers
from merge_callback.validation.unmoved import UnmovedValues


class MergedValidation:
    """A `ValidationObserver` that validates merges on the batches of each live validation and logs the results.

    Args:
        merges: The merges to validate.
        names: The names of logged values.
        predictions: Predicts annealed values, and learns from the validations.
        budget: Limits the wall time.
        messages: Logs infos and warnings for the user.
        every_n_validations: Validates the merges at every n-th validation.
        limit_batches: As for `evaluate.evaluate`. Where the live validation does not tell the live values on the same
            batches, the live model is evaluated on them again.
        routers: The routers to compare between merge and live model; None compares none.
    """

    def __init__(
        self,
        merges: MergeSet,
        names: Names,
        predictions: LoggedPredictions,
        budget: Budget,
        messages: Messages,
        *,
        every_n_validations: int = 1,
        limit_batches: int | float | None = None,
        routers: Routers | None = None,
    ) -> None:
        self.merges = merges
        self.predictions = predictions
        self.budget = budget
        self.count = ValidationCount()
        self._unmoved = UnmovedValues(messages)
        self._frozen = FrozenValues(merges)
        self._names = names
        self._messages = messages
        self._every_n_validations = every_n_validations
        self._limit_batches = limit_batches
        self._routers = routers
        self._began: float | None = None  # when the fit began; None between fits
        self._evaluation: Evaluation | None = None
        self._dashboards = Dashboards(names.label())
        # The latest comparison with the live model that is told at the end of a fit.
        self._compared: Compared | None = None
        self._num_shown = 0
        # Step, live values beside merged ones, and logged values of the latest validation.
        self._latest: tuple[int, Mapping[str, LoggedValue], Mapping[LoggedName, LoggedValue]] | None = None

    def begin(self, trainer: Trainer) -> None:
        """Starts to observe the validations of a fit, until `close`."""
        self._began, self._compared, self._num_shown, self._latest = time.perf_counter(), None, 0, None
        self.predictions.decayed = None
        begin_fit()
        self._names.monitored.clear()
        self._names.monitored.update(monitored(trainer.callbacks))  # type: ignore[attr-defined]
        # Another fit may have another limit of batches.
        self._frozen = FrozenValues(self.merges)
        if trainer.barebones:
            self._messages.say(
                "a barebones trainer logs nothing, so merges are kept for export but not evaluated", "barebones"
            )
        elif trainer.enable_validation:
            num_limited_batches(trainer, self._limit_batches)  # raises now rather than at the first merge
            observe_validations(trainer, self, self._limit_batches)
            if self._every_n_validations > 1 or self.budget.share is not None:
                warn_of_repeated_values(trainer, self._messages, self.labels)
        else:
            self._messages.say(
                "there is no validation, so merges are kept for export but not evaluated", "no validation"
            )

    @property
    def labels(self) -> list[str]:
        """Labels of the merges in logged names."""
        return [self._names.label(merge.name) for merge in self.merges]

    def close(self, trainer: Trainer) -> None:
        """Ends the fit: logs the results of the last validation and the time that merges took."""
        stop_observing_validations(trainer, self)
        self._dashboards.close()
        self.budget.elapsed, self._began = self._elapsed(), None
        if self._num_shown or self.predictions.decayed is not None:
            decayed = self.predictions.decayed
            parts = [
                "" if self._compared is None else self._compared.describe(self._since()),
                self.predictions.foretold() if decayed is None else decayed.describe(),
                "\n".join(filter(None, [self._frozen.describe(), self.budget.summary()])),
            ]
            self._messages.say("\n\n".join(filter(None, parts)), "closing")
            self._compared, self._num_shown = None, 0
        if self._latest is not None and trainer.is_global_zero:
            collect(partial(fit_result, self._names, *self._latest))
        self._latest = None
        # Its results refer to the fit.
        self._frozen = FrozenValues(self.merges)

    def evaluated_at(self, step: int, name: str) -> bool:
        """Returns whether the latest validation was at this step and evaluated the merge of this name."""
        return self._evaluation is not None and self._evaluation.step == step and name in self._evaluation.merges

    def before_validation(self, trainer: Trainer) -> None:
        """Validates every merge, or takes its known results. May also validate the live weights on the same batches."""
        self._evaluation = None
        self.count.begin(trainer)
        if self.count.number % self._every_n_validations:
            why = f"evaluate_every_n_validations={self._every_n_validations} leaves this validation out"
            warn_of_missing_values(trainer, self._messages, self.labels, why)
            return
        is_limited = self._is_limited(trainer)
        results = self._frozen.repeat(trainer)
        is_free = (
            results is not None and self._routers is None and not (is_limited and not are_sums_known(results.merges))
        )
        if not is_free and not self._fits_budget(trainer):
            warn_of_missing_values(trainer, self._messages, self.labels, "max_overhead leaves this validation out")
            return
        step, merges = optimizer_step(trainer), self.merges
        merges.drop_unusable()
        merges.drop_nonfinite(step)
        missing = [self._names.label(merge.name) for merge in merges if not merge.is_ready]
        warn_of_missing_values(trainer, self._messages, missing, merges.capture.window.why_empty)
        if not merges.are_any_ready:
            return
        device = trainer.lightning_module.device
        wait_for_device(device)
        began = time.perf_counter()
        if results is None:
            results = self._validate_merges(trainer, step)
            self._frozen.keep(results, step)
        needs_live = is_limited and not are_sums_known(results.merges)
        live = self._validated(trainer, self._limit_batches) if needs_live else None
        diagnostics = dict(results.diagnostics)
        if self._routers is not None and results.choices:
            diagnostics |= self._routers.compare(results.choices, self._choices(trainer))
        wait_for_device(device)
        diagnostics["seconds"] = time.perf_counter() - began
        self.budget.spend(diagnostics["seconds"], is_costly=not is_free)
        self._evaluation = Evaluation(step, results.merges, live, diagnostics, is_limited=is_limited)

    def _is_limited(self, trainer: Trainer) -> bool:
        """Whether the merges have fewer batches than the live model, on any rank. All ranks must call it together."""
        if self._limit_batches is None:
            return False
        num_batches, num_live_batches = num_limited_batches(trainer, self._limit_batches)
        return trainer.strategy.reduce_boolean_decision(num_batches < num_live_batches, all=False)

    def _validate_merges(self, trainer: Trainer, step: int) -> Results:
        results = Results()
        for merge, row in self.merges.rows(step):
            if merge.name == self.merges.primary:
                results.diagnostics.update(merge.diagnostics(row))
            what = f"in the validation of the merge {merge.name!r}, which is before that of the live model"
            with noted(what), self.merges.swapped_in(trainer.lightning_module, merge, row):
                values = self._validated(trainer, self._limit_batches)
                if merge.name == self.merges.primary:
                    results.choices.update(self._choices(trainer))
            made_of = merge.ring_coefficients(), merge.intervals, merge.composition(step), merge.describe()
            results.merges[merge.name] = Evaluated(merge, *made_of, values)
            # Frees this merge's memory before the next merge is made.
            del row
        return results

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> dict[str, LoggedValue]:
        """Returns what to log beside the live values: merged values, gains, predictions and diagnostics."""
        self._frozen.see(live.keys())
        comparison = Comparison(live, live)
        if self._evaluation is not None:
            comparison = compare(self._evaluation, live)
        logged = self.predictions.after_validation(moment_of(trainer), self._evaluation, live, comparison)
        if self.budget.share is not None:
            logged[self._names("merge", "num_skipped")] = LoggedValue(torch.tensor(float(self.budget.num_skipped)))
        if (evaluation := self._evaluation) is not None:
            logged |= merged_and_gains(self._names, comparison, live)
            primary = evaluation.values.get(self.merges.primary, {})
            self._unmoved.look(primary, comparison.live, evaluation.diagnostics.get("spread", 0.0))
            self._check_names(live)
            warn_of_contrary_modes(trainer, self._messages, self.labels, self._names, live)
            device = trainer.lightning_module.device
            for key, diagnostic in (evaluation.diagnostics | self.predictions.curvature_gain(evaluation)).items():
                logged[self._names("merge", key)] = LoggedValue(torch.tensor(diagnostic, device=device))
            if trainer.is_global_zero:
                self._show(trainer, evaluation, live, comparison.beside, logged)
            self._evaluation = evaluation.without_sums()
        self._latest = optimizer_step(trainer), without_sums(comparison.beside), without_sums(logged)
        return {str(name): value for name, value in logged.items()}

    def _check_names(self, live: Mapping[str, LoggedValue]) -> None:
        """Warns of patterns that fit no metric: with a mistyped one, gains would have the wrong sign.

        Also says which metrics are taken for losses.
        """
        if not live:
            self._messages.say("the validation logs no metric of its epoch, so merges cannot be compared", "no metric")
            return
        self._messages.say(self._names.unknown(live), "directions")
        for pattern in self._names.higher_is_better:
            if not any(self._names.fits(name, pattern) for name in live):
                self._messages.warn(
                    f"higher_is_better={pattern!r} fits none of the metrics {', '.join(live)}", f"pattern {pattern}"
                )

    def state_dict(self) -> dict[str, Any]:
        budget = asdict(replace(self.budget, elapsed=self._elapsed()))
        return {"count": self.count.state_dict(), "budget": budget, "chart": self._dashboards.chart.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, except the share of time, which the user may have changed."""
        self.count.load_state_dict(state["count"])
        if "chart" in state:
            self._dashboards.chart.load_state_dict(state["chart"])
        self.budget = replace(Budget(**state["budget"]), share=self.budget.share)

    def _elapsed(self) -> float:
        """Returns the seconds of this fit and of the earlier fits that it continues."""
        return self.budget.elapsed + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def _fits_budget(self, trainer: Trainer) -> bool:
        if self.budget.share is None:
            return True
        # Rank 0 decides for all: clocks differ between ranks, and either all of them validate or none.
        is_allowed: bool = trainer.strategy.broadcast(self.budget.allows(self._elapsed()))
        self.budget.num_skipped += not is_allowed
        return is_allowed

    def _choices(self, trainer: Trainer) -> dict[str, Choices]:
        """Returns what the routers choose under the module's current weights."""
        if (routers := self._routers) is None:
            return {}
        return routers.choices(trainer.lightning_module, lambda: self._validated(trainer, routers.num_batches))

    def _validated(self, trainer: Trainer, limit_batches: int | float | None) -> dict[str, LoggedValue]:
        """Returns the values of a validation with the module's current weights, and notes the time that it takes."""
        began = time.perf_counter()
        values = evaluate(trainer, limit_batches)
        wait_for_device(trainer.lightning_module.device)
        self.budget.validating += time.perf_counter() - began
        return values

    def _show(
        self,
        trainer: Trainer,
        evaluation: Evaluation,
        live: Mapping[str, LoggedValue],
        beside: Mapping[str, LoggedValue],
        logged: Mapping[LoggedName, LoggedValue],
    ) -> None:
        """Updates the dashboards and prepares the closing lines; called on rank 0 alone."""
        began = time.perf_counter()
        primary, step = evaluation.merges.get(self.merges.primary), logged_step(trainer, live)
        coefficients, intervals = (primary.coefficients, primary.intervals) if primary is not None else ({}, [])
        self._dashboards.show(trainer.loggers, live, logged, step, coefficients, intervals=intervals)
        self._num_shown += 1
        # Beside a live model at another rate, a merge of before has no place.
        if self.merges.capture.is_current:
            made_of = {self._names.label(name): (name, each.description) for name, each in evaluation.merges.items()}
            run = self.merges, self.predictions.num_steps, self.predictions.predictor.history
            why = circumstances(evaluation, *run, has_batch_norms=bool(batch_norms(trainer.lightning_module)))
            self._compared = Compared(evaluation.step, without_sums(beside), without_sums(logged), made_of, why)
        self.budget.spend(time.perf_counter() - began)

    def _since(self) -> str:
        """Returns, for a title, what came after the latest comparison."""
        if self.merges.capture.is_current:
            return ""
        return f", before the {'decay' if self.merges.capture.window.is_frozen else 'learning rate changed'}"
