"""Fits the numbers of `prediction.river` on the anneals of the annealing benchmark, and on nothing else.

    python benchmarks/forecast/fit.py    # writes src/merge_callback/prediction/river.json

- ``kappa``: least mean absolute error of the forecasts, over the decays that begin after the first quarter of the runs
  with AdamW, each span and run weighing the same. Rings of ten points over as many steps as the decay takes.
- ``ring``, ``history``: of those decays, the share of what the river falls that nine in ten errors stay below.
- ``floor``: the least fall among those decays, in the noise: flatter rivers were not measured.
- ``correlation_steps``: least squares over merges of 3, 5, 10 and 20 points of one window, sma and wma, whose loss is
  river and noise.
"""

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np

from merge_callback.capture.phase import CaptureSchedule, needs_thinning
from merge_callback.merging.rules import merge_coefficients, resolve_rule
from merge_callback.merging.windows import Window
from merge_callback.prediction import river as module
from merge_callback.prediction.records import read_records
from merge_callback.prediction.river import Fitted, River, Seen, composition, river

ROOT = Path(__file__).parents[2]
ANNEALING = ROOT / "benchmarks" / "annealing" / "records"
RUNS = ("seed0", "seed1", "seed2", "half_rate", "double_rate", "shakespeare", "larger", "experts")
METRIC = "val_loss"
GRID = 20
LEVEL = 0.9
WARMUP_STEPS = 100


@dataclass(frozen=True)
class Case:
    """One real anneal, and the river at its beginning: from ring and history, and from the history alone."""

    run: str
    decay: module.Decay
    annealed: float
    of_ring: River
    of_history: River


def default_ring(step: int, capacity: int = GRID, share: float = 0.1) -> list[int]:
    """Steps of the snapshots in a ring with an interval that doubles, as the trunks had it."""
    schedule, steps = CaptureSchedule(1), list[int]()
    for now in range(WARMUP_STEPS, step + 1):
        if schedule.take(now):
            if len(steps) == capacity and needs_thinning(steps, now, share * now):
                steps = steps[::-2][::-1]
                schedule.double(newest=steps[-1])
                if not schedule.take(now):
                    continue
            steps = [*steps, now][-capacity:]
    return steps


def seen(steps: list[int], rule: object, now: int, loss: float) -> Seen:
    """A merge of points as the river sees it."""
    found = composition(steps, merge_coefficients(resolve_rule(rule), steps), now, 1, 1.0)
    return Seen(now - found.age, found.squares, loss)


def cases(run: str) -> list[Case]:
    """Those of a trunk that begin after its first quarter."""
    info = json.loads((ANNEALING / run / "trunk.json").read_text())
    points = {point["step"]: point for point in json.loads((ANNEALING / run / "proxies.json").read_text())}
    validated = [v for v in info["validations"] if v["merged"] is not None]
    merges = {v["step"]: seen(default_ring(v["step"]), Window(span=0.1), v["step"], v["merged"]) for v in validated}
    found = []
    for record in read_records(ANNEALING / run / "anneals.jsonl"):
        if record.step not in points or record.start_step <= info["num_steps"] / 4:
            continue
        span = next(s for s in points[record.step]["spans"] if s["span_steps"] == record.span_steps)
        now = record.start_step
        steps = sorted(now - round(round(j * GRID / 10) * record.span_steps / GRID) for j in range(10))
        ring = [seen(steps, rule, now, span["forecast"][f"{rule} N=10"]) for rule in ("sma", "wma")]
        history = [merge for step, merge in merges.items() if step <= now]
        of_ring = river(now, span["live_at_start"], ring, history, record.span_steps)
        of_history = river(now, span["live_at_start"], ring[:1], history, record.span_steps)
        assert of_ring is not None
        assert of_history is not None
        decay = module.Decay(now, record.span_steps, record.shape)
        found.append(Case(run, decay, record.annealed[METRIC], of_ring, of_history))
    return found


