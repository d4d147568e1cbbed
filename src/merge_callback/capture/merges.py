"""The merges that a user has named, made of what was captured, and put into a model for a while."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from merge_callback.capture.capture import SnapshotCapture
from merge_callback.live.batch_norm import Recalibration
from merge_callback.live.sharding import local, reshard
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import tensors_by_name
from merge_callback.merging.averages import Average, is_average
from merge_callback.merging.rules import Rule, merge_coefficients
from merge_callback.utilities.messages import Messages


class CapturedMerges:
    """Merges by name: combined from a capture's snapshots, or copied from its averages.

    Args:
        rules: Name -> rule over snapshots, or average over every step; the first is the primary merge.
        capture: What they are made of.
        recalibration: Of batch norm statistics, where a merge is swapped in.
        messages: For the user.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule | Average],
        capture: SnapshotCapture,
        recalibration: Recalibration,
        messages: Messages,
    ) -> None:
        self.rules = rules
        self.capture = capture
        # Merges whose rule has given proper coefficients once.
        self.proven_rules: set[str] = set()
        self._recalibration = recalibration
        self._messages = messages

    @property
    def primary(self) -> str:
        """The name of the primary merge."""
        return next(iter(self.rules))

    def rule(self, name: str | None = None) -> Rule | Average:
        """Of a merge; None is the primary one.

        Raises:
            ValueError: If there is no merge of that name.
        """
        if name is not None and name not in self.rules:
            raise ValueError(f"there is no merge called {name!r}; there are: {', '.join(self.rules)}")
        return self.rules[name or self.primary]

    def is_captured(self, name: str | None = None) -> bool:
        """Whether there is something to make it of."""
        if is_average(self.rule(name)):
            return self.capture.shadows[name or self.primary].step is not None
        return bool(self.capture.steps)

    def check_captured(self, name: str | None = None) -> None:
        """Raises `RuntimeError` if there is nothing to make it of."""
        if not self.is_captured(name):
            start = self.capture.start
            begins = "once the learning rate is constant" if start == "stable" else f"at step {start}"
            raise RuntimeError(f"nothing was captured yet, so there is no merge: capturing begins {begins}")

    def coefficients(self, name: str | None = None) -> dict[int, float]:
        """By snapshot step, oldest first; they sum to one.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: If there is no merge of that name, its rule gives no proper coefficients, or it is an average
                over all steps, which has none.
        """
        rule, steps = self.rule(name), self.capture.steps
        if is_average(rule):
            raise ValueError(f"the merge {name or self.primary!r} is an average over every step, not over snapshots")
        self.check_captured(name)
        return dict(zip(steps, merge_coefficients(rule, steps), strict=True))

    def row(self, name: str | None = None) -> list[Tensor]:
        """The merge of that name, made anew of what can be used.

        Raises:
            RuntimeError: If nothing was captured yet.
            ValueError: As `coefficients`, and if it is an average that holds NaN or inf.
        """
        self.drop_unusable()
        self.check_captured(name)
        if is_average(self.rule(name)):
            self.capture.check_shadow(name or self.primary)
            return self.capture.shadow_row(name or self.primary)
        assert self.capture.ring is not None
        return self.capture.ring.combine(list(self.coefficients(name).values()))

    def rows(self, names: Sequence[str], step: int) -> Iterator[tuple[str, dict[int, float], list[Tensor]]]:
        """The merges of those names as far as their rules work, and their coefficients; each good until the next.

        A merge has worked when the next one is asked for.

        Args:
            names: Merges that are captured.
            step: Optimizer steps so far, to tell the user.
        """
        usable = {name: values for name in names if (values := self._usable_coefficients(name, step)) is not None}
        over_snapshots = [list(values.values()) for values in usable.values() if values]
        rows = self.capture.ring.merges(over_snapshots) if self.capture.ring is not None else iter(())
        for name, values in usable.items():
            yield name, values, next(rows) if values else self.capture.shadow_row(name)
            self.proven_rules.add(name)

    @contextmanager
    def swapped_in(self, module: nn.Module, row: list[Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside the context the module holds a merge, as `row` and `buffers` gave it; afterwards its own weights.

        Raises:
            ValueError: If the module has other tensors.
        """
        assert self.capture.layout is not None
        merged = self.capture.layout.views(row)
        self.capture.finish()
        live = tensors_by_name(module, [*merged, *buffers])
        # Copies, since a forward pass may write to buffers; and Lightning takes the model off its device after a fit.
        merged |= {name: buffer.to(local(live[name]).device, copy=True) for name, buffer in buffers.items()}
        with swapped_weights(live, merged, before=partial(reshard, module)):
            self._recalibration.apply_(module)
            yield

    def buffers(self, name: str | None = None) -> dict[str, Tensor]:
        """Floating-point buffers that go with a merge: those of the newest snapshot, or of the latest average."""
        return self.capture.shadow_buffers if is_average(self.rule(name)) else self.capture.buffers

    def diagnostics(self, coefficients: Mapping[int, float], row: Sequence[Tensor], step: int) -> dict[str, float]:
        """Numbers about the primary merge, as `rows` gave it; for all ranks to call at the same time."""
        rule = self.rule()
        if is_average(rule):
            return {"span_steps": rule.span_steps(step)}
        used = [step for step, value in coefficients.items() if value != 0]
        spread = self.capture.spread(list(coefficients.values()), row)
        return {"num_snapshots": float(len(used)), "span_steps": float(used[-1] - used[0]), "spread": spread}

    def drop_unusable(self) -> None:
        """Leaves out snapshots that cannot be used on some rank, and says so; for all ranks to call at the same time.

        Raises:
            OSError: If there are any, and the directory they are in is a strict one.
        """
        for problem in self.capture.drop_unusable():
            self._messages.warn(f"a snapshot is left out of the merges: {problem}")

    def drop_nonfinite(self, step: int) -> None:
        """Begins averages anew that hold NaN or inf on some rank; for all ranks to call at the same time."""
        for name in self.capture.drop_nonfinite_shadows():
            self._messages.warn(
                f"no merge {name!r} at step {step}: its average holds NaN or inf, and begins anew with the next step"
            )

    def _usable_coefficients(self, name: str, step: int) -> dict[int, float] | None:
        """Those of a merge; none of an average; None where its rule fails now."""
        try:
            return {} if is_average(self.rule(name)) else self.coefficients(name)
        except ValueError as error:
            # A rule that never worked is a mistake to mend; one that worked before must not end a long run.
            if name not in self.proven_rules:
                raise
            self._messages.warn(f"no merge {name!r} at step {step}: {error}")
            return None
