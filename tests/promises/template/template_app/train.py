"""Trains what the config says, as projects of this layout do; nothing here knows of `merge_callback`."""

from typing import Any

import hydra
from omegaconf import DictConfig

from template_app.utils.instantiators import instantiate_callbacks, instantiate_loggers


def train(cfg: DictConfig) -> dict[str, Any]:
    # Here, so that Hydra answers at once where the command line is wrong.
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything  # noqa: PLC0415

    if cfg.get("seed"):
        seed_everything(cfg.seed, workers=True)
    datamodule: LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.get("callbacks"))
    loggers = instantiate_loggers(cfg.get("logger"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.get("ckpt_path"))
    return trainer.callback_metrics


@hydra.main(version_base="1.3", config_path="configs", config_name="train.yaml")
def main(cfg: DictConfig) -> float | None:
    metrics = train(cfg)
    print("metrics:", " ".join(sorted(metrics)))
    metric = cfg.get("optimized_metric")
    return metrics[metric].item() if metric else None


if __name__ == "__main__":
    main()
