"""Verdicts, tables and pictures of the overhead benchmark, from its records.

    python benchmarks/overhead/report.py                     # benchmarks/overhead/records/
    python benchmarks/overhead/report.py /tmp/overhead-abcd  # another folder, such as that of a smoke test

Writes REPORT.md with its pictures beside this script, or into the other folder. Parts without a record are left
out and named. Read protocol.py first.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from protocol import (
    COPY,
    IN_PLACE,
    LIGHTNING_EXCHANGE,
    MERGES,
    PASS_RULES,
    RECORDS,
    ROOT,
    Median,
    bound_in_copies,
    median,
    paired_ratio,
)
from trainings import WITH, WITHOUT, live_seconds, share_by_clocks, share_of_run

# Folder of records -> what stands around its table in docs/evidence.md.
MARKS = {
    folder: (f"<!-- {name}: made by benchmarks/overhead/report.py -->", f"<!-- end of {name} -->")
    for folder, name in {
        RECORDS: "overhead table",
        RECORDS / "nvidia-h100-80gb-hbm3": "overhead table of a GPU",
    }.items()
}
# In this order, with what stands above their tables.
PARTS = {
    "ema": "Averages over every step: milliseconds an update",
    "capture": "Captures: milliseconds each",
    "merge": "Merges of ten snapshots: milliseconds each",
    "several": "Four merges of one ring: milliseconds",
    "swap": "Other weights in and the live ones back: milliseconds",
    "step": "A training step of the demo: milliseconds",
    "hooks": "The callback's hooks in a step between captures: milliseconds",
    "in_flight": "A training step of the demo while captures go to host memory: milliseconds",
    "memory": "Peaks of a GPU's memory beyond model and ring: MiB",
    "waits": "Calls by which the host waits for the GPU, between captures",
    "whole": "Whole runs of the demo: seconds",
    "scaling": "Captures and merges by size: milliseconds",
    "ranks": "A model spread over processes: milliseconds of the slowest",
}
OURS = ("Shadow.update", "MergeCallback")
# All that a merge may take beside ring and merge.
CHUNK_BYTES = 64 * 2**20
LIGHTNING = "Lightning EMAWeightAveraging"

Measured = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A median beside its pass rule."""

    rule: str
    where: str
    found: Median

    @property
    def is_reached(self) -> bool:
        """Whether the rule holds here."""
        return PASS_RULES[self.rule].is_reached(self.found.value)

    def row(self) -> list[str]:
        """For the table."""
        rule = PASS_RULES[self.rule]
        limit = f"{'at most' if rule.is_upper else 'at least'} {rule.limit:g}{rule.unit}"
        missed = f"missed by {rule.missed_by(self.found.value):.1%}"
        if self.found.low < rule.limit < self.found.high:
            missed += ", within its interval"
        value = f"{_number(self.found.value)}{rule.unit}"
        between = f"{_number(self.found.low)} to {_number(self.found.high)}"
        return [rule.what, self.where, value, between, limit, "reached" if self.is_reached else missed]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"


def samples(measured: Measured, contestant: str) -> list[float]:
    """Seconds of every round of a contestant."""
    return measured["seconds"][contestant]["samples"]


def setting(measured: Measured) -> str:
    """What was measured, in words."""
    parts = [measured.get("model"), measured.get("dtype"), worker(measured)]
    return ", ".join(part for part in parts if part)


def worker(measured: Measured) -> str:
    """What did the work, in words."""
    if is_on_gpu(measured):
        return "GPU"
    return f"{measured['num_threads']} thread{'s' * (measured['num_threads'] > 1)}"


def is_on_gpu(measured: Measured) -> bool:
    """Whether a GPU did the work."""
    return measured.get("device") == "cuda"


def ema_verdicts(measured: Measured) -> list[Verdict]:
    """Ours against the fastest peer, a plain copy and Lightning's callback."""
    medians = {name: each["median"] for name, each in measured["seconds"].items()}
    peers = [name for name in medians if name not in (COPY, *OURS)]
    fastest = min(peers, key=medians.__getitem__)
    verdicts = []
    for name in OURS:
        ours, where = samples(measured, name), setting(measured)
        against_fastest = paired_ratio(ours, samples(measured, fastest))
        verdicts += [
            Verdict("fastest", f"{name} against {fastest}; {where}", against_fastest),
            Verdict("copy", f"{name}; {where}", paired_ratio(ours, samples(measured, COPY))),
            Verdict("lightning", f"{name}; {where}", paired_ratio(samples(measured, LIGHTNING), ours)),
        ]
    return verdicts


