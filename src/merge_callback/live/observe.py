"""Calls an observer around every validation of a fit."""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from merge_callback.live.batch_sums import BatchRecorder
from merge_callback.live.evaluate import LoggedValue, _epoch_values, _recorded_batches, _recording, _replaced
from merge_callback.live.swap import live_weights


class ValidationObserver(Protocol):
    """The interface of an observer: called around every validation of a fit, except the sanity check."""

    def before_validation(self, trainer: Trainer) -> None:
        """Called before the live validation. This is the place to call `evaluate`.

        The observer may swap in other weights. A checkpoint that is saved meanwhile, such as by a signal handler, still
        holds the live weights.
        """

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> Mapping[str, LoggedValue]:
        """Called with the live values at the end of their epoch; returns the values to log beside them.

        The progress bar shows a value under the first part of its name, such as ``merged``.
        """


def observe_validations(
    trainer: Trainer, observer: ValidationObserver, limit_batches: int | float | None = None
) -> None:
    """Calls the observer around every validation of the running fit, until `stop_observing_validations`.

    Args:
        trainer: The Trainer of the fit.
        observer: The observer.
        limit_batches: Of how many batches of each loader the live values have `LoggedValue.sums`, as a number or as a
            share; None for none.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop not in _observed:
        _observed[loop] = run = _ObservedRun(trainer, vars(loop).get("run"))
        loop.run = run  # type: ignore[method-assign]
    _observed[loop].observers.append(observer)
    _observed[loop].limits.append(limit_batches)


def stop_observing_validations(trainer: Trainer, observer: ValidationObserver) -> None:
    """Undoes `observe_validations`; does nothing if the observer is not registered."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = _observed.get(loop)
    if run is None or observer not in run.observers:
        return
    del run.limits[run.observers.index(observer)]
    run.observers.remove(observer)
    if run.observers:
        return
    # The entry has to go: it refers to the trainer, and so to its own key.
    del _observed[loop]
    # If somebody has wrapped it meanwhile, it stays there and calls nobody.
    if loop.run is run:
        if run.replaced is None:
            del loop.run
        else:
            loop.run = run.replaced  # type: ignore[method-assign]


# Validation loop -> its observed `run`.
_observed: "WeakKeyDictionary[Any, _ObservedRun]" = WeakKeyDictionary()


class _ObservedRun:
    """Replaces the ``run`` method of the fit's validation loop.

    Args:
        trainer: The trainer.
        replaced: What somebody else has put in the place of the method, such as a profiler; it is called as before.
    """

    def __init__(self, trainer: Trainer, replaced: Callable[[], Any] | None) -> None:
        self.trainer = trainer
        self.replaced = replaced
        self.observers: list[ValidationObserver] = []
        # For each of them, of how many batches it wants the sums.
        self.limits: list[int | float | None] = []
        # Names that observers logged. Lightning's results keep them, and they are not live values in later validations.
        self.published: set[str] = set()

    def __call__(self) -> Any:
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        run = self.replaced or types.MethodType(type(loop).run, loop)
        if not self.observers:
            return run()
        loop.setup_data()
        if loop.skip:
            return run()
        with _saving_live_weights(self.trainer):
            for observer in self.observers:
                observer.before_validation(self.trainer)
        wanted = [_recorded_batches(self.trainer, limit) for limit in self.limits]
        recorder = BatchRecorder([max(of_loader) for of_loader in zip(*wanted, strict=True)])
        publish = partial(self._publish, recorder)
        connector = self.trainer._logger_connector
        with _recording(connector, loop, recorder), _called_before_epoch_ends(self.trainer, publish):
            return run()

    def _publish(self, recorder: BatchRecorder) -> None:
        results = self.trainer.fit_loop.epoch_loop.val_loop._results
        # Of a metric that this validation did not log, Lightning keeps the value of the one before.
        now_logged = ((place, item) for place, item in results.items() if not item.has_reset)
        logged = _epoch_values(results, now_logged, self.trainer.callback_metrics, recorder)
        live = {name: value for name, value in logged.items() if name not in self.published}
        now: set[str] = set()
        for observer in self.observers:
            for name, value in observer.after_validation(self.trainer, live).items():
                if name in now or name in live:
                    # Lightning would silently log the mean of both values.
                    raise ValueError(f"{name} is logged twice; give the callback, or its merge, another name")
                now.add(name)
                self.published.add(name)
                # `self.log` refuses names that belong to one of several loaders. The values are already reduced over
                # ranks: `sync_dist` with the default reduction of results, which does nothing, keeps them unchanged.
                results.log(
                    "on_validation_epoch_end", name, value.value, logger=value.logger, sync_dist=True, batch_size=1
                )
                if value.prog_bar:
                    # A short name keeps the line short. It exists only in the progress bar.
                    shown = {name.partition("/")[0]: value.value.item()}
                    self.trainer._logger_connector._progress_bar_metrics.update(shown)


@contextmanager
def _called_before_epoch_ends(trainer: Trainer, function: Callable[[], None]) -> Iterator[None]:
    """Calls the function after the module's own ``on_validation_epoch_end``, when values can still be logged.

    Lightning runs the callbacks' hook of that name before the module's, too early to see what the module logs in it.
    Nothing is set on the module, which may be copied or pickled meanwhile.
    """
    connector = trainer._logger_connector
    end_epoch = connector.on_epoch_end

    def publish_and_end() -> None:
        function()
        end_epoch()

    with _replaced(connector, on_epoch_end=publish_and_end):
        yield


@contextmanager
def _saving_live_weights(trainer: Trainer) -> Iterator[None]:
    """Inside the context, every saved checkpoint holds the live weights, even while others are swapped in."""
    save = trainer.save_checkpoint

    def save_with_live_weights(*arguments: Any, **options: Any) -> None:
        with live_weights():
            save(*arguments, **options)

    with _replaced(trainer, save_checkpoint=save_with_live_weights):
        yield


def validation_follows(trainer: Trainer) -> bool:
    """Returns True if a validation follows the training batch that has just ended. For ``on_train_batch_end``.

    A count of validations that is saved in checkpoints must increase here. Lightning saves some checkpoints before the
    validation of their step, and skips that validation when it resumes from them.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def batch_number(trainer: Trainer) -> int:
    """Returns the number of the training batch that has ended, over all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx


def is_last_validation(trainer: Trainer) -> bool:
    """Returns True if the fit ends after the validation that runs now."""
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    has_all_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return trainer.should_stop or has_all_steps or (is_last_epoch and is_last_batch)


def logged_step(trainer: Trainer, live: Mapping[str, LoggedValue]) -> int:
    """Returns the step of a validation's values in the loggers: the value of ``step`` if the user logs it."""
    return int(live["step"].value) if "step" in live else trainer.fit_loop.epoch_loop._batches_that_stepped
