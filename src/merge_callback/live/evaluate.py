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

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import DummyExperiment, Logger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from merge_callback.live.preserve import preserved_attributes, preserved_loaders, preserved_rng, preserved_trainer
from merge_callback.live.sharding import local_clones
from merge_callback.live.swap import swapped_weights


@dataclass(frozen=True)
class LoggedValue:
    """A metric at the end of a validation epoch, and how it was logged."""

    value: Tensor
    prog_bar: bool = False
    logger: bool = True
    higher_is_better: bool | None = None


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


def evaluate(trainer: Trainer, limit_batches: int | float | None = None) -> dict[str, LoggedValue]:
    """Validates the weights that the model holds now, over the batches of the validation that is about to begin.

    To be called from `ValidationObserver.before_validation`. Runs the module's ``validation_step`` and its hooks as
    ``Trainer.validate`` would, without callbacks and loggers; they find the metrics that were logged before. Afterwards
    all that `merge_callback.live.preserve` tells of is as it was, also after an exception: random states, loaders,
    metric objects, what the module keeps, and what its hooks set in trainer, optimizers and schedulers. So are buffers.

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
        stack.enter_context(swapped_weights(buffers, local_clones(buffers)))
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
