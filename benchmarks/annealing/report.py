"""Tables and pictures of the annealing benchmark, from its records, and the prior of `calibration="prior"`.

    python benchmarks/annealing/report.py          # all of it
    python benchmarks/annealing/report.py --quick  # the slice of `make benchmark-quick` beside its record

The first writes benchmarks/annealing/REPORT.md with its pictures, tables of docs/evidence.md and the README
between their marks, and src/merge_callback/prediction/prior.json.
Everything is computed from the records; read protocol.py first.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from scipy.stats import kendalltau

from merge_callback.apps.figures import plot_errors, plot_predicted_against_actual, plot_validations
from merge_callback.apps.runs import Validation
from merge_callback.prediction.assessment import (
    Assessed,
    Case,
    from_earlier,
    from_earlier_and_others,
    from_other_runs,
    summarise,
)
from merge_callback.prediction.bias import BranchOutcome, calibrate, gain_ratio, recovered_share
from merge_callback.prediction.records import AnnealRecord, read_records

sys.path.insert(0, str(Path(__file__).parent))
from protocol import NUM_SNAPSHOTS, SHAPES, SPANS, TRUNKS

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
RECORDS = FOLDER / "records"
METRIC = "val_loss"
MARKS = "<!-- annealing table: made by benchmarks/annealing/report.py -->", "<!-- end of annealing table -->"
# Of the pass rule, and the second one: proxy and window for each span of the decay.
PROXIES = {
    "SMA, 10 snapshots": {0.1: (0.1, "sma N=10"), 0.2: (0.2, "sma N=10")},
    "exponential, half-life 5 %": {0.1: (0.1, "half-life 0.5"), 0.2: (0.2, "half-life 0.3")},
}
LIMITS = {0.1: (0.003, 0.010), 0.2: (0.005, math.inf)}
SEEDS = ("seed0", "seed1", "seed2")
OTHER_OPTIMIZERS = ("sgd",)


class Trunk:
    """The records of one trunk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info = json.loads((RECORDS / name / "trunk.json").read_text())
        self.points = {point["step"]: point for point in json.loads((RECORDS / name / "proxies.json").read_text())}
        self.anneals = {
            (r.step, _share(r), r.shape): r
            for r in read_records(RECORDS / name / "anneals.jsonl")
            if r.step in self.points
        }

    def spans(self, step: int) -> dict[float, dict]:
        """What was evaluated at a point, by span of the window."""
        return {round(span["span_steps"] / step, 2): span for span in self.points[step]["spans"]}

    def is_late(self, step: int) -> bool:
        """Whether a branch that ends there ends after the first quarter of the trunk."""
        return step > self.info["num_steps"] / 4

    def cases(self, span: float, window: float, proxy: str, alignment: str = "matched") -> list[Case]:
        """Every anneal over this span, with the value of a proxy over a window."""
        cases = []
        for (step, of_span, shape), record in self.anneals.items():
            found = self.spans(step)[window]
            if of_span != span or proxy not in found[alignment]:
                continue
            live = self.points[step]["live"] if alignment == "matched" else found["live_at_start"]
            outcome = BranchOutcome(live, found[alignment][proxy], record.annealed[METRIC])
            cases.append(Case(self.name, step, span, shape, outcome))
        return cases


def _share(record: AnnealRecord) -> float:
    return round(record.span, 2)


class Benchmark:
    """All trunks that have all their records, but for some."""

    def __init__(self, without: Iterable[str] = ()) -> None:
        complete = [
            name
            for name in TRUNKS
            if name not in ("quick", *without)
            and all((RECORDS / name / f).exists() for f in ("proxies.json", "anneals.jsonl"))
        ]
        self.trunks = {name: Trunk(name) for name in complete}
        self.trunks = {n: t for n, t in self.trunks.items() if len(t.points) == len(TRUNKS[n].ends)}

    def is_late(self, case: Case) -> bool:
        """Whether a case lies after the first quarter of its trunk."""
        return self.trunks[case.run].is_late(case.step)

    def cases(self, span: float, window: float, proxy: str, alignment: str = "matched") -> list[Case]:
        """Those of all trunks."""
        return [case for trunk in self.trunks.values() for case in trunk.cases(span, window, proxy, alignment)]

    def assess(self, cases: list[Case], how: str, form: str = "ratio") -> list[Assessed]:
        """Predictions by earlier branches of the run, or by other runs' after their first quarter."""
        if how == "both":
            return from_earlier_and_others(cases, form)
        if how != "others":
            return from_earlier(cases, form, weighted=how == "weighted")
        return from_other_runs(cases, self.is_late, form)

    def late(self, assessed: Iterable[Assessed]) -> list[Assessed]:
        """Those that count for the pass rule."""
        return [each for each in assessed if self.is_late(each.case)]


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def number(value: float, form: str = "{:.4f}") -> str:
    """A number, or a dash."""
    return "-" if math.isnan(value) else form.format(value)


