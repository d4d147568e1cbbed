"""Writes one HTML page about a run: its figures and tables, and those of its anneals.

The command reads the folder of a run, with the ``metrics.csv`` of Lightning's CSVLogger and any records of anneals in
it. A file or folder that holds only records works too. An anneal is a real decay of the learning rate to zero.

  merge-callback report outputs/demo/2026-11-26_12-00-00
  merge-callback report anneals.jsonl --metric val_loss --output anneals.html

Arguments: RUN_OR_RECORDS, the folder of a run, its metrics.csv, or records of anneals; --metric NAME, by default the
first loss; --output FILE, by default report.html in the folder that is read.
"""

import argparse
import base64
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from html import escape
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from merge_callback.apps.runs import Validation, merged_metrics, read_validations, validation_table
from merge_callback.apps.wrong_call import wrong_calls
from merge_callback.prediction.assessment import (
    Assessed,
    Case,
    cases_of,
    errors_by_span,
    from_earlier,
    from_earlier_and_others,
    from_other_runs,
    summarise,
)
from merge_callback.prediction.bias import recovered_share
from merge_callback.prediction.records import AnnealRecord, records_and_problems
from merge_callback.utilities.checks import check_installed
from merge_callback.utilities.tables import number
from merge_callback.validation.directions import first_loss_by_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Found:
    """The contents of a folder or file: the validations of one run, and records of anneals."""

    source: Path
    metric: str
    validations: list[Validation]
    records: list[AnnealRecord]
    other_metrics: list[str]
    # What is wrong with lines that are no records.
    left_out: list[str] = field(default_factory=list)


def find(source: Path, metric: str | None = None) -> Found:
    """Reads a run's folder, a ``metrics.csv``, or a file or folder of records.

    Args:
        source: Where to look, in folders below it too.
        metric: Name of the metric; None takes the first loss that was recorded with anneals or has a merged value. If
            there is no loss, it takes the first metric.

    Raises:
        ValueError: If the source does not exist, there is nothing to report on, or nothing for that metric.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give the folder of a run, its metrics.csv, or records of anneals")
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    records, left_out = _records_in(files, is_folder=source.is_dir())
    metrics_file = _newest([file for file in files if file.name == "metrics.csv"])
    with_merge = merged_metrics(metrics_file) if metrics_file else []
    known = list(dict.fromkeys([*(name for record in records for name in record.annealed), *with_merge]))
    if not known or (metric is not None and metric not in known):
        there = f"; there are: {', '.join(known)}" if known else ": neither records of anneals nor a merged metric"
        raise ValueError(f"{source} holds nothing to report on{there}")
    metric = metric or first_loss_by_name(known) or known[0]
    validations = read_validations(metrics_file, metric) if metrics_file and metric in with_merge else []
    return Found(source, metric, validations, records, [name for name in known if name != metric], left_out)


def _records_in(files: Sequence[Path], is_folder: bool) -> tuple[list[AnnealRecord], list[str]]:
    """Returns the records in files, and what is wrong with lines of files in a folder, which may be somebody else's."""
    records, left_out = [], []
    for file in files:
        if file.suffix == ".jsonl":
            found, problems = records_and_problems(file)
            if problems and not is_folder:
                raise ValueError(problems[0])
            records += found
            left_out += problems[:1]
    return records, left_out


def _newest(metrics_files: Sequence[Path]) -> Path | None:
    """Returns the first file, or of Lightning's versions of that run the last one, which began last."""
    if not metrics_files:
        return None
    folder = metrics_files[0].parent
    versions = [file for file in metrics_files if file.parent.parent == folder.parent] if _version(folder) >= 0 else []
    return max(versions, key=lambda file: _version(file.parent), default=metrics_files[0])


def _version(folder: Path) -> int:
    number = folder.name.removeprefix("version_")
    return int(number) if number != folder.name and number.isdecimal() else -1