def capture_verdicts(measured: Measured) -> list[Verdict]:
    """The ring against a plain copy."""
    found = paired_ratio(samples(measured, COPY), samples(measured, "ring, float32"))
    return [Verdict("capture", setting(measured), found)]


def merge_verdicts(measured: Measured) -> list[Verdict]:
    """The merge against what the memory allows."""
    dtype = measured["dtype"]
    bound = bound_in_copies(measured["num_snapshots"], {"float32": 4, "bfloat16": 2}[dtype])
    found = paired_ratio(samples(measured, COPY), samples(measured, MERGES))
    rule = f"merge {dtype}" + " on a GPU" * is_on_gpu(measured)
    return [Verdict(rule, setting(measured), found.scaled(bound))]


def several_verdicts(measured: Measured) -> list[Verdict]:
    """Four merges against one."""
    found = paired_ratio(samples(measured, "four merges"), samples(measured, "one merge"))
    return [Verdict("several", setting(measured), found)]


def swap_verdicts(measured: Measured) -> list[Verdict]:
    """Milliseconds of a swap, and a swap in place against Lightning's."""
    verdicts = [Verdict("swap", setting(measured), median(samples(measured, "swapped_weights")).scaled(1000))]
    if IN_PLACE in measured["seconds"]:
        against = paired_ratio(samples(measured, IN_PLACE), samples(measured, LIGHTNING_EXCHANGE))
        verdicts.append(Verdict("in place", setting(measured), against))
    return verdicts


def step_verdicts(measured: Measured) -> list[Verdict]:
    """Blocks with the callback against their neighbours without."""
    rule = "step" + " on a GPU" * is_on_gpu(measured)
    return [Verdict(rule, setting(measured), paired_ratio(samples(measured, WITH), samples(measured, WITHOUT)))]


IN_HOOKS = "in the callback's hooks"


def hooks_verdicts(measured: Measured) -> list[Verdict]:
    """Hooks against the step, or the end of a long run against its beginning."""
    where = setting(measured)
    if measured["model"] == "large":
        return [Verdict("hooks", where, paired_ratio(samples(measured, IN_HOOKS), samples(measured, WITH)))]
    return [
        Verdict(rule, where, ends_ratio(measured["seconds"], kind))
        for rule, kind in (("growth", IN_HOOKS), ("growth of validations", "learning from a validation"))
    ]


def ends_ratio(seconds: Measured, kind: str) -> Median:
    """The last tenth of a run over the second one; its interval is that of both medians."""
    last, second = (seconds[f"{kind}, {when} tenth"] for when in ("last", "second"))
    low, high = last["interval"][0] / second["interval"][1], last["interval"][1] / second["interval"][0]
    return Median(last["median"] / second["median"], low, high)


def in_flight_verdicts(measured: Measured) -> list[Verdict]:
    """Blocks with captures against their neighbours without the callback; a rule for GPUs."""
    return [
        Verdict("in flight", setting(measured), paired_ratio(samples(measured, WITH), samples(measured, WITHOUT)))
        for _ in range(is_on_gpu(measured))
    ]


def memory_verdicts(measured: Measured) -> list[Verdict]:
    """The highest peak against what is allowed."""
    share = max(measured["peak_bytes"].values()) / (measured["merge_bytes"] + CHUNK_BYTES)
    return [Verdict("memory", f"{measured['model']}, storage {measured['storage']}", median([share]))]


def waits_verdicts(measured: Measured) -> list[Verdict]:
    """Waits of all kinds that the callback adds."""
    added = sum(measured["waits"][WITH].values()) - sum(measured["waits"][WITHOUT].values())
    return [Verdict("waits", setting(measured), median([added / measured["num_steps"]]))]


def whole_verdicts(measured: Measured) -> list[Verdict]:
    """Pairs of runs."""
    return [Verdict("whole", setting(measured), median(map(share_of_run, measured["pairs"])))]


