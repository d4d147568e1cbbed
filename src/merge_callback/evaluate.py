"""A validation of other weights inside fit: the module's own hooks over the same batches, with nothing left behind.

How it runs. A `ValidationObserver` is called before each live validation of a fit, when the loaders stand ready and no
batch has been drawn. There it may call `evaluate` as often as it likes: a second evaluation loop of Lightning's own
class, with its own results, over the live loop's loaders, so that every reduction (batch sizes, several loaders, ranks,
metric objects) is Lightning's. Random states are put back afterwards, so the live validation that follows sees the same
batches and the same draws as it would have alone, and as the evaluations before it. When the live validation has ended
its epoch, and while Lightning still takes values for it, the observer is given the live values and answers what to log
beside them: same step, same row, and visible to whatever monitors a metric.

Lightning keeps these loops private. Every private name that this package touches is touched in this file.
"""

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyExperiment, Logger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from merge_callback.preserve import preserved_attributes, preserved_loaders, preserved_rng, preserved_trainer
from merge_callback.shards import copies
from merge_callback.swap import live_weights, swapped_weights


@dataclass(frozen=True)
class LoggedValue:
    """A metric at the end of a validation epoch, and how it was logged."""

    value: Tensor
    prog_bar: bool = False
    logger: bool = True
    higher_is_better: bool | None = None


class ValidationObserver(Protocol):
    """What `observe_validations` calls around every validation of a fit, the sanity check excepted."""

    def before_validation(self, trainer: Trainer) -> None:
        """Called before the live validation; the place for `evaluate`.

        Other weights may be swapped in: who saves a checkpoint meanwhile, as a signal handler may, saves the live ones.
        """

    def after_validation(self, trainer: Trainer, live: Mapping[str, LoggedValue]) -> Mapping[str, LoggedValue]:
        """Called with the live values once their epoch has ended; returns what to log beside them.

        What is to stand in the progress bar stands there under the first part of its name, ``merged``.
        """


def observe_validations(trainer: Trainer, observer: ValidationObserver) -> None:
    """Calls the observer around every validation of the running fit, until `stop_observing_validations`."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not isinstance(loop.run, _ObservedRun):
        loop.run = _ObservedRun(trainer)  # type: ignore[method-assign]
    loop.run.observers.append(observer)


def stop_observing_validations(trainer: Trainer, observer: ValidationObserver) -> None:
    """Undoes `observe_validations`; does nothing where there is nothing to undo."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if isinstance(loop.run, _ObservedRun) and observer in loop.run.observers:
        loop.run.observers.remove(observer)
        if not loop.run.observers:
            del loop.run


