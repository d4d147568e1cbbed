"""One training run, whatever loop trains it: captured weights, their merges, and what validations of them teach."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from merge_callback.capture.merge_set import MergeSet
from merge_callback.capture.phase import NO_UPDATES, Rates, RateUpdates
from merge_callback.capture.state import (
    STATE_FORMAT,
    TensorReader,
    capture_state,
    captured_tensors,
    restore_capture_,
)
from merge_callback.live.sharding import as_in, local_clones, reshard
from merge_callback.live.swap import overwrite_
from merge_callback.live.weights import tensors_by_name
from merge_callback.merging.rules import Rule, merge_coefficients
from merge_callback.utilities.messages import Messages
from merge_callback.validation.predictions import LoggedPredictions


def state_copies(module: nn.Module) -> dict[str, Any]:
    """Returns the state dict of a module, with copies of its tensors."""
    state = module.state_dict()
    return {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


class MergeSession:
    """One run, which may be fresh, resumed, or continued by another fit of the same module.

    `Merger` uses it as it is; `TrainerSession` adds what a Lightning Trainer does by itself.

    Args:
        merges: The user's merges, with the capture that they are made from.
        predictions: Learns from validations of the merges.
        messages: Logs infos and warnings for the user.
    """

    def __init__(self, merges: MergeSet, predictions: LoggedPredictions, messages: Messages) -> None:
        self.merges = merges
        self.capture = merges.capture
        self.predictions = predictions
        self.module: nn.Module | None = None
        self.step = 0
        self.messages = messages
        # Learning rates of the step in progress, and how often the schedulers had set them.
        self.rates: list[float] = []
        self.updates: list[int] = []

    def prepare(self, module: nn.Module, step: int, num_local_processes: int) -> bool:
        """Begins to follow a module from a step on. Memory is allocated the first time; returns whether it was.

        Args:
            module: The module that is trained, on its device.
            step: Optimizer steps so far.
            num_local_processes: Processes on this host that train the same model.
        """
        is_new = self.module is None
        self.module, self.step = module, step
        if is_new:
            self.capture.num_local_processes = num_local_processes
            self.capture.prepare(module)
        self.messages.begin()
        return is_new

    def announce(self) -> None:
        """Tells the user what is captured, and what is wrong with the records of real anneals."""
        for problem in self.predictions.predictor.read():
            self.messages.warn(f"left out of the records: {problem}", problem)
        names = ", ".join(merge.name for merge in self.merges)
        self.messages.say(f"{names}: {self.capture.describe()}", "start")

    def capture_step(self, following: Rates, updates: RateUpdates = NO_UPDATES) -> None:
        """Captures the weights after the optimizer step ``self.step``, if that is due.

        Args:
            following: Learning rates of the next step.
            updates: How often the schedulers have set them.
        """
        assert self.module is not None
        self.capture.after_step(self.module, self.step, self.rates, following, updates)

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is needed to continue as if there had been no interruption.

        Tensors are included by reference, except those of a sharded model.
        """
        tensors = {} if self.capture.sharding.is_sharded else {t.key: t.part for t in captured_tensors(self.capture)}
        capture = capture_state(self.capture)
        self.merges.warn_of_unusable(capture["problems"])
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "rates": self.rates,
            "updates": self.updates,
            "capture": capture,
            "tensors": tensors,
            "proven_rules": sorted(self.merges.proven_rules),
            **self.predictions.state_dict(),
        }

    def restore(self, state: Mapping[str, Any], reader: TensorReader) -> bool:
        """Continues from a saved state, for a module that was prepared; returns whether anything of it was used.

        Args:
            state: What `state_dict` returned.
            reader: Reads its tensors.
        """
        if state.get("format") != STATE_FORMAT:
            self.messages.warn(
                f"the checkpoint's state has format {state.get('format', 1)}, and this version reads format"
                f" {STATE_FORMAT}. Nothing of it is used: window, averages, validation count and predictions start"
                " anew. Checkpoints of version 0.1.0 have format 1",
                "resumed",
            )
            return False
        assert self.module is not None
        if changes := restore_capture_(self.capture, state["capture"], self.module, reader):
            self.messages.warn(f"resumed, but {'; '.join(changes)}", "resumed")
        self.merges.proven_rules = set(state["proven_rules"])
        self.predictions.load_state_dict(state)
        return True

    # Called by callbacks that change the training.

    def forget_since(self, step: int, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Drops snapshots and validations from a step on. Averages restart.

        Args:
            step: The first step to forget.
            buffers: Floating-point buffers at the newest remaining snapshot; None keeps the current ones.
        """
        self.capture.forget_since(step)
        if buffers:
            self.capture.buffers = local_clones(buffers)
        self.predictions.forget_since(step)

    def put_into_(
        self, module: nn.Module, rule: str | Rule, steps: Sequence[int], buffers: Mapping[str, Tensor]
    ) -> None:
        """Writes a merge of snapshots into the live model permanently: training continues from it.

        Args:
            module: The module that is trained.
            rule: Rule of the merge.
            steps: Steps of the snapshots to merge, which follow each other in the ring.
            buffers: Name -> value of floating-point buffers.
        """
        assert self.capture.ring is not None
        assert self.capture.layout is not None
        first = self.capture.steps.index(steps[0])
        last = first + len(steps)
        values = [0.0] * len(self.capture.steps)
        values[first:last] = merge_coefficients(rule, self.capture.covered[first:last])
        row = self.capture.ring.combine(values)
        merged = self.capture.layout.views(row)
        self.capture.finish()
        live = tensors_by_name(module, [*merged, *buffers])
        overwrite_(live, as_in(live, merged) | dict(buffers), before=partial(reshard, module))