VERDICTS: dict[str, Callable[[Measured], list[Verdict]]] = {
    "ema": ema_verdicts,
    "capture": capture_verdicts,
    "merge": merge_verdicts,
    "several": several_verdicts,
    "swap": swap_verdicts,
    "step": step_verdicts,
    "hooks": hooks_verdicts,
    "in_flight": in_flight_verdicts,
    "memory": memory_verdicts,
    "waits": waits_verdicts,
    "whole": whole_verdicts,
}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:,.0f}"


def contest_table(record: Measured) -> str:
    """Medians of all contestants, a column for each setting; behind them the median ratio to a plain copy."""
    measured = record["measured"]
    rows = []
    for name in dict.fromkeys(name for each in measured for name in each["seconds"]):
        cells = [name]
        for each in measured:
            if name not in each["seconds"]:
                cells.append("-")
                continue
            cell = milliseconds(each["seconds"][name]["median"])
            if name != COPY and COPY in each["seconds"]:
                ratio = paired_ratio(samples(each, name), samples(each, COPY)).value
                cell += f" ({ratio:.2f})"
            cells.append(cell)
        rows.append(cells)
    return table(["", *map(setting, measured)], rows)


def step_table(record: Measured) -> str:
    """Steps, and the share of them that hooks take."""
    (measured,) = record["measured"]
    without = measured["seconds"][WITHOUT]["median"]
    rows = [
        [name, f"{each['median'] * 1000:.3f}", f"{each['median'] / without:.2%}", str(len(each["samples"]))]
        for name, each in measured["seconds"].items()
    ]
    return table(["", setting(measured), "of a step without", "samples"], rows)


def hooks_table(record: Measured) -> str:
    """A row for each kind of time, of the large model and of the long run."""
    rows = []
    for measured in record["measured"]:
        for name, seconds in measured["seconds"].items():
            number = seconds.get("num_samples") or len(seconds["samples"])
            rows.append([setting(measured), name, f"{seconds['median'] * 1000:.3f}", f"{number:,}"])
    return table(["model", "what", "median", "samples"], rows)


def memory_table(record: Measured) -> str:
    """A row for each model and storage."""
    rows = []
    for each in record["measured"]:
        mib = [f"{size / 2**20:,.1f}" for size in (each["merge_bytes"], *each["peak_bytes"].values())]
        rows.append([each["model"], each["storage"], *mib])
    return table(["model", "storage", "the merge itself", *record["measured"][0]["peak_bytes"]], rows)


def waits_table(record: Measured) -> str:
    """A row with and without, a column for each call by which a host waits."""
    (measured,) = record["measured"]
    names = list(measured["waits"][WITH])
    rows = [[kind, *(str(counts[name]) for name in names)] for kind, counts in measured["waits"].items()]
    return f"In {measured['num_steps']} steps.\n\n{table(['', *names], rows)}"


def whole_table(record: Measured) -> str:
    """Every pair."""
    (measured,) = record["measured"]
    rows = []
    for pair in measured["pairs"]:
        merged = pair[WITH]["merged_validations"]
        rows.append(
            [
                *(f"{pair[kind]['seconds']:.1f}" for kind in (WITHOUT, WITH)),
                str(len(merged)),
                f"{live_seconds(pair):.3f}",
                f"{sum(merged) / len(merged):.3f}",
                f"{pair[WITH]['hooks']:.3f}",
                f"{share_of_run(pair):+.2%}",
                f"{share_by_clocks(pair):+.2%}",
            ]
        )
    header = [WITHOUT, WITH, "merged validations", "a live validation", "a merged one, merge included", "all hooks"]
    header += ["beyond the batches", "by the clocks inside"]
    return f"Runs of {measured['run_steps']} steps, {setting(measured)}.\n\n{table(header, rows)}"