def page(found: Found) -> str:
    """Returns the report as one HTML page that needs no other file.

    Raises:
        ModuleNotFoundError: If matplotlib, an extra, is not installed.
    """
    check_installed("matplotlib", "dashboards")
    from merge_callback.apps.figures import plot_errors, plot_predicted_against_actual, plot_validations

    cases = cases_of(found.records, found.metric)
    assessed = {
        "from earlier branches of the run": from_earlier(cases),
        "from other runs": from_other_runs(cases),
        "from both": from_earlier_and_others(cases) if len({case.run for case in cases}) > 1 else [],
    }
    assessed = {label: several for label, several in assessed.items() if several}
    parts = [f"<h1>Merges and anneals: {escape(found.metric)}</h1>", f"<p>{escape(summary(found))}</p>", _about(found)]
    if found.other_metrics:
        parts.append(f"<p>There are also {escape(', '.join(found.other_metrics))}: <code>--metric NAME</code>.</p>")
    if found.left_out:
        parts.append(f"<p>Left out: {escape('; '.join(found.left_out))}</p>")
    if found.validations:
        anneals = [record for record in found.records if record.shape == "linear"] or found.records
        drawn = partial(plot_validations, found.validations, found.metric, found.source.name, anneals)
        parts.append(_image(drawn, f"live, merged, predicted and annealed {found.metric} over optimizer steps"))
    if cases:
        parts += ["<h2>How well anneals were predicted</h2>", _summary_table(cases, assessed), _EXPLAINED]
    if sum(map(len, assessed.values())) > 1:
        drawn = partial(plot_predicted_against_actual, assessed, found.metric)
        parts.append(_image(drawn, f"predicted against annealed {found.metric}"))
        drawn = partial(
            plot_errors, errors_by_span(assessed), "unit of the metric", "length of the decay, share of steps"
        )
        parts.append(_image(drawn, "errors of predictions by length of the decay"))
    if found.records:
        parts += ["<h2>Every anneal</h2>", _anneal_table(found.records, found.metric, assessed)]
    if found.validations:
        parts += [
            "<h2>Every validation</h2>",
            _table(*validation_table(found.validations)),
        ]
    return _PAGE.format(title=escape(f"Merges and anneals: {found.metric}"), body="\n".join(parts))


def summary(found: Found) -> str:
    """Returns in one sentence where the run stands: live, merged, predicted, forecast and annealed at its end."""
    anneals = [record for record in found.records if found.metric in record.annealed]
    if not found.validations:
        return f"{len(anneals)} real anneals of {len({record.run for record in anneals})} runs, and no run of its own."
    last, metric = found.validations[-1], found.metric
    clauses = [f"At step {last.step}, {metric} is {number(last.live)} live"]
    if last.merged is not None:
        clauses.append(f"{number(last.merged)} merged")
    if (predicted := last.predicted) is not None:
        interval = f"{number(predicted.low)} to {number(predicted.high)}"
        clauses.append(f"{number(predicted.value)} as predicted if it had been annealed until then ({interval})")
    if (forecast := last.forecast) is not None:
        interval = f"{number(forecast.low)} to {number(forecast.high)}"
        end = "" if last.forecast_end is None else f" up to step {last.forecast_end:.0f}"
        clauses.append(f"{number(forecast.value)} as forecast at the end of a decay{end} ({interval})")
    if (real := next((each for each in anneals if _is_of_run(each, metric, last)), None)) is not None:
        clauses.append(f"{number(real.annealed[metric])} really annealed from step {real.start_step} on")
    *firsts, end = clauses
    return f"{', '.join(firsts)}{' and ' if firsts else ''}{end}."


def _is_of_run(record: AnnealRecord, metric: str, last: Validation) -> bool:
    """Returns whether an anneal ended at this validation of its run; the records may be of several runs."""
    outcome = record.outcome(metric)
    return record.step == last.step and outcome is not None and math.isclose(outcome.live, last.live, rel_tol=1e-6)


