"""The merges that a user has named: makes them together and swaps them into a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.merges import Merge
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.sharding import as_in, reshard
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import snapshot_buffers, tensors_by_name
from merge_callback.merging.decays import decay_from_coefficients
from merge_callback.utilities.messages import Messages


class MergeSet:
    """The user's merges by name. Each is made from a capture's snapshots or copied from one of its averages.

    Args:
        merges: The merges; the first is the primary one.
        capture: Holds the snapshots and averages that the merges are made from.
        recalibration: Recalibrates batch norm statistics after a merge is swapped in.
        messages: Logs infos and warnings for the user.
    """

    def __init__(
        self, merges: Sequence[Merge], capture: SnapshotCapture, recalibration: Recalibration, messages: Messages
    ) -> None:
        self.capture = capture
        # Names of merges whose rule has returned valid coefficients at least once.
        self.proven_rules: set[str] = set()
        self._merges = {merge.name: merge for merge in merges}
        self._recalibration = recalibration
        self._messages = messages

    def __iter__(self) -> Iterator[Merge]:
        return iter(self._merges.values())

    @property
    def primary(self) -> str:
        """The name of the primary merge."""
        return next(iter(self._merges))

    def __getitem__(self, name: str | None) -> Merge:
        """Returns the merge with this name; the primary one if name is None.

        Raises:
            ValueError: If no merge has this name.
        """
        if name is not None and name not in self._merges:
            raise ValueError(f"there is no merge called {name!r}; there are: {', '.join(self._merges)}")
        return self._merges[name or self.primary]

    @property
    def is_recalibrated(self) -> bool:
        """Whether batch norm statistics of merges are calculated from the latest training inputs."""
        return self._recalibration.num_batches is not None

    @property
    def are_any_ready(self) -> bool:
        """Whether at least one of the merges can be made now."""
        return any(merge.is_ready for merge in self)

    def captured(self, name: str | None = None) -> Merge:
        """Returns the merge with this name after a check that it can be made now; the primary one if name is None.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If no merge has this name.
        """
        if not (merge := self[name]).is_ready:
            raise RuntimeError(self.capture.window.why_empty)
        return merge

    def coefficients(self, name: str | None = None) -> dict[int, float]:
        """Returns the coefficients of a merge by snapshot step, oldest first; they sum to one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If no merge has this name, its rule returns invalid coefficients, or it is an average over
                every step.
        """
        return self[name].coefficients()

    def implied_decay(self, name: str | None = None) -> list[tuple[int, float]]:
        """Returns the learning-rate decay that a merge corresponds to: (snapshot step, multiplier), oldest first."""
        coefficients = self.coefficients(name)
        return list(zip(coefficients, decay_from_coefficients(list(coefficients.values())), strict=True))

    def rows(self, step: int) -> Iterator[tuple[Merge, list[Tensor]]]:
        """Yields every merge that can be made now, with its row. Rows are reused: copy one to keep it.

        If memory allows, all merges are made in one pass over the snapshots. The rule of a merge counts as proven once
        the caller asks for the next merge.

        Args:
            step: Optimizer steps so far, for the warning about a rule that fails.
        """
        usable = [merge for merge in self if merge.is_ready and self._rule_works(merge, step)]
        rows: Iterator[list[Tensor]] = iter(())
        if self.capture.ring is not None:
            rows = self.capture.ring.merges([list(c.values()) for merge in usable if (c := merge.ring_coefficients())])
        for merge in usable:
            yield merge, merge.row(rows)
            self.proven_rules.add(merge.name)

    def _rule_works(self, merge: Merge, step: int) -> bool:
        try:
            merge.ring_coefficients()
        except ValueError as error:
            # A rule that never worked is the user's mistake, so raise. One that worked before must not end a long run.
            if merge.name not in self.proven_rules:
                raise
            self._messages.warn(f"no merge {merge.name!r} at step {step}: {error}")
            return False
        return True

    @contextmanager
    def merged_weights(self, module: nn.Module, name: str | None = None) -> Iterator[None]:
        """Swaps a new merge into the module inside the context, and restores the module's own weights afterwards.

        Snapshots that cannot be used are dropped first.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If no merge has this name, the merge cannot be made, or the module's tensors do not match it.
        """
        self.drop_unusable()
        merge = self.captured(name)
        with self.swapped_in(module, merge, merge.row()):
            yield

    @contextmanager
    def swapped_in(self, module: nn.Module, merge: Merge, row: list[Tensor]) -> Iterator[None]:
        """Swaps the row of a merge into the module inside the context, and restores its own weights afterwards.

        Raises:
            ValueError: If the module's tensors do not match those of the merge.
        """
        assert self.capture.layout is not None
        values = self.capture.layout.views(row)
        self.capture.finish()
        live = tensors_by_name(module, values)
        merged = as_in(live, values)
        # Copied, since a forward pass may write to buffers; moved, since Lightning takes the model off its device after
        # a fit.
        for name, buffer, own in self._fitting_buffers(module, merge):
            live[name], merged[name] = own, buffer.to(own.device, copy=True)
        with swapped_weights(live, merged, before=partial(reshard, module)):
            self._recalibration.apply_(module)
            yield

    def _fitting_buffers(self, module: nn.Module, merge: Merge) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields name, value in the merge, and live buffer, of buffers that are as they were; the others stay live."""
        buffers = snapshot_buffers(module)
        for name, buffer in merge.buffers.items():
            own = buffers.get(name)
            if own is not None and own.shape == buffer.shape and own.dtype == buffer.dtype:
                yield name, buffer, own
            else:
                what = "is gone" if own is None else f"is now {list(own.shape)} of {own.dtype}"
                was = f"{list(buffer.shape)} of {buffer.dtype}"
                self._messages.warn(
                    f"the buffer {name} {what}; in the newest snapshot it was {was}. Merges take the live one",
                    f"buffer {name}",
                )

    def buffers_of_snapshots(self, module: nn.Module) -> set[str]:
        """Returns the clean names of the buffers that merges take from snapshots and averages, not from the module."""
        return {name for merge in self for name, *_ in self._fitting_buffers(module, merge)}

    def drop_unusable(self) -> None:
        """Drops snapshots that some rank cannot use, with a warning for each. All ranks must call it together.

        Raises:
            OSError: If there is such a snapshot and the snapshots' directory is strict.
        """
        self.warn_of_unusable(self.capture.drop_unusable())

    def warn_of_unusable(self, problems: Mapping[int, str]) -> None:
        """Warns of snapshots that cannot be used, once of each; the reasons are given by step."""
        for step, problem in problems.items():
            text = f"the snapshot of step {step} is left out of merges and checkpoints: {problem}"
            self._messages.warn(text, topic=text)

    def drop_nonfinite(self, step: int) -> None:
        """Resets averages that hold NaN or inf on some rank, and warns of each. All ranks must call it together."""
        for name in self.capture.averages.drop_nonfinite(self.capture.sharding.gather):
            self._messages.warn(
                f"no merge {name!r} at step {step}: its average holds NaN or inf and restarts at the next step"
            )