def scaling_table(record: Measured) -> str:
    """A row for each number of parameters and threads; behind merges the share of their bound."""
    measured = record["measured"]
    nums = sorted({num for each in measured for num in each["num_snapshots"]})
    rows = []
    for each in measured:
        copied, seconds = each["seconds"][COPY]["median"], each["seconds"]
        cells = [f"{each['num_parameters'] / 1e6:,.0f} M", worker(each)]
        cells += [milliseconds(copied), milliseconds(seconds["capture"]["median"])]
        for num in nums:
            if num in each["num_snapshots"]:
                took = seconds[f"merge of {num}"]["median"]
                cells.append(f"{milliseconds(took)} ({bound_in_copies(num, 4) * copied / took:.2f})")
            else:
                cells.append("-")
        rows.append(cells)
    return table(["parameters", "by", COPY, "capture", *(f"merge of {num}" for num in nums)], rows)


def ranks_table(record: Measured) -> str:
    """A row for each number of processes; in parentheses plain copies of as many bytes at the same time."""
    rows = []
    for each in record["measured"]:
        num_ranks, copied = each["num_ranks"], each["seconds"][COPY]["median"]
        cells = [str(num_ranks), f"{each['num_parameters'] / num_ranks / 1e6:,.0f} M"]
        cells += [f"{each['num_snapshots'] * each['num_parameters'] * 4 / num_ranks / 2**20:,.0f} MiB"]
        for name, seconds in each["seconds"].items():
            took = milliseconds(seconds["median"])
            cells.append(took if name == COPY else f"{took} ({seconds['median'] / copied:.2f})")
        rows.append(cells)
    return table(["processes", "parameters of each", "ring of each", *record["measured"][0]["seconds"]], rows)


TABLES = {
    "ranks": ranks_table,
    "step": step_table,
    "hooks": hooks_table,
    "in_flight": step_table,
    "memory": memory_table,
    "waits": waits_table,
    "whole": whole_table,
    "scaling": scaling_table,
}


