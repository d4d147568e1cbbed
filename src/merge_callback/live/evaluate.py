"""Validates other weights during fit, with the module's own hooks and the same batches, and without side effects.

A `ValidationObserver` is called before each live validation of a fit, when the loaders are ready and no batch has been
drawn. It may call `evaluate` any number of times. Each call runs a second evaluation loop of Lightning's own class
over the live loop's loaders, with its own results. So every reduction (batch sizes, several loaders, ranks, metric
objects) is Lightning's. Random states are restored afterwards, so each evaluation and the live validation see the same
batches and the same random draws.

At the end of the live validation epoch, while Lightning still accepts values for it, the observer gets the live values
and returns what to log beside them. These values have the same step and row, and callbacks can monitor them.

Lightning keeps these loops private. Only this file and `observe` use their private names.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from merge_callback.live.batch_sums import BatchRecorder, BatchSums
from merge_callback.live.isolate import isolated_tensors
from merge_callback.live.preserve import (
    preserved_attributes,
    preserved_loaders,
    preserved_loading,
    preserved_trainer,
)
from merge_callback.live.random_states import preserved_rng
from merge_callback.live.silent import SilentCallback, SilentLogger


@dataclass(frozen=True)
class LoggedValue:
    """The value of a metric at the end of a validation epoch, and the options it was logged with.

    ``sums`` are its running sums after the first batches, if they were recorded and the value is a mean over batches.
    """

    value: Tensor
    prog_bar: bool = False
    logger: bool = True
    higher_is_better: bool | None = None
    sums: BatchSums | None = field(default=None, compare=False, repr=False)


def evaluate(trainer: Trainer, limit_batches: int | float | None = None) -> dict[str, LoggedValue]:
    """Validates the model's present weights on the batches of the validation that is about to begin.

    Call it from `ValidationObserver.before_validation`. It runs the module's ``validation_step`` and hooks as
    ``Trainer.validate`` would, without callbacks and loggers. Hooks can read the metrics that were logged before.
    Afterwards, also after an exception, everything that `merge_callback.live.preserve` covers is restored: random
    states, loaders, metric objects, the module's attributes, and what its hooks set in trainer, optimizers and
    schedulers. Buffers are restored too.

    Args:
        trainer: A trainer in the middle of a fit.
        limit_batches: Number of batches per loader (int), or share of each loader (float). None takes as many as the
            live validation.

    Returns:
        Metric name -> value, for everything that was logged for the epoch.

    Raises:
        ValueError: If a share is given and a loader has no length.
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
    # Hooks may read metrics that were logged before.
    for kind in ("_callback_metrics", "_progress_bar_metrics", "_logged_metrics"):
        getattr(connector, kind).update(getattr(trainer._logger_connector, kind))
    module = trainer.lightning_module
    live = {name: getattr(trainer, name) for name in ("callbacks", "loggers", "_logger_connector", "save_checkpoint")}

    def save_with_live_loop(*arguments: Any, **options: Any) -> None:
        # A signal handler may save at any moment, such as one for a cluster that is about to stop the job. The weights
        # are restored around this, by `observe._saving_live_weights`.
        with _replaced(trainer.fit_loop.epoch_loop, val_loop=live_loop), _replaced(trainer, **live):
            trainer.save_checkpoint(*arguments, **options)

    with ExitStack() as stack:
        stack.enter_context(_begun(live_loop.batch_progress))
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_loaders(loaders.flattened))
        if (training := trainer.fit_loop._combined_loader) is not None:
            stack.enter_context(preserved_loading(training.flattened))
        stack.enter_context(preserved_trainer(trainer))
        stack.enter_context(preserved_attributes(module))
        stack.enter_context(isolated_tensors(module, trainer.optimizers))
        if isinstance(wrapper := trainer.model, DistributedDataParallel):
            # DDP copies rank 0's buffers in the first evaluation after a training step, then clears this flag. The live
            # validation still needs that copy.
            is_due = wrapper.require_forward_param_sync
            stack.enter_context(_replaced(wrapper, require_forward_param_sync=is_due))
        stack.enter_context(_replaced(trainer.fit_loop.epoch_loop, val_loop=loop))
        stack.enter_context(
            _replaced(
                trainer,
                callbacks=[SilentCallback(callback) for callback in trainer.callbacks],  # type: ignore[attr-defined]
                loggers=[SilentLogger(logger) for logger in trainer.loggers],
                _logger_connector=connector,
                save_checkpoint=save_with_live_loop,
            )
        )
        recorder = BatchRecorder(loop._max_batches if limit_batches is not None else [0] * len(loop._max_batches))
        stack.enter_context(_recording(connector, loop, recorder))
        loop.run()
        return _epoch_values(loop._results, loop._results.items(), connector.callback_metrics, recorder)


@contextmanager
def _begun(progress: Any) -> Iterator[None]:
    """Lets the live validation look as if its first batch were under way, also after an exception.

    A run that is stopped inside the context, and resumed from a checkpoint of it, then repeats the validation of that
    step, as one that is stopped in a live validation does.
    """
    before = copy.deepcopy(progress.state_dict())
    progress.reset_on_run()
    progress.increment_ready()
    progress.increment_started()
    yield
    progress.load_state_dict(before)


def validation_loaders(trainer: Trainer) -> list[Any]:
    """Returns the loaders of the live validation, as they are given to `evaluate`."""
    loaders = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return list(loaders.flattened) if loaders is not None else []


def num_limited_batches(trainer: Trainer, limit_batches: int | float | None) -> tuple[int | float, int | float]:
    """Returns the number of batches over all loaders, for `evaluate` with this limit and for the live validation."""
    max_batches = trainer.fit_loop.epoch_loop.val_loop._max_batches
    return sum(_limited(num_batches, limit_batches) for num_batches in max_batches), sum(max_batches)


def _recorded_batches(trainer: Trainer, limit_batches: int | float | None) -> list[int | float]:
    """Returns of how many batches of each loader the sums are recorded: those within a limit, none without one."""
    max_batches = trainer.fit_loop.epoch_loop.val_loop._max_batches
    return [0 if limit_batches is None else _limited(num_batches, limit_batches) for num_batches in max_batches]


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


@contextmanager
def _recording(connector: Any, loop: Any, recorder: BatchRecorder) -> Iterator[None]:
    """Shows a recorder what a validation loop has logged after each of its batches, when all hooks have run."""
    end_batch = connector.on_batch_end

    def record_and_end() -> None:
        recorder.record(loop._results)
        end_batch()

    with _replaced(connector, on_batch_end=record_and_end):
        yield


def _epoch_values(
    results: Any, items: Iterable[tuple[str, Any]], callback_metrics: Mapping[str, Tensor], recorder: BatchRecorder
) -> dict[str, LoggedValue]:
    """Returns the values that one evaluation loop logged for the epoch; ``callback_metrics`` may hold others too."""
    values = {}
    for place, item in items:
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
                sums=recorder.sums(place, item),
            )
    return values


@contextmanager
def _replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Replaces attributes inside the context. Afterwards, inherited ones are deleted from the instance again."""
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
