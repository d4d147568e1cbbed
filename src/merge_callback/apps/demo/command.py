"""Trains a small GPT on real text and shows the live loss, the merged loss and the predicted loss after an anneal.

An anneal is a decay of the learning rate to zero. The demo anneals branches of the run and predicts from them. At the
end it anneals one more branch, which the prediction has not seen, and shows tables and a picture. On two CPU cores it
takes about four minutes.

  merge-callback demo
  merge-callback demo demo.corpus=my_text.txt callbacks/merge=pma
  merge-callback demo callbacks/merge=none
"""

import hashlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from urllib.parse import quote

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from merge_callback.apps.demo.training import anneal_ends, describe, run_with_anneals
from merge_callback.apps.figures import plot_validations
from merge_callback.apps.runs import Validation, read_validations, validation_table
from merge_callback.apps.train import Run, prepare
from merge_callback.prediction.records import AnnealRecord, read_records
from merge_callback.utilities.tables import NOTHING, text_table

METRIC = "val_loss"
# With it TensorBoard begins with the chart of live, merged, annealed and forecast values; else it sorts by name.
PINNED = json.dumps([{"plugin": "scalars", "tag": METRIC}], separators=(",", ":"))


def run(config: DictConfig) -> None:
    """Trains, prints the closing tables, draws the picture, and prints where all files are."""
    # Lightning still uses something that torch has deprecated; a user of the demo can do nothing about it.
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    # No workers are needed: batches take almost no time to make here.
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")
    # Hydra adds a handler of its own to the root logger; Lightning's lines would appear twice.
    logging.getLogger("lightning.pytorch").propagate = False
    # Drops lines that appear at the start of each of the demo's fits and do not help its user.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_of_use)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.anneal["from"] is not None:
        branch(config, folder)
        return
    fit, anneals = stable_run(config, folder)
    validations = read_validations(folder / "csv" / "metrics.csv", METRIC)
    print(closing_table(validations))
    if anneals:
        print(anneal_table(validations, anneals[-1]))
    description = fit.data.corpus.description
    picture = folder / "live_and_merged.png"
    plot_validations(validations, f"{METRIC} (nats per byte)", description, anneals).savefig(picture)
    print(f"Fingerprint of the trained weights: {fingerprint(fit.model)}")
    print(f"Picture: {picture}")
    # Full paths, since the environment's commands may not be on the PATH.
    python = Path(os.path.relpath(sys.executable))
    python = Path(sys.executable) if ".." in python.parts else python
    command = python.with_name("merge-callback")
    print(f"Charts: {python} -m tensorboard.main --logdir {folder / 'tensorboard'}")
    print(f"    then open http://localhost:6006/?pinnedCards={quote(PINNED)}")
    print(f"Report: {command} report {folder}")
    if anneals:
        start = folder / "checkpoints" / f"step-{anneals[-1].start_step}.ckpt"
        print(
            f"Another branch: {command} demo anneal.from={start} anneal.span=0.2"
            f" anneal.record={folder / 'anneals.jsonl'}"
        )


def stable_run(config: DictConfig, folder: Path) -> tuple[Run, list[AnnealRecord]]:
    """Trains the run. If it has the callback and enough steps to anneal at, also anneals its branches."""
    merging = config.callbacks.get("merge")
    if merging and "_target_" in merging and config.resume_from is None and anneal_ends(config):
        return run_with_anneals(config, folder, print)
    run = prepare(config)
    describe(run, print)
    run.fit()
    return run, []


def branch(config: DictConfig, folder: Path) -> None:
    """Anneals a branch from a checkpoint of an earlier run."""
    record = Path(config.anneal.record or folder / "anneals.jsonl")
    config.anneal.record = str(record)
    prepare(config).fit()
    done = read_records(record)[-1]
    print(f"{done.shape} decay from step {done.start_step} to step {done.step}: {METRIC} {done.annealed[METRIC]:.4f}")
    print(f"Record: {record}")


def closing_table(validations: list[Validation]) -> str:
    """Returns a table of step, live and merged loss, gain, prediction and forecast, with one row per validation."""
    header, rows = validation_table(validations)
    return text_table(header, rows, title=f"{METRIC}, nats per byte", num_left=0)


def anneal_table(validations: list[Validation], anneal: AnnealRecord) -> str:
    """Returns a table of what was said about the last branch, which nothing of it had seen, and what came of it."""
    at = {validation.step: validation for validation in validations}
    before, after = at.get(anneal.start_step), at[anneal.step]
    annealed = anneal.annealed[METRIC]
    said = {"live": (after, None), "merged": (after, None), "predicted": (after, after.predicted)}
    if before is not None and before.forecast is not None:
        said = {"forecast": (before, before.forecast), **said}
    rows = []
    for name, (known, prediction) in said.items():
        value = prediction.value if prediction is not None else getattr(known, name)
        interval = f"{prediction.low:.4f} to {prediction.high:.4f}" if prediction is not None else NOTHING
        rows.append([name, str(known.step), f"{value:.4f}", interval, f"{annealed:.4f}", f"{value - annealed:+.4f}"])
    title = f"A real anneal over steps {anneal.start_step}-{anneal.step}, unseen by the prediction"
    header = ["", "known at step", "value", "interval", "annealed", "error"]
    return text_table(header, rows, title=title)


def is_of_use(line: logging.LogRecord) -> bool:
    """Returns whether a log line of Lightning says something about this run."""
    text = line.getMessage()
    return not any(part in text for part in ("available: ", "Tip:", "Restor", "stopped: `max_steps"))


def fingerprint(model: LightningModule) -> str:
    """Returns a digest of all weights. Two runs with the same digest have trained the same model, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
