"""The merges that a user has named: made together, and put into a model for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.capture.merges import Merge
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.sharding import local, reshard
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import tensors_by_name
from merge_callback.merging.rules import decay_from_coefficients
from merge_callback.utilities.messages import Messages


class MergeSet:
    """Merges by name, made of a capture's snapshots or copied from its averages.

    Args:
        merges: The merges; the first is the primary one.
        capture: What they are made of.
        recalibration: Of batch norm statistics, where a merge is swapped in.
        messages: For the user.
    """

    def __init__(
        self, merges: Sequence[Merge], capture: SnapshotCapture, recalibration: Recalibration, messages: Messages
    ) -> None:
        self.capture = capture
        # Names of merges whose rule has given proper coefficients once.
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
        """The merge of that name; the primary one if it is None.

        Raises:
            ValueError: If there is no merge of that name.
        """
        if name is not None and name not in self._merges:
            raise ValueError(f"there is no merge called {name!r}; there are: {', '.join(self._merges)}")
        return self._merges[name or self.primary]

    @property
    def are_any_ready(self) -> bool:
        """Whether anything was captured that one of the merges can be made of."""
        return any(merge.is_ready for merge in self)

    def captured(self, name: str | None = None) -> Merge:
        """The merge of that name, which can be made.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name.
        """
        if not (merge := self[name]).is_ready:
            raise RuntimeError(self.capture.why_empty)
        return merge

    def coefficients(self, name: str | None = None) -> dict[int, float]:
        """The coefficients of a merge by snapshot step, oldest first; they sum to one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name, its rule gives no proper coefficients, or it is an average.
        """
        return self[name].coefficients()

    def implied_decay(self, name: str | None = None) -> list[tuple[int, float]]:
        """The learning-rate decay that a merge stands for: (snapshot step, multiplier), oldest first."""
        coefficients = self.coefficients(name)
        return list(zip(coefficients, decay_from_coefficients(list(coefficients.values())), strict=True))

    def rows(self, step: int) -> Iterator[tuple[Merge, list[Tensor]]]:
        """Makes every merge that is ready and whose rule works now, and yields it with its row.

        Rows are reused: copy one to keep it. Snapshots are read once for all merges, where there is memory for that. A
        rule has proven itself when the next merge is asked for.

        Args:
            step: Optimizer steps so far, to tell the user.
        """
        usable = [merge for merge in self if merge.is_ready and self._rule_works(merge, step)]
        rows: Iterator[list[Tensor]] = iter(())
        if self.capture.ring is not None:
            rows = self.capture.ring.merges([list(c.values()) for merge in usable if (c := merge.snapshots())])
        for merge in usable:
            yield merge, merge.row(rows)
            self.proven_rules.add(merge.name)

    def _rule_works(self, merge: Merge, step: int) -> bool:
        try:
            merge.snapshots()
        except ValueError as error:
            # A rule that never worked is a mistake to mend; one that worked before must not end a long run.
            if merge.name not in self.proven_rules:
                raise
            self._messages.warn(f"no merge {merge.name!r} at step {step}: {error}")
            return False
        return True

    @contextmanager
    def merged_weights(self, module: nn.Module, name: str | None = None) -> Iterator[None]:
        """Inside the context the module holds a merge, made anew of what can be used; afterwards its own weights.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name, it cannot be made, or the module has other tensors.
        """
        self.drop_unusable()
        merge = self.captured(name)
        with self.swapped_in(module, merge, merge.row()):
            yield

    @contextmanager
    def swapped_in(self, module: nn.Module, merge: Merge, row: list[Tensor]) -> Iterator[None]:
        """Inside the context the module holds a merge, as its row has it; afterwards its own weights.

        Raises:
            ValueError: If the module has other tensors.
        """
        assert self.capture.layout is not None
        merged = self.capture.layout.views(row)
        self.capture.finish()
        live = tensors_by_name(module, [*merged, *merge.buffers])
        # Copies, since a forward pass may write to buffers; and Lightning takes the model off its device after a fit.
        for name, buffer in merge.buffers.items():
            merged[name] = buffer.to(local(live[name]).device, copy=True)
        with swapped_weights(live, merged, before=partial(reshard, module)):
            self._recalibration.apply_(module)
            yield

    def drop_unusable(self) -> None:
        """Leaves out snapshots that cannot be used on some rank, and says so; for all ranks to call at the same time.

        Raises:
            OSError: If there are any, and the directory they are in is a strict one.
        """
        for problem in self.capture.drop_unusable():
            self._messages.warn(f"a snapshot is left out of the merges: {problem}")

    def drop_nonfinite(self, step: int) -> None:
        """Begins averages anew that hold NaN or inf on some rank; for all ranks to call at the same time."""
        for name in self.capture.averages.drop_nonfinite(self.capture.sharding.gather):
            self._messages.warn(
                f"no merge {name!r} at step {step}: its average holds NaN or inf, and begins anew with the next step"
            )
