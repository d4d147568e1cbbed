"""What both programs of the forecast benchmark train with: the demo's run of a trunk, and real decays from it."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from lightning.pytorch import Callback
from trunks import NUM_VALIDATION_BLOCKS, NUM_VALIDATIONS, Trunk

from merge_callback import MergeCallback
from merge_callback.apps.train import Run, prepare
from merge_callback.merging.rules import sma, wma

HERE = Path(__file__).parent
RECORDS = HERE / "records"
WORK = HERE.parents[1] / "outputs" / "forecast"
RULES = {"sma": sma, "wma": wma}


class MergesOfValidations(Callback):
    """Notes for every validation the live and merged losses, and of which snapshots the merges were made."""

    def __init__(self, merge: MergeCallback) -> None:
        self.merge = merge
        self.validations: list[dict[str, Any]] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("merged")}
        coefficients = {name: list(self.merge.coefficients(name).values()) for name in RULES} if found else {}
        values = {"step": trainer.global_step, "live": float(trainer.callback_metrics["val_loss"]), **found}
        self.validations.append(values | {"snapshots": self.merge.snapshot_steps, "coefficients": coefficients})


def prepared(trunk: Trunk, *callbacks: Callback, **options: Any) -> Run:
    """The demo's run of a trunk, with these callbacks alone; options are entries of its config."""
    overrides = [
        "callbacks/merge=none",
        "~callbacks.progress_bar",
        "~logger.csv",
        "~logger.tensorboard",
        "+trainer.enable_progress_bar=false",
        "+trainer.num_sanity_val_steps=0",
        f"trainer.max_steps={trunk.num_steps}",
        f"trainer.val_check_interval={trunk.num_steps // NUM_VALIDATIONS}",
        f"data.num_validation_blocks={NUM_VALIDATION_BLOCKS}",
        *trunk.overrides,
        *(f"{name}={value}" for name, value in options.items()),
    ]
    with initialize_config_module("merge_callback.apps.commands", version_base="1.3"):
        config = compose("demo", overrides)
    return prepare(config, callbacks, loggers=())


def run_branch(trunk: Trunk, folder: Path, record: Path, *, start: int, span_steps: int, shape: str) -> None:
    """Anneals from the trunk's checkpoint; the branch writes its own record."""
    options = {
        "anneal.from": folder / f"step-{start}.ckpt",
        "anneal.span_steps": span_steps,
        "anneal.shape": shape,
        "anneal.record": record,
        "anneal.trunk": folder / f"step-{trunk.num_steps}.ckpt",
        # Only the end of the branch is of interest.
        "trainer.val_check_interval": 1000000,
    }
    prepared(trunk, **options).fit()