class _SilentCallback:
    """Stands in for a callback: its hooks do nothing, all else is the callback's own, its class included.

    Taking the callbacks away would be seen: user code asks the trainer for them, and so does the thread that draws
    Lightning's rich progress bar.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._callback)

    def __getattr__(self, name: str) -> Any:
        return _do_nothing if name.startswith("on_") else getattr(self._callback, name)


class _SilentLogger:
    """Stands in for a logger: what is logged goes nowhere; names, folders and the class are the logger's own."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self.experiment = DummyExperiment()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._logger)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._logger, name)
        is_action = name.startswith("log_") or name in ("save", "finalize", "after_save_checkpoint", "watch")
        return _do_nothing if is_action and callable(value) else value


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _ObservedRun:
    """Stands in for the ``run`` of the fit's validation loop."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.observers: list[ValidationObserver] = []
        # Lightning's results keep a name from one validation to the next.
        self.published: set[str] = set()

    def __call__(self) -> Any:
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        run = types.MethodType(type(loop).run, loop)
        loop.setup_data()
        if loop.skip:
            return run()
        with _saving_live_weights(self.trainer):
            for observer in self.observers:
                observer.before_validation(self.trainer)
        with _called_after_epoch_end(self.trainer.lightning_module, self._publish):
            return run()

    def _publish(self) -> None:
        results = self.trainer.fit_loop.epoch_loop.val_loop._results
        logged = _epoch_values(results, self.trainer.callback_metrics)
        live = {name: value for name, value in logged.items() if name not in self.published}
        now: set[str] = set()
        for observer in self.observers:
            for name, value in observer.after_validation(self.trainer, live).items():
                if name in now or name in live:
                    # Lightning would log the mean of both.
                    raise ValueError(f"{name} is logged twice; give the callback, or its merge, another name")
                now.add(name)
                self.published.add(name)
                # Not through `self.log`, which refuses the names of values that belong to one of several loaders. The
                # values are reduced over ranks already: asking for a reduction that does nothing keeps them so.
                results.log(
                    "on_validation_epoch_end", name, value.value, logger=value.logger, sync_dist=True, batch_size=1
                )
                if value.prog_bar:
                    # Under a short name, which leaves the line its place, and which nothing else has to know.
                    shown = {name.partition("/")[0]: value.value.item()}
                    self.trainer._logger_connector._progress_bar_metrics.update(shown)


@contextmanager
def _called_after_epoch_end(module: LightningModule, function: Callable[[], None]) -> Iterator[None]:
    """Calls the function right after the module's own ``on_validation_epoch_end``.

    The hook of the same name that callbacks have runs before the module's, too early to see what the module logs there.
    """
    with ExitStack() as replaced:
        own_hook = module.on_validation_epoch_end

        def hook() -> None:
            # Gone before anyone could copy or pickle the module with it.
            replaced.close()
            own_hook()
            function()

        replaced.enter_context(_replaced(module, on_validation_epoch_end=hook))
        yield


def evaluate(trainer: Trainer, limit_batches: int | float | None = None) -> dict[str, LoggedValue]:
    """Validates the weights that the model holds now, over the batches of the validation that is about to begin.

    To be called from `ValidationObserver.before_validation`. Runs the module's ``validation_step`` and its hooks as
    ``Trainer.validate`` would, without callbacks and loggers; they find the metrics that were logged before. Afterwards
    all that `merge_callback.preserve` tells of is as it was, also after an exception: random states, loaders, metric
    objects, what the module keeps, and what its hooks set in trainer, optimizers and schedulers. So are buffers.

    Args:
        trainer: A trainer in the middle of a fit.
        limit_batches: Number of batches per loader, or share of each; None for all that the live validation takes.

    Returns:
        Name -> value, for everything that was logged for the epoch.

    Raises:
        ValueError: If a share was asked of a loader without length.
    """
    live_loop = trainer.fit_loop.epoch_loop.val_loop
    loop = type(live_loop)(
        trainer, live_loop._trainer_fn, live_loop._stage, verbose=False, inference_mode=live_loop.inference_mode
    )
    loaders = live_loop._combined_loader
    assert loaders is not None
    loop._combined_loader = loaders
    loop._max_batches = [_limited(num_batches, limit_batches) for num_batches in live_loop._max_batches]
    loop._last_val_dl_reload_epoch = live_loop._last_val_dl_reload_epoch
    connector = type(trainer._logger_connector)(trainer)
    # Hooks may ask for what was logged before.
    for kind in ("_callback_metrics", "_progress_bar_metrics", "_logged_metrics"):
        getattr(connector, kind).update(getattr(trainer._logger_connector, kind))
    module = trainer.lightning_module
    live = {name: getattr(trainer, name) for name in ("callbacks", "loggers", "_logger_connector", "save_checkpoint")}

    def save_live_checkpoint(*arguments: Any, **options: Any) -> None:
        # A signal handler, such as that of a cluster that is about to stop the job, may save at any moment.
        with _replaced(trainer.fit_loop.epoch_loop, val_loop=live_loop), _replaced(trainer, **live):
            trainer.save_checkpoint(*arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_loaders(loaders.flattened))
        stack.enter_context(preserved_trainer(trainer))
        stack.enter_context(preserved_attributes(module))
        buffers = dict(module.named_buffers())
        stack.enter_context(swapped_weights(buffers, copies(buffers)))
        if isinstance(wrapper := trainer.model, DistributedDataParallel):
            # DDP takes over rank 0's buffers at the first evaluation after a training step; that is still to come.
            is_due = wrapper.require_forward_param_sync
            stack.enter_context(_replaced(wrapper, require_forward_param_sync=is_due))
        stack.enter_context(_replaced(trainer.fit_loop.epoch_loop, val_loop=loop))
        stack.enter_context(
            _replaced(
                trainer,
                callbacks=[_SilentCallback(callback) for callback in trainer.callbacks],  # type: ignore[attr-defined]
                loggers=[_SilentLogger(logger) for logger in trainer.loggers],
                _logger_connector=connector,
                save_checkpoint=save_live_checkpoint,
            )
        )
        loop.run()
        return _epoch_values(loop._results, connector.callback_metrics)


@contextmanager
def _saving_live_weights(trainer: Trainer) -> Iterator[None]:
    """Inside the context, whoever saves a checkpoint saves the live weights, whatever is swapped."""
    save = trainer.save_checkpoint

    def save_live_checkpoint(*arguments: Any, **options: Any) -> None:
        with live_weights():
            save(*arguments, **options)

    with _replaced(trainer, save_checkpoint=save_live_checkpoint):
        yield


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended; for ``on_train_batch_end``.

    A count of validations that is kept in checkpoints has to go up here. Lightning saves some checkpoints before the
    validation that is due at their step, and passes over that validation when it resumes from them.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_last_validation(trainer: Trainer) -> bool:
    """Whether the fit ends with the validation that runs now."""
    is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    has_all_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return trainer.should_stop or has_all_steps or (is_last_epoch and is_last_batch)


def logged_step(trainer: Trainer, live: Mapping[str, LoggedValue]) -> int:
    """The step under which Lightning hands the values of a validation to its loggers; ``step`` if the user logs it."""
    return int(live["step"].value) if "step" in live else trainer.fit_loop.epoch_loop._batches_that_stepped


def num_limited_batches(trainer: Trainer, limit_batches: int | float | None) -> tuple[int | float, int | float]:
    """How many batches, over all loaders, `evaluate` would take under that limit, and how many the live validation."""
    max_batches = trainer.fit_loop.epoch_loop.val_loop._max_batches
    return sum(_limited(num_batches, limit_batches) for num_batches in max_batches), sum(max_batches)


def _limited(num_batches: int | float, limit_batches: int | float | None) -> int | float:
    if limit_batches is None or num_batches == 0:
        return num_batches
    if isinstance(limit_batches, int):
        return min(num_batches, limit_batches)
    if num_batches == float("inf"):
        raise ValueError(
            f"limit_batches={limit_batches} is a share of the validation batches, but a validation loader has no"
            " length; give a number of batches instead"
        )
    return max(1, int(num_batches * limit_batches))


def _epoch_values(results: Any, callback_metrics: Mapping[str, Tensor]) -> dict[str, LoggedValue]:
    """What the hooks of one evaluation loop logged for the epoch, out of all metrics of the trainer."""
    values = {}
    for item in results.values():
        if not item.meta.on_epoch:
            continue
        # A value logged for step and epoch is monitored as `name` and as `name_epoch`, and written as the latter.
        name, written_name = results._forked_name(item, on_step=False)
        for key in dict.fromkeys((name, written_name)):
            if key not in callback_metrics:
                continue
            values[key] = LoggedValue(
                callback_metrics[key].detach().clone(),
                prog_bar=item.meta.prog_bar and key == written_name,
                logger=item.meta.logger and key == written_name,
                higher_is_better=None if item.is_tensor else getattr(item.value, "higher_is_better", None),
            )
    return values


@contextmanager
def _replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Other attributes for a while; one that came from the class is the class's again afterwards."""
    saved = {name: getattr(owner, name) for name in attributes}
    inherited = {n for n in attributes if n not in vars(owner) and not isinstance(getattr(type(owner), n), property)}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            if name in inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
