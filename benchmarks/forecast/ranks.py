"""How well live, merged and forecast losses rank recipes, from the records of ranking.py."""

import json
from dataclasses import dataclass

import numpy as np
from outcomes import METRIC, RECORDS, validations
from scipy.stats import kendalltau, spearmanr

from merge_callback.prediction.forecasts import forecast
from merge_callback.prediction.river import Decay

NUM_DRAWS = 2000
GOAL = 0.95


@dataclass(frozen=True)
class Ranked:
    """A run of a recipe: what was known when its decay began, and what came."""

    recipe: str
    seed: int
    live: float
    merged: float
    forecast: float
    low: float
    high: float
    annealed: float


def ranked_runs() -> list[Ranked]:
    """All runs, the best first."""
    found = []
    for path in (RECORDS / "ranking").glob("*.json"):
        record = json.loads(path.read_text())
        known = validations(record)
        decay = Decay(record["start_step"], record["span_steps"], "linear")
        said, now = forecast(known, METRIC, decay).prediction, known[-1]
        values = now.live[METRIC], now.merged[METRIC], said.value, said.low, said.high, record["annealed"]
        found.append(Ranked(record["recipe"], record["seed"], *values))
    return sorted(found, key=lambda run: run.annealed)


def correlations(runs: list[Ranked], kind: str) -> tuple[float, float]:
    """Spearman's and Kendall's correlation of a kind of loss with the annealed one."""
    said, came = [getattr(run, kind) for run in runs], [run.annealed for run in runs]
    return float(spearmanr(said, came).statistic), float(kendalltau(said, came).statistic)


def drawn(runs: list[Ranked]) -> list[list[Ranked]]:
    """Draws of the runs with replacement, of at least two different ones, always the same."""
    rng = np.random.default_rng(0)
    draws: list[list[Ranked]] = []
    while len(draws) < NUM_DRAWS:
        draw = [runs[place] for place in rng.integers(len(runs), size=len(runs))]
        if len({run.annealed for run in draw}) > 1:
            draws.append(draw)
    return draws


def finds_best(draw: list[Ranked], kind: str) -> bool:
    """Whether the run with the lowest loss of a kind is the one with the lowest annealed loss."""
    return min(draw, key=lambda run: getattr(run, kind)) is min(draw, key=lambda run: run.annealed)


def rank_rows(runs: list[Ranked]) -> list[list[str]]:
    """A row for each kind of loss."""
    draws, rows = drawn(runs), []
    for kind in ("live", "merged", "forecast"):
        cells = [kind]
        for place, now in enumerate(correlations(runs, kind)):
            low, high = np.quantile([correlations(draw, kind)[place] for draw in draws], (0.05, 0.95))
            cells.append(f"{now:.3f} ({low:.2f} to {high:.2f})")
        rows.append([*cells, f"{np.mean([finds_best(draw, kind) for draw in draws]):.0%}"])
    return rows


def run_rows(runs: list[Ranked]) -> list[list[str]]:
    """A row for each run."""
    return [
        [
            run.recipe,
            str(run.seed),
            f"{run.live:.4f}",
            f"{run.merged:.4f}",
            f"{run.forecast:.4f} ({run.low:.4f} to {run.high:.4f})",
            f"{run.annealed:.4f}",
        ]
        for run in runs
    ]


def verdict(runs: list[Ranked]) -> str:
    """Whether the goal was reached, in words."""
    live, said = correlations(runs, "live")[0], correlations(runs, "forecast")[0]
    is_above = "reached" if said > live else "missed"
    return (
        f"Goal: Spearman's correlation of the forecast >= {GOAL}: {'reached' if said >= GOAL else 'missed'};"
        f" above that of the live loss: {is_above}."
    )
