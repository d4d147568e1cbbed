"""Ranks recipes before any of them is annealed; rules written before the runs. Records: records/ranking/.

    python benchmarks/forecast/ranking.py    # eight recipes, the best three of them again: an hour on two cores

**Question.** Recipes (rate, weight decay, batch size, width) are compared in short runs at a constant rate. The live
loss punishes those with much noise, which a decay would take away. Which number at the end of the constant rate ranks
them as their annealed losses do: live, merged, or the forecast?

**Runs.** Eight recipes of the demo's model, 1,360 steps at a constant rate after a warmup of 100, then a linear decay
over 151 steps (a tenth of all). The three with the lowest annealed loss run again with another seed. Known at the start
of the decay: live loss, both merges of the ring, the forecast of `prediction.forecasts`.

**Statistics.** Spearman's and Kendall's correlation with the annealed loss, over all runs; 90 % intervals from 2,000
draws of the runs with replacement (draws whose runs are all alike are drawn again). How often the best of the drawn
recipes by live, merged and forecast loss is the best by annealed loss.

**Goal.** Spearman's correlation of the forecast at least .95, and above that of the live loss.
"""

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from merge_callback import MergeCallback
from merge_callback.apps.demo.training import CheckpointAt
from merge_callback.prediction.records import read_records

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "annealing"))
from run import write
from shared import about
from training import RECORDS, RULES, WORK, MergesOfValidations, prepared, run_branch
from trunks import Trunk

HERE = Path(__file__).parent
FOLDER = RECORDS / "ranking"
NUM_STEPS = 1360
SPAN_STEPS = 151
SEEDS = (11, 12)
# Of the recipes, this many run with the second seed.
NUM_AGAIN = 3
RECIPES = {
    "base": (),
    "half rate": ("model.learning_rate=1.5e-3",),
    "double rate": ("model.learning_rate=6e-3",),
    "weight decay .4": ("model.weight_decay=0.4",),
    "batch 8": ("data.batch_size=8",),
    "batch 24, double rate": ("data.batch_size=24", "model.learning_rate=6e-3"),
    "width 80, double rate": ("model.width=80", "model.learning_rate=6e-3"),
    "width 112, half rate": ("model.width=112", "model.learning_rate=1.5e-3"),
}


def record_of(recipe: str, seed: int) -> Path:
    """Where the record of a run is."""
    return FOLDER / f"{recipe.replace(', ', '-').replace(' ', '_')}-seed{seed}.json"


def run_recipe(recipe: str, seed: int) -> float:
    """Trains a recipe at its rate, decays it, and writes its record; returns the annealed loss."""
    path = record_of(recipe, seed)
    if not path.exists():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        folder = WORK / "ranking" / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        trunk = Trunk(NUM_STEPS, (*RECIPES[recipe], f"demo.seed={seed}"))
        merge = MergeCallback(merges={name: name for name in RULES})
        noted = MergesOfValidations(merge)
        run = prepared(trunk, merge, noted, CheckpointAt(folder, {NUM_STEPS}))
        run.fit()
        anneals = folder / "anneals.jsonl"
        run_branch(trunk, folder, anneals, start=NUM_STEPS, span_steps=SPAN_STEPS, shape="linear")
        found: dict[str, Any] = {
            **about(),
            "recipe": recipe,
            "seed": seed,
            "overrides": list(trunk.overrides),
            "validations": noted.validations,
            "start_step": NUM_STEPS,
            "span_steps": SPAN_STEPS,
            "annealed": read_records(anneals)[-1].annealed["val_loss"],
        }
        write(path, found)
        print(f"{path.stem}: annealed {found['annealed']:.4f}", flush=True)
    annealed: float = json.loads(path.read_text())["annealed"]
    return annealed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    first, second = SEEDS
    with ProcessPoolExecutor(arguments.at_once) as pool:
        annealed = dict(zip(RECIPES, pool.map(run_recipe, RECIPES, [first] * len(RECIPES)), strict=True))
        best = sorted(annealed, key=annealed.__getitem__)[:NUM_AGAIN]
        list(pool.map(run_recipe, best, [second] * NUM_AGAIN))


if __name__ == "__main__":
    main()
