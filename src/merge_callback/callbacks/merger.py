"""`Merger`: merges without a Trainer, for a plain loop, Fabric, or the callback of another framework."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from merge_callback.callbacks.base import MergesOfARun
from merge_callback.callbacks.explanations import explain_costs, explain_phase
from merge_callback.callbacks.parts import Parts
from merge_callback.callbacks.session import MergeSession, state_copies
from merge_callback.callbacks.steps import OptimizerSteps
from merge_callback.capture.directory import SnapshotDirectory
from merge_callback.capture.merge_set import MergeSet
from merge_callback.capture.phase import RateUpdates
from merge_callback.capture.places import SnapshotMemory
from merge_callback.capture.state import OwnPartReader, captured_tensors
from merge_callback.capture.window import Start
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.learning_rates import learning_rates
from merge_callback.live.sharding import Sharding, rank
from merge_callback.live.wrappers import unwrapped
from merge_callback.merging.averages import Average
from merge_callback.merging.rules import Rule
from merge_callback.utilities.checks import check_optional_count
from merge_callback.utilities.messages import Messages
from merge_callback.validation.comparison import compare, merged_and_gains
from merge_callback.validation.moment import Moment
from merge_callback.validation.observed import logged_values, observed


class Merger(MergesOfARun):
    """Keeps snapshots of a model that any loop trains, and merges them: what `MergeCallback` does without a Trainer.

    Call `step` after every optimizer step. Validate as you always do, once more inside `merged_weights`, and give both
    values to `observe`, which returns what to log. Training is bit-identical to training without it.

    Args:
        every_n_steps: Optimizer steps between two snapshots; None starts at one and doubles.
        num_snapshots: Capacity of the ring of snapshots.
        merges: As for `MergeCallback`, like all arguments from here on.
        snapshot: ``"point"`` or ``"mean"``.
        mean_samples: How many steps of an interval a mean takes.
        start: ``"stable"``, ``"any"`` or an optimizer step.
        storage: ``"device"``, ``"cpu"`` or a directory.
        dtype: Dtype of the snapshots.
        calibration: File of records of real anneals, or ``"prior"``.
        forecast: Length of the decay that `observe` forecasts, as a share of all steps at its end or in steps.
        higher_is_better: Patterns of metrics where more is better.
        parts: Patterns of the parameters to merge, or `Parts`.
        name: Distinguishes several mergers, in logged names and in directories.

    Copies and pickles have the arguments and nothing of the run, which is in `state_dict`.

    Raises:
        ValueError: If an argument has an invalid value; the message names both.
        TypeError: If an argument has another type than described.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> merger = Merger(every_n_steps=1, num_snapshots=3)
        >>> for _ in range(5):
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     merger.step(model, optimizer)
        >>> merger.coefficients()
        {3: 0.3333333333333333, 4: 0.3333333333333333, 5: 0.3333333333333333}
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        num_snapshots: int = 10,
        *,
        merges: str | Rule | Average | Mapping[str, str | Rule | Average] = "sma",
        snapshot: Literal["point", "mean"] = "point",
        mean_samples: int | None = None,
        start: Start = "stable",
        storage: str | SnapshotMemory | SnapshotDirectory | os.PathLike[str] = "device",
        dtype: torch.dtype | str | None = None,
        calibration: str | os.PathLike[str] | None = None,
        forecast: float | int | None = None,
        higher_is_better: str | Sequence[str] = (),
        parts: str | Parts | Sequence[str] = "*",
        name: str = "merge",
    ) -> None:
        check_optional_count("every_n_steps", every_n_steps)
        super().__init__(
            every_n_steps,
            num_snapshots,
            merges,
            snapshot=snapshot,
            mean_samples=mean_samples,
            start=start,
            storage=storage,
            dtype=dtype,
            calibration=calibration,
            forecast=forecast,
            higher_is_better=higher_is_better,
            parts=parts,
            name=name,
        )
        messages = Messages(f"Merger({name!r})")
        found = self._new_merges(Recalibration(None, messages), messages)
        self._names = self._new_names(found)
        self._session = MergeSession(found, self._new_predictions(found, self._names, messages), messages)
        self._steps = OptimizerSteps(self.finish)
        self._optimizers: list[Optimizer] = []
        # The module of the latest step, as it was given and without wrappers.
        self._given = self._model = nn.Module()
        # State that waits for the first step, which brings the module that it belongs to.
        self._pending: Mapping[str, Any] | None = None
        # Merges that were swapped in since the latest step.
        self._swapped: set[str] = set()

    def __reduce__(self) -> Any:
        arguments, options = self._call
        return partial(type(self), *arguments, **options), ()

    @property
    def is_ready(self) -> bool:
        """Whether the primary merge can be made."""
        return self._session.merges[None].is_ready

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were counted so far, those before a resume included."""
        return self._pending["step"] if self._pending is not None else self._session.step

    def step(
        self,
        module: nn.Module,
        optimizers: Optimizer | Iterable[Optimizer],
        *,
        schedulers: LRScheduler | Iterable[LRScheduler] = (),
    ) -> None:
        """Counts an optimizer step and captures the weights if that is due. Call it after the schedulers' step.

        Writes to the weights other than by these optimizers, such as clipping, come before it, or after `finish`.
        A call without a step of an optimizer since the last one is not counted: so a `GradScaler` may skip steps, and
        no step is counted twice.

        Args:
            module: The model that is trained. DDP and other wrappers are looked through.
            optimizers: Those that have stepped; always the same ones.
            schedulers: Needed only for those that do not step with every optimizer step, such as once an epoch: until
                they have, a constant learning rate says nothing.

        Raises:
            TypeError, ValueError: If ``optimizers`` are none, or others than before; or if nothing can be merged.
            MemoryError: If the snapshots do not fit into memory.
        """
        # Looking through wrappers goes through all parameters, which is too much for every step.
        if module is not self._given:
            self._given, self._model = module, unwrapped(module)
        session, model = self._session, self._model
        self._optimizers = self._steps.follow(optimizers)
        if not self._steps.take():
            session.messages.warn(
                f"no optimizer has stepped since step {session.step} was counted, so this call of step() is not (calls"
                " at every micro-batch? a GradScaler that skipped the step?)",
                "uncounted",
            )
            return
        self._begin(model)
        session.module, session.step = model, session.step + 1
        self._swapped.clear()
        following = learning_rates(self._optimizers)
        counts = [each.last_epoch for each in ([schedulers] if isinstance(schedulers, LRScheduler) else schedulers)]
        # Of a first step it is not known which rates it used.
        session.rates = session.rates or [float("nan")] * len(following)
        before = session.updates if len(session.updates) == len(counts) else counts
        session.capture_step(following, RateUpdates(before, counts))
        session.rates, session.updates = following, counts
        explain_phase(session.merges, session.messages, session.step, lambda: float("inf"))
        explain_costs(session.capture, session.messages, model, self._optimizers, is_saved=False)

    def _begin(self, model: nn.Module) -> None:
        """Begins with a model, and with a saved state if one was loaded; does nothing if that is done."""
        session = self._session
        if session.module is not None:
            return
        state, ranks = self._pending, Sharding(dict(model.named_parameters())).ranks
        # Before anything is begun, so that the state still waits after an error.
        if state is not None and state["ranks"] != ranks:
            held, here = (" of ".join(map(str, each)) for each in (state["ranks"], ranks))
            raise ValueError(
                f"the state holds {f'the shards of rank {held}' if held else 'a whole model'}, and this is"
                f" {f'rank {here}' if here else 'a whole model'}; as many ranks load a state as saved it"
            )
        session.prepare(model, 0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if state is not None:
            if session.restore(state, OwnPartReader(state["tensors"], session.capture.sharding)):
                session.step, session.rates, session.updates = state["step"], state["rates"], state["updates"]
            self._pending = None
        session.announce()

    def captured_merges(self) -> MergeSet:
        if self._pending is not None:
            raise RuntimeError("the loaded state waits for the model: call step() or merged_state_dict(model) first")
        return super().captured_merges()

    def finish(self) -> None:
        """Makes it safe to write to the weights while they are copied. Optimizers call it by a hook."""
        self._session.capture.finish()

    @contextmanager
    def merged_weights(self, pl_module: nn.Module, name: str | None = None) -> Iterator[None]:
        """Does what `MergeCallback.merged_weights` does, for a model that may be wrapped."""
        model = unwrapped(pl_module)
        if self._pending is not None:
            self._begin(model)
        with super().merged_weights(model, name):
            self._swapped.add(self._session.merges[name].name)
            yield

    def observe(
        self,
        live: Mapping[str, float],
        merged: Mapping[str, float],
        further: Mapping[str, Mapping[str, float]] | None = None,
        *,
        is_last: bool = False,
    ) -> dict[str, float]:
        """Learns from a validation of the live model and of its merges, and returns what to log.

        Args:
            live: Metric -> value of the live model.
            merged: Metric -> value of the primary merge, on the same batches.
            further: Name -> metric -> value of further merges. A second merge of the ring makes forecasts more exact.
            is_last: Whether the run ends here. At the end of a decay, the errors of predictions are returned then.

        Returns:
            Logged name -> value, with the names that `MergeCallback` logs: ``merged/m``, ``merge_gain/m``,
            ``forecast/m`` and others.

        Raises:
            RuntimeError: If one of the merges was not swapped in since the latest step.
            ValueError: If no merge has one of the names.
        """
        session = self._session
        found = {session.merges.primary: merged, **(further or {})}
        for name in found:
            if session.merges[name].name not in self._swapped:
                raise RuntimeError(
                    f"the merge {name!r} was not validated at step {session.step}: observe() takes values from inside"
                    f" merged_weights(model, {name!r}), entered after the latest step()"
                )
        evaluation, values = observed(session.merges, session.step, found), logged_values(live)
        comparison = compare(evaluation, values)
        session.messages.say(self._names.unknown(values), "directions")
        optimizer = ", ".join(type(each).__name__ for each in self._optimizers)
        moment = Moment(session.step, optimizer, is_last=is_last, may_write=rank() == 0)
        logged = session.predictions.after_validation(moment, evaluation, values, comparison)
        logged |= merged_and_gains(self._names, comparison, values)
        return {str(name): float(value.value) for name, value in logged.items()}

    def merged_state_dict(self, module: nn.Module, name: str | None = None) -> dict[str, Tensor]:
        """Returns the merge as a state dict of the model, which loads it with ``strict=True``.

        The tensors are copies, sharded like the live ones. Raises the same errors as `merged_weights`.

        Args:
            module: The model that was trained, or another of the same architecture.
            name: Name of the merge; None is the primary one.
        """
        with self.merged_weights(module, name):
            return state_copies(module)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is needed to continue as if there had been no interruption, by reference.

        ``torch.load(..., weights_only=True)`` reads it. Of a sharded model it holds this rank's shards: every rank
        saves its own, and as many ranks load them.
        """
        if self._pending is not None:
            return dict(self._pending)
        tensors = {each.key: each.part for each in captured_tensors(self._session.capture)}
        return self._session.state_dict() | {"tensors": tensors, "ranks": self._session.capture.sharding.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned, from the next call on that is given the model.

        Raises:
            RuntimeError: If steps were counted already.
        """
        if self._session.module is not None:
            raise RuntimeError("load_state_dict comes before the first step(); make a new Merger to go back")
        self._pending = dict(state)