HOWS = {
    "earlier": "earlier branches of the same run, all alike",
    "weighted": "earlier branches of the same run, later ones count more",
    "others": "other runs only",
    "both": "earlier branches of the same run, and other runs worth two",
}


def main_rows(
    benchmark: Benchmark, shapes: tuple[str, ...] = SHAPES, runs: Iterable[str] | None = None
) -> list[list[str]]:
    """The table of the pass rule, for the anneals of all trunks or of some."""
    floor = {span: noise_floor(benchmark, span) for span in SPANS}
    rows = []
    for label, by_span in PROXIES.items():
        for span, (window, proxy) in by_span.items():
            for how, words in HOWS.items():
                cases = [case for case in benchmark.cases(span, window, proxy) if case.shape in shapes]
                late = benchmark.late(benchmark.assess(cases, how))
                summary = summarise([each for each in late if runs is None or each.case.run in runs])
                mean_limit, worst_limit = LIMITS[span]
                passed = summary.mean_absolute <= mean_limit and summary.worst <= worst_limit
                rows.append(
                    [
                        label,
                        f"{span:.0%}",
                        words,
                        str(summary.num_cases),
                        number(summary.mean_absolute),
                        number(summary.bias, "{:+.4f}"),
                        number(summary.worst),
                        number(summary.inside, "{:.0%}"),
                        number(summary.mean_absolute / floor[span], "{:.2f}"),
                        "reached" if passed else "not reached",
                    ]
                )
    return rows


MAIN_HEADER = [
    "merge",
    "decay",
    "calibrated on",
    "anneals",
    "MAE",
    "bias",
    "worst",
    "in interval",
    "MAE / seed noise",
    "rule",
]


def noise_floor(benchmark: Benchmark, span: float) -> float:
    """Seed-to-seed standard deviation of the annealed loss, root mean square over late points and shapes."""
    seeds = [benchmark.trunks[name] for name in SEEDS if name in benchmark.trunks]
    if len(seeds) < 2:
        return math.nan
    keys = [key for key in seeds[0].anneals if key[1] == span and seeds[0].is_late(key[0])]
    variances = [statistics.variance(trunk.anneals[key].annealed[METRIC] for trunk in seeds) for key in keys]
    return math.sqrt(statistics.mean(variances))


def section_trunks(benchmark: Benchmark) -> str:
    """What was run."""
    rows = []
    for name, trunk in benchmark.trunks.items():
        last = max(trunk.points)
        losses = [trunk.points[last]["live"], *(trunk.anneals[last, s, "linear"].annealed[METRIC] for s in SPANS)]
        settings = " ".join(trunk.info["overrides"]) or "the demo's"
        size, commit = f"{trunk.info['num_parameters']:,}", trunk.info["commit"][:7]
        counts = f"{len(trunk.anneals)} / {len(trunk.spans(last)[SPANS[0]]['matched'])}"
        rows.append([name, settings, size, str(last), counts, *(f"{loss:.3f}" for loss in losses), commit])
    header = ["trunk", "settings", "parameters", "steps", "anneals / merges evaluated"]
    header += ["live", "annealed, 10 %", "annealed, 20 %", "commit"]
    return table(header, rows)


