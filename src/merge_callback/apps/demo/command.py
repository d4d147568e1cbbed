"""Trains a small GPT on real text and shows, beside the live loss, the merged one and what annealing would give.

It anneals branches of the run for real, predicts from them, and ends with one more real anneal that the prediction had
not seen, tables and a picture. On two CPU cores it takes about four minutes.

  merge-callback demo
  merge-callback demo demo.corpus=my_text.txt callbacks/merge=pma
  merge-callback demo callbacks/merge=none
"""

import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from merge_callback.apps.demo.training import anneal_ends, describe, run_with_anneals
from merge_callback.apps.figures import plot_validations
from merge_callback.apps.runs import VALIDATION_HEADER, Validation, read_validations, validation_cells
from merge_callback.apps.train import Run, prepare
from merge_callback.prediction.records import AnnealRecord, read_records

METRIC = "val_loss"


def run(config: DictConfig) -> None:
    """Trains, prints the closing tables, draws the picture, and says where everything is."""
    # Lightning has not followed a deprecation in torch yet; nobody who tries the demo can do anything about it.
    warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
    # Batches are made in no time here.
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")
    # Hydra adds a handler of its own to the root logger; Lightning's lines would come twice.
    logging.getLogger("lightning.pytorch").propagate = False
    # Said at every start of a fit, of which the demo has several, and of no use to whoever tries it.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_of_use)
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.anneal["from"] is not None:
        branch(config, folder, console)
        return
    fit, anneals = trunk(config, folder, console)
    validations = read_validations(folder / "csv" / "metrics.csv", METRIC)
    console.print(closing_table(validations))
    if anneals:
        console.print(anneal_table(validations, anneals[-1]))
    description = fit.data.corpus.description
    picture = folder / "live_and_merged.png"
    plot_validations(validations, f"{METRIC} (nats per byte)", description, anneals).savefig(picture)
    console.print(f"Fingerprint of the trained weights: {fingerprint(fit.model)}")
    console.print(f"Picture: {picture}")
    # Also where the environment's commands are not on the path.
    python = Path(os.path.relpath(sys.executable))
    python = Path(sys.executable) if ".." in python.parts else python
    command = python.with_name("merge-callback")
    console.print(f"Charts: {python} -m tensorboard.main --logdir {folder / 'tensorboard'}")
    console.print(f"Report: {command} report {folder}")
    if anneals:
        start = folder / "checkpoints" / f"step-{anneals[-1].start_step}.ckpt"
        console.print(
            f"Another branch: {command} demo anneal.from={start} anneal.span=0.2"
            f" anneal.record={folder / 'anneals.jsonl'}"
        )


def trunk(config: DictConfig, folder: Path, console: Console) -> tuple[Run, list[AnnealRecord]]:
    """The run itself; with the callback, and with places enough to anneal at, also its branches."""
    merging = config.callbacks.get("merge")
    if merging and "_target_" in merging and config.resume_from is None and anneal_ends(config):
        return run_with_anneals(config, folder, console.print)
    run = prepare(config)
    describe(run, console.print)
    run.fit()
    return run, []


def branch(config: DictConfig, folder: Path, console: Console) -> None:
    """A real anneal from a checkpoint of an earlier run."""
    record = Path(config.anneal.record or folder / "anneals.jsonl")
    config.anneal.record = str(record)
    prepare(config).fit()
    done = read_records(record)[-1]
    console.print(
        f"{done.shape} decay from step {done.start_step} to step {done.step}: {METRIC} {done.annealed[METRIC]:.4f}"
    )
    console.print(f"Record: {record}")


def closing_table(validations: list[Validation]) -> Table:
    """Step, live and merged loss, the gain, and the prediction, one row a validation."""
    table = Table(*VALIDATION_HEADER, title=f"{METRIC}, nats per byte")
    for column in table.columns:
        column.justify = "right"
    for validation in validations:
        table.add_row(*validation_cells(validation))
    return table


def anneal_table(validations: list[Validation], anneal: AnnealRecord) -> Table:
    """The last branch, which the prediction had not seen, beside the trunk at the same step."""
    (at_end,) = [validation for validation in validations if validation.step == anneal.step]
    title = f"A real anneal over steps {anneal.start_step}-{anneal.step}, unseen by the prediction"
    table = Table("live", "merged", "predicted", "interval", "annealed", "error", title=title)
    predicted, annealed = at_end.predicted, anneal.annealed[METRIC]
    assert predicted is not None
    interval = f"{predicted.low:.4f} - {predicted.high:.4f}"
    numbers = [f"{number:.4f}" for number in (at_end.live, at_end.merged, predicted.value)]
    table.add_row(*numbers, interval, f"{annealed:.4f}", f"{predicted.value - annealed:+.4f}")
    return table


def is_of_use(line: logging.LogRecord) -> bool:
    """Whether a line of Lightning's says something about this run."""
    text = line.getMessage()
    return not any(part in text for part in ("available: ", "Tip:", "Restor", "stopped: `max_steps"))


def fingerprint(model: LightningModule) -> str:
    """Digest of all weights: two runs that give the same one have trained the same model, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
