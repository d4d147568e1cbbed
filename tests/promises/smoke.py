"""What has to work with the wheel alone, without extras and test tools: `make smoke` runs it in empty environments.

It trains, shows merged values, exports, resumes, and composes a config group as an app of somebody else's would.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import merge_callback
from merge_callback import MergeCallback


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(callback, folder, max_steps, checkpoint=None):
    torch.manual_seed(0)
    points = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
    trainer = Trainer(
        max_steps=max_steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=4,
        accelerator="cpu",
    )
    model = Line()
    loaders = DataLoader(points, 4), DataLoader(points, 16)
    trainer.fit(model, *loaders, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return model, trainer


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A config of an app of one's own, which says nothing of where the group comes from.
        (folder / "conf").mkdir()
        (folder / "conf" / "app.yaml").write_text("defaults: [{callbacks/merge: decay_1sqrt}]\n")
        with initialize_config_dir(str(folder / "conf"), version_base="1.3"):
            config = compose("app", overrides=["callbacks.merge.num_snapshots=5"])
        whole = instantiate(config.callbacks.merge)
        model, trainer = fit(whole, folder, 32)
        assert trainer.callback_metrics["merge/num_snapshots"] == 5
        assert trainer.callback_metrics["merged/val_loss"].isfinite()
        whole.save_merged(folder / "merged.ckpt")
        assert Line.load_from_checkpoint(folder / "merged.ckpt").net.weight.shape == (1, 4)
        fit(MergeCallback(num_snapshots=5, merges="1-sqrt"), folder, 16)
        resumed = MergeCallback(num_snapshots=5, merges="1-sqrt")
        again, _ = fit(resumed, folder, 32, checkpoint=folder / "16.ckpt")
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
        merges = [callback.merged_state_dict() for callback in (whole, resumed)]
        assert all(torch.equal(merges[0][name], merges[1][name]) for name in merges[0])
    versions = [f"{name} {version(name)}" for name in ("lightning", "torch", "torchmetrics", "hydra-core", "numpy")]
    print(f"{merge_callback.__name__} {merge_callback.__version__} works with {', '.join(versions)}")
    print(f"from {Path(merge_callback.__file__).parent}")


if __name__ == "__main__":
    main()
