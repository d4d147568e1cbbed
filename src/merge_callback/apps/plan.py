"""Compares decays of the learning rate that a run could have: where would the loss end?

The command reads a checkpoint of the run at a constant rate, or the newest one in a folder. It must hold the state of a
MergeCallback that has validated its merge. The forecasts need no real anneal; records of real anneals of the run shift
them.

  merge-callback plan checkpoints/last.ckpt
  merge-callback plan runs/large --budget 20000 --shapes linear 1-sqrt --spans 0.1 0.2 --records anneals.jsonl

Arguments: RUN_OR_CHECKPOINT; --budget STEPS, how many steps are left for the rest of the run and its decay, without
which all decays begin now; --shapes, of linear, 1-sqrt, cosine; --spans, shares of all steps at the end of the decay;
--metric NAME, by default the first loss; --records FILE; --output FILE, the picture, by default plan.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from merge_callback.apps.wrong_call import wrong_calls
from merge_callback.checkpoints.stable_run import METADATA, stable_run_in_file
from merge_callback.merging.decays import DECAY_SHAPES
from merge_callback.prediction.forecasts import NoForecastError, current_river
from merge_callback.prediction.planning import Option, describe, later, option, plan, verdict
from merge_callback.prediction.records import AnnealRecord, read_records
from merge_callback.prediction.validations import StableValidation
from merge_callback.utilities.tables import NOTHING, number, text_table
from merge_callback.validation.directions import first_loss_by_name

SPANS = (0.05, 0.1, 0.2)
MORE_STEPS = 1000


def history_in(source: Path) -> tuple[str | None, list[StableValidation]]:
    """Returns identifier and validations of the run in a checkpoint, or in the newest checkpoint below a folder.

    Raises:
        ValueError: If there is none.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give a checkpoint of a run, or a folder that has one")
    found = [source]
    if source.is_dir():
        found = [*source.rglob("*.ckpt"), *source.rglob(METADATA)]
        # Links may lead nowhere.
        found = sorted(filter(Path.exists, found), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in found:
        try:
            run, history = stable_run_in_file(file, str(file))
        except ValueError:
            if file == source:
                raise
            continue
        if history:
            return run, history
    raise ValueError(f"{source} holds no validation of a merge at a constant rate; it needs a run with MergeCallback")


def options_table(options: Sequence[Option], metric: str) -> str:
    """Returns a text table of the decays and where the loss would end."""
    rows = []
    for each in options:
        cells = [each.decay.shape, f"{each.decay.span:.0%}", str(each.decay.start), str(each.decay.end)]
        if each.forecast is None:
            rows.append([*cells, NOTHING, NOTHING])
        else:
            made = each.forecast.prediction
            rows.append([*cells, number(made.value), f"{number(made.low)} to {number(made.high)}"])
    header = ["shape", "span", "from step", "to step", metric, "nine times in ten"]
    return text_table(header, rows, title="If the rate decayed, by its end")


def waiting(
    history: Sequence[StableValidation], metric: str, options: Sequence[Option], anneals: Sequence[AnnealRecord]
) -> str:
    """Returns in words what more steps at the constant rate would buy before a decay."""
    told = [each for each in options if each.forecast is not None and each.decay.start == history[-1].step]
    if not told:
        return ""
    best = min(told, key=lambda each: each.forecast.prediction.value if each.forecast else 0.0)
    after = option(history, metric, later(best.decay, MORE_STEPS), anneals)
    assert best.forecast is not None
    if after.forecast is None:
        return f"{MORE_STEPS} more steps at the constant rate are beyond what can be foretold: {after.reason}"
    first, second = best.forecast.prediction, after.forecast.prediction
    gain = number(first.value - second.value, "+")
    doubt = "" if second.high < first.low else ", which is less than the intervals are wide"
    return f"{MORE_STEPS} more steps at the constant rate before the decay would gain {gain}{doubt}"


def run(arguments: Sequence[str] | None = None) -> None:
    """Prints the table and writes the picture."""
    parser = argparse.ArgumentParser("merge-callback plan", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--shapes", nargs="+", choices=list(DECAY_SHAPES), default=list(DECAY_SHAPES))
    parser.add_argument("--spans", nargs="+", type=float, default=list(SPANS))
    parser.add_argument("--metric")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--output", type=Path, default=Path("plan.png"))
    asked = parser.parse_args(arguments)
    with wrong_calls():
        from merge_callback.apps.figures import plot_plan

        if asked.budget is not None and asked.budget < 1:
            raise ValueError(f"--budget must be a number of steps, got {asked.budget}")
        if wrong := [span for span in asked.spans if not 0 < span < 1]:
            raise ValueError(f"--spans must be shares of the steps in (0, 1), got {wrong[0]}")
        identity, history = history_in(asked.source)
        metric = chosen_metric(history, asked.metric)
        try:
            river = current_river(history, metric)
        except NoForecastError as error:
            raise ValueError(f"nothing can be foretold at step {history[-1].step}: {error}") from error
        if asked.records is not None and not asked.records.exists():
            raise ValueError(f"--records {asked.records} does not exist")
        known = read_records(asked.records) if asked.records is not None else []
        own = [each for each in known if each.run == identity and each.start_step <= history[-1].step]
        chosen = {"shapes": asked.shapes, "spans": asked.spans, "budget": asked.budget}
        options = plan(history, metric, anneals=own, **chosen)
        if not options:
            raise ValueError(f"--budget {asked.budget} is shorter than every decay; give smaller --spans")
        lines = [
            f"At step {river.now}: live {number(history[-1].live[metric])}, of which {number(river.noise)} is noise"
            f" that a decay takes away; in {MORE_STEPS} more steps the river changes by"
            f" {number(river.loss(river.now + MORE_STEPS) - river.level, '+')}",
            options_table(options, metric),
            f"{verdict(options)}.",
            waiting(history, metric, options, own),
            *sorted({f"{describe(o.decay)}: {o.reason}" for o in options if o.reason}),
        ]
        sys.stdout.write("\n".join(filter(None, lines)) + "\n")
        plot_plan(history, metric, options).savefig(asked.output)
        sys.stdout.write(f"Picture: {asked.output}\n")


def chosen_metric(history: Sequence[StableValidation], asked: str | None) -> str:
    """Returns the metric that was asked for, or the first loss.

    Raises:
        ValueError: If the run has no such metric.
    """
    names = list(history[-1].merged)
    if asked is not None and asked not in names:
        raise ValueError(f"--metric {asked!r} is not logged with a merge; there are: {', '.join(names)}")
    if asked is None and not names:
        raise ValueError("the last validation has no merged metric")
    return asked or first_loss_by_name(names) or names[0]
