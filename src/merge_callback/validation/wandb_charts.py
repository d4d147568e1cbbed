"""One chart of live, merged, annealed and forecast values in Weights & Biases, which draws it without a click."""

from collections.abc import Mapping, Sequence
from typing import Any

from merge_callback.live.evaluate import LoggedValue
from merge_callback.validation.directions import first_loss
from merge_callback.validation.logged import LoggedName

# The lines of a chart, in this order, by the kind of logged value.
LINES = {"live": "live", "merged": "merged", "annealed": "annealed (predicted)", "forecast": "forecast"}


class WandbChart:
    """Draws the first metric of a callback's primary merge as a line chart of all kinds of values.

    A chart holds all its points, also those of before a resume. So it is drawn again only at the first, second, fourth,
    eighth ... validation, and at the end of the fit.

    Args:
        label: The callback's label in logged names.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._primary = ("merged", label)
        self._metric: str | None = None
        self._points: dict[str, list[tuple[int, float]]] = {}
        self._drawn = 0

    def add(self, live: Mapping[str, LoggedValue], logged: Mapping[LoggedName, LoggedValue], step: int) -> None:
        """Adds the values of a validation.

        Args:
            live: Metric -> live value.
            logged: The values that the callback logs at this validation.
            step: The step under which they are logged.
        """
        if self._metric is None:
            merged = {name.metric: value for name, value in logged.items() if (name.kind, name.label) == self._primary}
            self._metric = first_loss({metric: bool(value.higher_is_better) for metric, value in merged.items()})
        if self._metric is None:
            return
        found = {kind: logged.get(LoggedName(kind, self._label, self._metric)) for kind in LINES if kind != "live"}
        for kind, value in {"live": live.get(self._metric), **found}.items():
            if value is not None:
                self._points.setdefault(kind, []).append((step, float(value.value)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the points, to save them."""
        return {"metric": self._metric, "points": {kind: list(points) for kind, points in self._points.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._metric = state["metric"]
        self._points = {kind: list(points) for kind, points in state["points"].items()}

    def draw(self, loggers: Sequence[Any]) -> None:
        """Logs the chart to each logger, unless it was logged with the same points, or there is no logger."""
        kinds = [kind for kind in LINES if kind in self._points]
        num_points = sum(map(len, self._points.values()))
        if not loggers or num_points == self._drawn:
            return
        import wandb

        self._drawn = num_points
        xs, ys = ([[point[place] for point in self._points[kind]] for kind in kinds] for place in (0, 1))
        keys = [LINES[kind] for kind in kinds]
        chart = wandb.plot.line_series(xs, ys, keys, title=str(self._metric), xname="trainer/global_step")
        last = max(steps[-1] for steps in xs)
        for logger in loggers:
            logger.experiment.log({f"chart{self._label}/{self._metric}": chart, "trainer/global_step": last})