def section_adamw(benchmark: Benchmark) -> str:
    """The pass rule's numbers among runs with one optimizer."""
    rest = Benchmark(without=OTHER_OPTIMIZERS)
    others = {
        name: [case for case in benchmark.cases(0.1, 0.1, "sma N=10") if case.run == name] for name in OTHER_OPTIMIZERS
    }
    curves = [
        f"{name}: " + ", ".join(f"{c.outcome.live:.2f} at step {c.step}" for c in cases if c.shape == "linear")
        for name, cases in others.items()
        if cases
    ]
    return f"{table(MAIN_HEADER, main_rows(rest))}\n\nLive loss of the rest: {'; '.join(curves)}."


def section_by_shape(benchmark: Benchmark) -> str:
    """The pass rule's numbers for each shape."""
    return "\n\n".join(
        f"{shape} decays:\n\n{table(MAIN_HEADER[:-1], [row[:-1] for row in main_rows(benchmark, (shape,))])}"
        for shape in SHAPES
    )


def section_held_out(benchmark: Benchmark) -> str:
    """The trunks that had not been seen when the second proxy and the weights were chosen."""
    runs = [name for name in benchmark.trunks if name not in (*SEEDS, "half_rate")]
    return table(MAIN_HEADER, main_rows(benchmark, runs=runs)) if runs else "None yet."


def section_first_quarter(benchmark: Benchmark) -> str:
    """Branches that end in the first quarter, from other runs."""
    rows = []
    for label, by_span in PROXIES.items():
        for span, (window, proxy) in by_span.items():
            assessed = benchmark.assess(benchmark.cases(span, window, proxy), "others")
            summary = summarise([each for each in assessed if not benchmark.is_late(each.case)])
            numbers = number(summary.mean_absolute), number(summary.bias, "{:+.4f}"), number(summary.worst)
            rows.append([label, f"{span:.0%}", str(summary.num_cases), *numbers])
    return table(["merge", "decay", "anneals", "MAE", "bias", "worst"], rows)


def section_bias(benchmark: Benchmark) -> str:
    """How biased the merges are before any correction, over windows as long as the linear decay."""
    some = next(iter(benchmark.trunks.values()))
    rows = []
    for name in some.spans(max(some.points))[SPANS[0]]["matched"]:
        row = [name]
        for span in SPANS:
            linear = [case for case in benchmark.cases(span, span, name) if case.shape == "linear"]
            late = [case.outcome for case in linear if benchmark.is_late(case)]
            corrected = summarise(benchmark.late(benchmark.assess(linear, "others")))
            row += [
                f"{statistics.mean(c.merged - c.annealed for c in late):+.4f}",
                f"{statistics.median(map(recovered_share, late)):.2f}",
                number(corrected.mean_absolute),
                number(corrected.worst),
            ]
        rows.append(row)
    baseline = ["live model, minus a constant"]
    for span in SPANS:
        assessed = benchmark.late(live_minus_constant(benchmark, span))
        gains = [each.case.outcome.live - each.case.outcome.annealed for each in assessed]
        corrected = summarise(assessed)
        baseline += [f"{statistics.mean(gains):+.4f}", "0.00"]
        baseline += [number(corrected.mean_absolute), number(corrected.worst)]
    rows.sort(key=lambda row: float(row[1]))
    header = ["merge over a window as long as the decay"]
    for span in SPANS:
        header += [f"{span:.0%}: bias", "recovered", "MAE", "worst"]
    return table(header, [baseline, *rows])


def live_minus_constant(benchmark: Benchmark, span: float) -> list[Assessed]:
    """The baseline: the live loss minus the mean gain of anneals in other runs."""
    cases = [
        Case(c.run, c.step, c.span, c.shape, BranchOutcome(c.outcome.live, c.outcome.live, c.outcome.annealed))
        for c in benchmark.cases(span, span, "sma N=10")
        if c.shape == "linear"
    ]
    return benchmark.assess(cases, "others", "offset")


