"""Fits the numbers of `prediction.river` on the anneals of the annealing benchmark, and on nothing else.

    python benchmarks/forecast/fit.py    # writes src/merge_callback/prediction/river.json

- ``kappa``: least mean absolute error of the forecasts, over the decays that begin after the first quarter of the runs
  with AdamW, each span and run weighing the same. Rings of ten points over as many steps as the decay takes.
- ``ring``, ``history``: of intervals. The part of the noise is what nine in ten errors stay below, in the noise, when
  no river has to be foreseen: decays over 10 and 20 % that end now, by rings over 10 and 20 %. The part of the fall is
  what is then needed for nine in ten of the forecasts.
- ``unlike_adam``: how many times wider intervals are with optimizers that are not Adam's: the least number with which
  nine in ten decays of the run with Muon are in them. Added when that run had missed its limits; it is the only number
  that a run of this benchmark has chosen, and what the report says of Muon's intervals since is no evidence for them.
- ``correlation_steps``: least squares over merges of 3, 5, 10 and 20 points of one window, sma and wma, whose loss is
  river and noise.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
from outcomes import Outcome, by_river, outcomes

from merge_callback.capture.phase import CaptureSchedule, needs_thinning
from merge_callback.merging.rules import merge_coefficients, resolve_rule
from merge_callback.merging.windows import Window
from merge_callback.prediction.fitted import Fitted, Widths
from merge_callback.prediction.records import read_records
from merge_callback.prediction.river import Decay, River, Seen, composition, river
from merge_callback.prediction.validations import StableValidation

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
    decay: Decay
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


def records_of(run: str) -> tuple[dict, dict[int, dict], dict[int, Seen]]:
    """A trunk's record, its points by step, and the merges of its validations by step."""
    info = json.loads((ANNEALING / run / "trunk.json").read_text())
    points = {point["step"]: point for point in json.loads((ANNEALING / run / "proxies.json").read_text())}
    validated = [v for v in info["validations"] if v["merged"] is not None]
    merges = {v["step"]: seen(default_ring(v["step"]), Window(span=0.1), v["step"], v["merged"]) for v in validated}
    return info, points, merges


def rivers(now: int, live: float, losses: dict[str, float], span_steps: int, merges: dict[int, Seen]) -> list[River]:
    """The rivers of ring and history, and of the history alone, from a ring of ten points over so many steps."""
    steps = sorted(now - round(round(j * GRID / 10) * span_steps / GRID) for j in range(10))
    ring = [seen(steps, rule, now, losses[f"{rule} N=10"]) for rule in ("sma", "wma")]
    history = [merge for step, merge in merges.items() if step <= now]
    return [found for used in (ring, ring[:1]) if (found := river(now, live, used, history, span_steps)) is not None]


def cases(run: str) -> list[Case]:
    """Decays of a trunk that begin now, after its first quarter."""
    info, points, merges = records_of(run)
    found = []
    for record in read_records(ANNEALING / run / "anneals.jsonl"):
        now = record.start_step
        if record.step in points and now > info["num_steps"] / 4:
            span = next(s for s in points[record.step]["spans"] if s["span_steps"] == record.span_steps)
            both = rivers(now, span["live_at_start"], span["forecast"], record.span_steps, merges)
            decay = Decay(now, record.span_steps, record.shape)
            found.append(Case(run, decay, record.annealed[METRIC], *both))
    return found


def matched_cases(run: str) -> list[Case]:
    """Decays of a trunk that end now, after its first quarter, with rings over each of the windows."""
    info, points, merges = records_of(run)
    found = []
    for record in read_records(ANNEALING / run / "anneals.jsonl"):
        now = record.step
        if now in points and now > info["num_steps"] / 4:
            decay = Decay(record.start_step, record.span_steps, record.shape)
            for span in points[now]["spans"]:
                both = rivers(now, points[now]["live"], span["matched"], span["span_steps"], merges)
                found.append(Case(run, decay, record.annealed[METRIC], *both))
    return found


def fitted_kappa(known: list[Case]) -> float:
    """The kappa whose forecasts have the least mean absolute error, each span and run weighing the same."""
    kinds: dict[tuple[str, float], list[Case]] = {}
    for case in known:
        kinds.setdefault((case.run, round(case.decay.span, 1)), []).append(case)

    def error(kappa: float) -> float:
        return mean(mean(abs(c.of_ring.annealed(c.decay, kappa) - c.annealed) for c in kind) for kind in kinds.values())

    return min((round(0.005 * k, 3) for k in range(80)), key=error)


def widths(known: list[Case], matched: list[Case], name: str, kappa: float) -> Widths:
    """The widths of intervals that hold nine errors in ten."""

    def errors(some: list[Case]) -> list[tuple[float, float, float]]:
        """Error, fall and noise of every case."""
        found = [(case, getattr(case, name)) for case in some]
        return [(abs(r.annealed(c.decay, kappa) - c.annealed), r.fall(c.decay), r.noise) for c, r in found]

    noise = round(float(np.quantile([error / noise for error, _, noise in errors(matched)], LEVEL)), 3)
    forecasts = errors(known)
    share = (round(0.005 * k, 3) for k in range(200))
    held = (s for s in share if mean(e <= Widths(s, noise).half(fall, v) for e, fall, v in forecasts) >= LEVEL)
    return Widths(next(held), noise)


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


def fitted_factor() -> float:
    """How many times wider intervals have to be for nine in ten of the decays with Muon, with a ring and without."""
    late = [replace(each, history=_of_adam(each)) for each in outcomes("muon") if each.is_late]

    def needed(with_ring: bool) -> float:
        made = [(each, said) for each in late if (said := by_river(each, with_ring=with_ring)) is not None]
        errors = [abs(said.value - each.annealed) / (said.high - said.value) for each, said in made]
        return float(np.quantile(errors, LEVEL, method="higher"))

    return round(max(needed(True), needed(False)), 1)


def _of_adam(outcome: Outcome) -> tuple[StableValidation, ...]:
    return tuple(replace(each, optimizer="") for each in outcome.history)


def fit() -> Fitted:
    """All numbers."""
    known, matched = ([case for run in RUNS for case in find(run)] for find in (cases, matched_cases))
    kappa = fitted_kappa(known)
    return Fitted(
        kappa=kappa,
        correlation_steps=float(fitted_correlation()),
        ring=widths(known, matched, "of_ring", kappa),
        history=widths(known, matched, "of_history", kappa),
        unlike_adam=fitted_factor(),
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
    for name in ("of_ring", "of_history"):
        for span in (0.1, 0.2):
            kind = [case for case in known if round(case.decay.span, 1) == span]
            errors = [getattr(c, name).annealed(c.decay, numbers.kappa) - c.annealed for c in kind]
            off = f"MAE {mean(map(abs, errors)):.4f}, bias {mean(errors):+.4f}"
            print(f"{name}, {span:.0%}: {off}, {len(errors)} decays")


if __name__ == "__main__":
    main()
