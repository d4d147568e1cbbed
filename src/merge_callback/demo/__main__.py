"""Trains the demo's model as its config says and shows what came of it."""

import hashlib
import logging
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from merge_callback.demo.training import prepare
from merge_callback.report import Validation, plot_validations, read_validations

METRIC = "val_loss"


@hydra.main(version_base="1.3", config_path="pkg://merge_callback.conf", config_name="demo")
def main(config: DictConfig) -> None:
    """Trains, prints the closing table, draws the picture, and says where everything is."""
    # Hydra adds a handler of its own to the root logger; Lightning's lines would come twice.
    logging.getLogger("lightning.pytorch").propagate = False
    console = Console()
    run = prepare(config)
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    corpus = run.data.corpus
    console.print(f"Corpus: {corpus.description}", highlight=False)
    console.print(
        f"{len(corpus.train):,} bytes to train on, {len(corpus.validation):,} kept back; {num_parameters:,} parameters"
    )
    run.fit()

    folder = Path(HydraConfig.get().runtime.output_dir)
    validations = read_validations(folder / "csv" / "metrics.csv", METRIC)
    console.print(closing_table(validations))
    picture = folder / "live_and_merged.png"
    plot_validations(validations, f"{METRIC} (nats per byte)", corpus.description).savefig(picture)
    console.print(f"Fingerprint of the trained weights: {fingerprint(run.model)}", highlight=False)
    console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)
    console.print(f"Charts: tensorboard --logdir {folder / 'tensorboard'}", highlight=False, soft_wrap=True)


def closing_table(validations: list[Validation]) -> Table:
    """Step, live and merged loss, and the gain, one row a validation."""
    table = Table("step", "live", "merged", "gain", title=f"{METRIC}, nats per byte")
    for column in table.columns:
        column.justify = "right"
    for validation in validations:
        numbers = (validation.live, validation.merged, validation.gain)
        formats = ("{:.4f}", "{:.4f}", "{:+.4f}")
        cells = ["-" if number is None else form.format(number) for form, number in zip(formats, numbers, strict=True)]
        table.add_row(str(validation.step), *cells)
    return table


def fingerprint(model: LightningModule) -> str:
    """Digest of all weights: two runs that give the same one have trained the same model, to the bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