def section_tried(benchmark: Benchmark) -> str:
    """Other forms of the correction, on the two proxies, both shapes."""
    rows = []
    for label, by_span in PROXIES.items():
        for span, (window, proxy) in by_span.items():
            cases = benchmark.cases(span, window, proxy)
            late_only = [case for case in cases if benchmark.is_late(case)]
            tried: dict[str, list[Assessed]] = {
                "ratio, weighted by age": benchmark.assess(cases, "weighted"),
                "ratio, all alike": benchmark.assess(cases, "earlier"),
                "offset": benchmark.assess(cases, "earlier", "offset"),
                "mean of ratios": benchmark.assess(cases, "earlier", "relative"),
                "ratio, first quarter does not teach": benchmark.assess(late_only, "earlier"),
                "offset, first quarter does not teach": benchmark.assess(late_only, "earlier", "offset"),
                "both shapes teach": pooled(cases),
                "ratio, weighted by age, and other runs worth two branches": benchmark.assess(cases, "both"),
                "ratio of other runs": benchmark.assess(cases, "others"),
                "offset of other runs": benchmark.assess(cases, "others", "offset"),
            }
            for form, assessed in tried.items():
                summary = summarise(benchmark.late(assessed))
                rows.append(
                    [
                        label,
                        f"{span:.0%}",
                        form,
                        str(summary.num_cases),
                        number(summary.mean_absolute),
                        number(summary.bias, "{:+.4f}"),
                        number(summary.worst),
                    ]
                )
    return table(["merge", "decay", "correction", "anneals", "MAE", "bias", "worst"], rows)


def pooled(cases: list[Case]) -> list[Assessed]:
    """From earlier branches of the run of whatever shape."""
    assessed = []
    for case in cases:
        known = [other.outcome for other in cases if other.run == case.run and other.step < case.step]
        if (calibration := calibrate(known)) is not None:
            assessed.append(Assessed(case, calibration.predict(case.outcome.live, case.outcome.merged)))
    return assessed


def section_transfer(benchmark: Benchmark) -> str:
    """rho of each run, and the error of each run's anneals when every other run teaches, or one seed alone."""
    rows = []
    for name, trunk in benchmark.trunks.items():
        row = [name]
        for span in SPANS:
            window, proxy = PROXIES["SMA, 10 snapshots"][span]
            own = [c for c in trunk.cases(span, window, proxy) if benchmark.is_late(c) and c.shape == "linear"]
            ratios = [gain_ratio(case.outcome) for case in own]
            taught = [
                each
                for each in benchmark.late(benchmark.assess(benchmark.cases(span, window, proxy), "others"))
                if each.case.run == name
            ]
            teaches = [
                each.error
                for other in benchmark.trunks.values()
                if other is not trunk
                for each in benchmark.late(
                    from_other_runs(
                        [*trunk.cases(span, window, proxy), *other.cases(span, window, proxy)], benchmark.is_late
                    )
                )
                if each.case.run == other.name
            ]
            row += [
                f"{statistics.mean(ratios):.2f}",
                number(summarise(taught).mean_absolute),
                number(statistics.mean(map(abs, teaches))),
            ]
        rows.append(row)
    header = ["trunk"]
    for span in SPANS:
        header += [f"{span:.0%}: rho", "MAE, taught by all others", "MAE of all others, taught by it"]
    return table(header, rows)


def section_forecast(benchmark: Benchmark) -> str:
    """Known before the decay: window and live value end where it begins."""
    rows = []
    for span in SPANS:
        for proxy in ("sma N=10", "wma N=10", "1-sqrt N=10"):
            for form in ("ratio", "offset"):
                row = [f"{span:.0%}", proxy, form]
                for how in HOWS:
                    summary = summarise(
                        benchmark.late(benchmark.assess(benchmark.cases(span, span, proxy, "forecast"), how, form))
                    )
                    row += [number(summary.mean_absolute), number(summary.bias, "{:+.4f}"), number(summary.worst)]
                rows.append(row)
    header = ["decay", "merge", "correction"]
    for words in HOWS.values():
        header += [f"{words}: MAE", "bias", "worst"]
    return table(header, rows)


def section_extrapolated(benchmark: Benchmark) -> str:
    """Extra-Merge beside the SMA over the same 10 % window."""
    rows = []
    for name, trunk in benchmark.trunks.items():
        late = [point for step, point in trunk.points.items() if trunk.is_late(step)]
        gains = {
            amount: [trunk.spans(p["step"])[0.1]["matched"]["sma N=10"] - p["extrapolated"][amount] for p in late]
            for amount in ("0.25", "0.5")
        }
        rows.append([name, *(f"{f(values):+.4f}" for values in gains.values() for f in (statistics.mean, max, min))])
    header = ["trunk", "amount 0.25: gain", "best", "least", "amount 0.5: gain", "best", "least"]
    return table(header, rows)