def fitted_kappa(known: list[Case]) -> float:
    """The kappa whose forecasts have the least mean absolute error, each span and run weighing the same."""
    kinds: dict[tuple[str, float], list[Case]] = {}
    for case in known:
        kinds.setdefault((case.run, round(case.decay.span, 1)), []).append(case)

    def error(kappa: float) -> float:
        return mean(mean(abs(c.of_ring.annealed(c.decay, kappa) - c.annealed) for c in kind) for kind in kinds.values())

    return min((round(0.005 * k, 3) for k in range(80)), key=error)


def width(known: list[Case], rivers: str, kappa: float) -> float:
    """The share of what the river falls that nine in ten errors stay below."""
    errors = []
    for case in known:
        found: River = getattr(case, rivers)
        errors.append(abs(found.annealed(case.decay, kappa) - case.annealed) / found.fall(case.decay))
    return round(float(np.quantile(errors, LEVEL)), 3)


def floor(known: list[Case]) -> float:
    """The least that a river fell, in its noise."""
    return round(min(case.of_ring.fall(case.decay) / case.of_ring.noise for case in known), 3)


def fitted_correlation() -> int:
    """The distance in steps at which merges of one window, closer and closer, are described best."""

    def squares(distance: int) -> float:
        left = []
        for run in RUNS:
            info = json.loads((ANNEALING / run / "trunk.json").read_text())
            for point in json.loads((ANNEALING / run / "proxies.json").read_text()):
                if point["step"] <= info["num_steps"] / 4:
                    continue
                for span in point["spans"]:
                    left += _residuals(point["step"], span, distance)
        return float(np.mean(np.square(left)))

    return min(range(1, 21), key=squares)


def _residuals(end: int, span: dict, distance: int) -> list[float]:
    rows, losses = [], []
    for num, rule in product((3, 5, 10, 20), ("sma", "wma")):
        steps = sorted(end - round(round(j * GRID / num) * span["span_steps"] / GRID) for j in range(num))
        values = np.array(merge_coefficients(resolve_rule(rule), steps))
        apart = np.abs(np.subtract.outer(steps, steps))
        at = seen(steps, rule, end, 0.0).at
        rows.append([1.0, 2 * (1 - (at / end) ** -0.5), values @ np.exp(-apart / distance) @ values])
        losses.append(span["matched"][f"{rule} N={num}"])
    found, *_ = np.linalg.lstsq(np.array(rows), np.array(losses), rcond=None)
    return list(np.array(losses) - np.array(rows) @ found)


def fit(without: str | None = None) -> Fitted:
    """All numbers, also without one of the runs."""
    known = [case for run in RUNS if run != without for case in cases(run)]
    kappa = fitted_kappa(known)
    return Fitted(
        kappa=kappa,
        correlation_steps=float(fitted_correlation()),
        ring=width(known, "of_ring", kappa),
        history=width(known, "of_history", kappa),
        floor=floor(known),
    )


def main() -> None:
    """Writes the numbers, and prints what each would be without one of the runs."""
    numbers = fit()
    path = ROOT / "src" / "merge_callback" / "prediction" / "river.json"
    path.write_text(json.dumps(asdict(numbers), indent=1) + "\n")
    print(numbers)
    known = [case for run in RUNS for case in cases(run)]
    for run in RUNS:
        print(f"without {run}: kappa {fitted_kappa([case for case in known if case.run != run])}")
    for rivers in ("of_ring", "of_history"):
        for span in (0.1, 0.2):
            kind = [case for case in known if round(case.decay.span, 1) == span]
            errors = [getattr(c, rivers).annealed(c.decay, numbers.kappa) - c.annealed for c in kind]
            off = f"MAE {mean(map(abs, errors)):.4f}, bias {mean(errors):+.4f}"
            print(f"{rivers}, {span:.0%}: {off}, {len(errors)} decays")


if __name__ == "__main__":
    main()