def plot_ema(record: Measured) -> Figure:
    """Updates in plain copies of the same bytes."""
    measured = record["measured"]
    figure = Figure(figsize=(8, 0.8 * len(measured) + 1.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = [name for name in measured[0]["seconds"] if name != COPY]
    for place, name in enumerate(names):
        ratios = [paired_ratio(samples(each, name), samples(each, COPY)).value for each in measured]
        at = [row + (place - (len(names) - 1) / 2) * 0.8 / len(names) for row in range(len(measured))]
        axes.plot(ratios, at, "D" if name in OURS else "o", color=f"C{place}", markersize=5, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(measured)), list(map(setting, measured)))
    axes.set_xticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("an update, in plain copies of the same bytes")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def plot_scaling(record: Measured) -> Figure:
    """Merges over the bytes that they read, and captures, each beside what the memory allows."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, label in enumerate(sorted(set(map(worker, record["measured"])))):
        several = [each for each in record["measured"] if worker(each) == label]
        merges = [
            (num * 4 * each["num_parameters"] / 1e9, seconds["median"], bound_in_copies(num, 4) * copied["median"])
            for each in several
            for num in each["num_snapshots"]
            for seconds, copied in [(each["seconds"][f"merge of {num}"], each["seconds"][COPY])]
        ]
        size, took, bound = zip(*sorted(merges), strict=True)
        left.loglog(size, took, "o", color=f"C{color}", markersize=4, label=f"merge, {label}")
        left.loglog(size, bound, "_", color=f"C{color}", markersize=12, label=f"bound, {label}")
        sizes = [each["num_parameters"] / 1e6 for each in several]
        for name, style in (("capture", "o"), (COPY, "-")):
            medians = [each["seconds"][name]["median"] for each in several]
            right.loglog(sizes, medians, style, color=f"C{color}", markersize=4, label=f"{name}, {label}")
    left.set(xlabel="snapshots read (GB)", ylabel="seconds", title="Merges")
    right.set(xlabel="parameters (M)", ylabel="seconds", title="Captures")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


PICTURES = {"ema": plot_ema, "scaling": plot_scaling}


def all_verdicts(records: dict[str, Measured]) -> list[Verdict]:
    """Every rule with every model and number of threads."""
    return [
        verdict
        for part, verdicts in VERDICTS.items()
        if part in records
        for measured in records[part]["measured"]
        for verdict in verdicts(measured)
    ]


def rule_table(verdicts: list[Verdict]) -> str:
    """Every rule, with its worst case."""
    rows = []
    for name, rule in PASS_RULES.items():
        cases = [verdict for verdict in verdicts if verdict.rule == name]
        if not cases:
            continue
        worst = max(cases, key=lambda verdict: rule.missed_by(verdict.found.value))
        what, where, value, between, limit, outcome = worst.row()
        num_reached = sum(verdict.is_reached for verdict in cases)
        rows.append([what, limit, outcome, f"{num_reached} of {len(cases)}", value, between, where])
    return table(["rule", "limit", "verdict", "reached in", "worst median", "95 % interval", "worst case"], rows)


def evidence_table(records: dict[str, Measured]) -> str:
    """Every rule with its best and its worst case."""
    rows, verdicts = [], all_verdicts(records)
    for name, rule in PASS_RULES.items():
        cases = sorted(
            (each for each in verdicts if each.rule == name), key=lambda each: rule.missed_by(each.found.value)
        )
        if not cases:
            continue
        best, worst = (f"{_number(each.found.value)}{rule.unit}" for each in (cases[0], cases[-1]))
        limit = f"{'at most' if rule.is_upper else 'at least'} {rule.limit:g}{rule.unit}"
        num_reached = sum(each.is_reached for each in cases)
        rows.append([rule.what, limit, best, worst, f"{num_reached} of {len(cases)}"])
    return table(["what", "limit", "best", "worst", "reached in"], rows)


def verdict_table(verdicts: list[Verdict]) -> str:
    """All of them."""
    header = ["rule", "where", "median", "95 % interval", "limit", "verdict"]
    return table(header, [verdict.row() for verdict in verdicts])


def about(records: dict[str, Measured]) -> str:
    """Machine, versions and commits of the records."""
    lines = []
    for part, record in records.items():
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        machine = f"{record['num_cores']} cores of {record['processor']}, {record['memory_gib']} GiB"
        machine += f", {record['gpu']}" if "gpu" in record else ""
        source = record["commit"][:7] + (" with changes" if record["has_uncommitted_source"] else "")
        cells = [part, source, f"{versions}, Python {record['python']}", machine]
        lines.append([*cells, f"{record['load_before']:.2f}", f"{record['part_seconds']:.0f}"])
    return table(["part", "commit", "versions", "machine", "load before", "seconds"], lines)


def read_records(folder: Path = RECORDS) -> dict[str, Measured]:
    """By part; those that were not run are absent."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


def page(records: dict[str, Measured], folder: Path = RECORDS.parent) -> str:
    """The whole report, for a folder."""
    protocol = os.path.relpath(Path(__file__).with_name("protocol.py"), folder)
    sections = [
        "# What does merging cost?",
        f"Made by `benchmarks/overhead/report.py`; [`protocol.py`]({protocol}) holds question, statistic"
        " and rules. Times are medians; in parentheses stands how many plain copies of the model that is.",
    ]
    others = ("ranks",) if any("gpu" in record for record in records.values()) else ("in_flight", "memory", "waits")
    if missing := [part for part in PARTS if part not in records and part not in others]:
        sections.append(f"Not run: {', '.join(missing)}.")
    verdicts = all_verdicts(records)
    sections += ["## Pass rules", rule_table(verdicts)]
    for part, record in records.items():
        sections += [f"## {PARTS[part]}", TABLES.get(part, contest_table)(record)]
        if part == "scaling":
            sections.append("In parentheses: the share of the speed that the memory allows.")
        if part in PICTURES:
            sections.append(f"![{PARTS[part]}]({part}.png)")
    sections += ["## Every case of the pass rules", verdict_table(verdicts), "## Records", about(records)]
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Writes it with its pictures."""
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RECORDS
    output = Path(__file__).parent if folder == RECORDS else folder
    records = read_records(folder)
    if not records:
        sys.exit(f"no records in {folder}; run.py makes them")
    for part in PICTURES.keys() & records.keys():
        PICTURES[part](records[part]).savefig(output / f"{part}.png")
    (output / "REPORT.md").write_text(page(records, output))
    print(output / "REPORT.md")
    if folder in MARKS:
        evidence = ROOT / "docs" / "evidence.md"
        first, last = MARKS[folder]
        before, rest = evidence.read_text().split(first)
        evidence.write_text(f"{before}{first}\n{evidence_table(records)}\n{last}{rest.split(last)[1]}")


if __name__ == "__main__":
    main()