def _about(found: Found) -> str:
    """Returns where and when the report was made, with which versions, and the run's config if there is one."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("merge-callback", "torch", "lightning"))
    now = datetime.now(tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    lines = [f"<p>Made of {escape(str(found.source))} on {now}, with {escape(versions)}.</p>"]
    configs = [found.source / ".hydra" / "config.yaml", *sorted(found.source.rglob("hparams.yaml"))]
    config = next((file for file in configs if file.is_file()), None) if found.source.is_dir() else None
    text = config.read_text(encoding="utf-8", errors="replace").strip() if config is not None else ""
    if config is not None and text not in ("", "{}"):
        lines.append(f"<details><summary>{escape(config.name)}</summary><pre>{escape(text)}</pre></details>")
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> None:
    """Writes the report for the given arguments of the command."""
    parser = argparse.ArgumentParser(prog="merge-callback report", add_help=False)
    parser.add_argument("source", type=Path, metavar="RUN_OR_RECORDS")
    parser.add_argument("--metric")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    folder = options.source if options.source.is_dir() else options.source.parent
    output = options.output or folder / "report.html"
    with wrong_calls():
        content = page(find(options.source, options.metric))
        output.write_text(content, encoding="utf-8")
    sys.stdout.write(f"{output}\n")


def _summary_table(cases: Sequence[Case], assessed: Mapping[str, Sequence[Assessed]]) -> str:
    rows = []
    kinds = groupby(sorted(cases, key=lambda c: (c.shape, c.span)), key=lambda c: (c.shape, round(c.span, 2)))
    for (shape, span), several in kinds:
        of_kind = list(several)
        shares = [recovered_share(case.outcome) for case in of_kind]
        row = [f"{shape}, {span:.0%}", str(len(of_kind)), f"{sum(shares) / len(shares):.2f}"]
        for label, all_assessed in assessed.items():
            summary = summarise([each for each in all_assessed if each.case in of_kind])
            if summary.num_cases:
                numbers = f"{summary.mean_absolute:.4f}", f"{summary.bias:+.4f}", f"{summary.worst:.4f}"
                rows.append([*row, label, str(summary.num_cases), *numbers, f"{summary.inside:.0%}"])
        if not any(line[0] == row[0] for line in rows):
            rows.append([*row, "uncalibrated", *["-"] * 5])
    header = ["decay", "anneals", "recovered", "predicted", "times", "MAE", "bias", "worst", "inside the interval"]
    return _table(header, rows)


def _anneal_table(records: Sequence[AnnealRecord], metric: str, assessed: Mapping[str, Sequence[Assessed]]) -> str:
    predictions = {
        (label, each.case.run, each.case.step, each.case.span, each.case.shape): each
        for label, several in assessed.items()
        for each in several
    }
    rows = []
    for record in sorted(records, key=lambda r: (r.run, r.step, r.span_steps, r.shape)):
        if metric not in record.annealed:
            continue
        known = record.outcome(metric)
        at_end = [f"{known.live:.4f}", f"{known.merged:.4f}"] if known is not None else ["-", "-"]
        row = [record.run, str(record.step), str(record.span_steps), record.shape, *at_end]
        for label in assessed:
            each = predictions.get((label, record.run, record.step, record.span, record.shape))
            row += [f"{each.prediction.value:.4f}", f"{each.error:+.4f}"] if each else ["-", "-"]
        rows.append([*row, f"{record.annealed[metric]:.4f}"])
    header = ["run", "step", "steps of decay", "shape", "live", "merged"]
    return _table([*header, *(name for label in assessed for name in (label, "error")), "annealed"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _image(draw: Callable[[], "Figure"], what: str) -> str:
    """Returns the HTML of a figure, in a light and a dark version to match the page."""
    from merge_callback.apps.figures import light_and_dark

    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in light_and_dark(draw))
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<div class="wide"><picture>{source}<img alt="{escape(what)}" src="{light}"></picture></div>'


_EXPLAINED = """<p>recovered: mean share of the decay's gain that the merge had; predicted: branches that the
predictions were fitted to; times: number of predictions; MAE, bias, worst: mean absolute error, mean error (predicted
minus annealed) and largest absolute error, in the metric's unit; inside the interval: share of anneals inside their
90 % interval.</p>"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
:root {{ --page: #fff; --text: #222; --line: #ddd; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14171a; --text: #e4e4e4; --line: #3a3f45; }} }}
body {{ font-family: sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem; }}
body {{ background: var(--page); color: var(--text); overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
pre {{ white-space: pre-wrap; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }}
td, th {{ padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; }}
img {{ max-width: 100%; height: auto; display: block; }}
/* On a phone, pictures keep a size at which they can be read, and are moved with a finger. */
@media (max-width: 40rem) {{ img {{ max-width: none; width: 40rem; }} }}
</style></head><body>
{body}
</body></html>
"""