def section_rank(benchmark: Benchmark) -> str:
    """Do merges rank recipes as anneals do? Kendall's tau over trunks of one corpus and length, at every late point."""
    same = [t for t in benchmark.trunks.values() if t.info["num_steps"] == 2000 and t.name != "shakespeare"]
    if len(same) < 3:
        return "Too few trunks."
    rows = []
    for step in sorted(step for step in same[0].points if same[0].is_late(step)):
        annealed = [trunk.anneals[step, 0.1, "linear"].annealed[METRIC] for trunk in same]
        merged = [trunk.spans(step)[0.1]["matched"]["sma N=10"] for trunk in same]
        live = [trunk.points[step]["live"] for trunk in same]
        rows.append(
            [str(step), str(len(same)), *(f"{kendalltau(values, annealed).statistic:.2f}" for values in (live, merged))]
        )
    return table(["step", "recipes", "tau of live and annealed", "tau of merged and annealed"], rows)


def section_routers(benchmark: Benchmark) -> str:
    """How many tokens change experts."""
    trunk = benchmark.trunks.get("experts")
    if trunk is None:
        return "Not run."
    points = [point["routers"] for point in trunk.points.values()]
    rows = [
        [pair, *(f"{point['changed_set'][pair]:.1%}" for point in points), f"{points[-1]['shared_experts'][pair]:.1%}"]
        for pair in points[0]["changed_set"]
    ]
    header = [
        "tokens with another pair of experts",
        *(f"step {p['step']}" for p in points),
        "experts shared at the end",
    ]
    return table(header, rows)


def pictures(benchmark: Benchmark) -> None:
    """The three that the report shows."""
    name = next(iter(benchmark.trunks))
    trunk = benchmark.trunks[name]
    span, (window, proxy) = 0.1, PROXIES["exponential, half-life 5 %"][0.1]
    predicted = {
        each.case.step: each.prediction
        for each in benchmark.assess(benchmark.cases(span, window, proxy), "weighted")
        if each.case.run == name and each.case.shape == "linear"
    }
    validations = [
        Validation(
            step,
            p["live"],
            merged := trunk.spans(step)[window]["matched"][proxy],
            p["live"] - merged,
            predicted.get(step),
        )
        for step, p in trunk.points.items()
    ]
    anneals = [trunk.anneals[step, span, "linear"] for step in trunk.points]
    title = f"{name}: linear anneals over 10 %, predicted from earlier ones"
    plot_validations(validations, f"{METRIC} (nats per byte)", title, anneals).savefig(FOLDER / "over_steps.png")
    late = benchmark.late(benchmark.assess(benchmark.cases(span, window, proxy), "others"))
    by_run = {run: [each for each in late if each.case.run == run] for run in benchmark.trunks}
    plot_predicted_against_actual(by_run, "nats per byte").savefig(FOLDER / "predicted_against_actual.png")
    errors = {
        f"{span:.0%}\nN = {num}": {
            HOWS[how]: [
                e.error for e in benchmark.late(benchmark.assess(benchmark.cases(span, span, f"sma N={num}"), how))
            ]
            for how in HOWS
        }
        for span in SPANS
        for num in NUM_SNAPSHOTS
    }
    plot_errors(errors, "nats per byte", "span of decay and window, snapshots in an SMA").savefig(FOLDER / "errors.png")


def prior() -> dict[str, object]:
    """Gain ratios per span and shape over the late branches of runs with AdamW, with their spread.

    Ratios count by the square of the merge's gain: over a small one a ratio is mostly noise.
    """
    benchmark = Benchmark(without=OTHER_OPTIMIZERS)
    kinds = []
    for span in SPANS:
        for shape in SHAPES:
            cases = benchmark.cases(span, *PROXIES["SMA, 10 snapshots"][span])
            late = [case.outcome for case in cases if case.shape == shape and benchmark.is_late(case)]
            calibration = calibrate([replace(c, weight=(c.live - c.merged) ** 2) for c in late], "relative")
            assert calibration is not None
            fields = {key: value for key, value in asdict(calibration).items() if key != "form"}
            kinds.append({"span": span, "shape": shape, "relative": fields})
    merge = "uniform over 10 snapshots, as long as the decay"
    return {"trunks": list(benchmark.trunks), "merge": merge, "kinds": kinds}


SECTIONS: dict[str, Callable[[Benchmark], str]] = {
    "What was run": section_trunks,
    "How wrong is the prediction? The pass rule": lambda benchmark: table(MAIN_HEADER, main_rows(benchmark)),
    "The same, among runs with AdamW": section_adamw,
    "The same, on the trunks that no choice was made on": section_held_out,
    "The same, for each shape": section_by_shape,
    "Branches that end in the first quarter, calibrated on other runs": section_first_quarter,
    "Which merge? Linear decays, corrected by other runs": section_bias,
    "Which correction?": section_tried,
    "Does the gain ratio carry over? SMA over 10 snapshots": section_transfer,
    "Forecasts: what is known before the decay": section_forecast,
    "Extra-Merge: how much lower than the SMA of the same window": section_extrapolated,
    "Do merges rank recipes as anneals do?": section_rank,
    "Do merged routers choose other experts?": section_routers,
}


def evidence_table(benchmark: Benchmark) -> str:
    """What docs/evidence.md shows."""
    known = main_rows(benchmark), main_rows(Benchmark(without=OTHER_OPTIMIZERS))
    header = ["merge", "decay", "calibrated on", "anneals", "MAE", "worst", "AdamW: anneals", "MAE", "worst", "rule"]
    keep = [3, 4, 6]
    rows = [
        [*all_runs[:3], *(all_runs[i] for i in keep), *(adamw[i] for i in [*keep, 9])]
        for all_runs, adamw in zip(*known, strict=True)
    ]
    return table(header, rows)


def readme_table() -> str:
    """What the README shows: runs with AdamW, calibrated as a user of one file for all runs does."""
    rows = [row for row in main_rows(Benchmark(without=OTHER_OPTIMIZERS)) if "other runs worth two" in row[2]]
    return table(["merge", "decay", "anneals", "MAE", "worst"], [[*row[:2], row[3], row[4], row[6]] for row in rows])


def quick() -> str:
    """The slice beside the record of the same trunk."""
    rows = []
    for name in ("quick", "seed0"):
        trunk = Trunk(name)
        cases = [case for case in trunk.cases(0.1, 0.1, "sma N=10") if case.shape == "linear"]
        predicted = {each.case.step: each for each in from_earlier(cases)}
        for case in sorted(cases, key=lambda case: case.step):
            values = case.outcome.live, case.outcome.merged, case.outcome.annealed
            each = predicted.get(case.step)
            prediction = [f"{each.prediction.value:.4f}", f"{each.error:+.4f}"] if each else ["-", "-"]
            rows.append([name, str(case.step), *(f"{value:.4f}" for value in values), *prediction])
    return table(["trunk", "step", "live", "merged", "annealed", "predicted", "error"], rows)


def main() -> None:
    """Writes all of it."""
    if sys.argv[1:] == ["--quick"]:
        sys.stdout.write(quick() + "\n")
        return
    benchmark = Benchmark()
    parts = [
        "# How wrong are predictions of annealing?",
        "Made by `benchmarks/annealing/report.py`; losses in nats a byte.",
    ]
    floors = ", ".join(f"{noise_floor(benchmark, span):.4f} at {span:.0%}" for span in SPANS)
    parts.append(f"Noise floor, the deviation of the annealed loss from seed to seed: {floors}.")
    for title, section in SECTIONS.items():
        parts += [f"## {title}", section(benchmark)]
    parts += [
        "## Pictures",
        *(f"![{name}]({name}.png)" for name in ("over_steps", "predicted_against_actual", "errors")),
    ]
    (FOLDER / "REPORT.md").write_text("\n\n".join(parts) + "\n")
    pictures(benchmark)
    (ROOT / "src" / "merge_callback" / "prediction" / "prior.json").write_text(json.dumps(prior(), indent=1) + "\n")
    for file, shown in (("docs/evidence.md", evidence_table(benchmark)), ("README.md", readme_table())):
        before, rest = (ROOT / file).read_text().split(MARKS[0])
        (ROOT / file).write_text(f"{before}{MARKS[0]}\n{shown}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
