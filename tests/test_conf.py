"""Every YAML file composes and instantiates, with keys that are constructor arguments."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

import merge_callback
from merge_callback import MergeCallback
from merge_callback.demo.progress import LiveAndMergedBar

CONF = Path(merge_callback.__file__).parent / "conf"
CHOICES = sorted(file.stem for file in (CONF / "callbacks" / "merge").glob("*.yaml"))


def composed(*overrides):
    with initialize_config_module("merge_callback.conf", version_base="1.3"):
        return compose("demo", overrides=[*overrides], return_hydra_config=True)


def test_the_folder_at_the_top_is_the_one_that_is_shipped():
    top = CONF.parents[2] / "conf"
    assert top.is_symlink()
    assert top.resolve() == CONF


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_callbacks_merge_is_a_callback_or_none(choice, tmp_path):
    config = composed(f"callbacks/merge={choice}", f"hydra.runtime.output_dir={tmp_path}")
    HydraConfig.instance().set_config(config)
    entry = config.callbacks.get("merge")
    if choice == "none":
        assert "_target_" not in entry
    else:
        assert isinstance(instantiate(entry), MergeCallback)


def test_the_paper_s_choice_has_the_defaults_of_the_constructor():
    entry = OmegaConf.load(CONF / "callbacks" / "merge" / "pma.yaml")
    callback, default = instantiate(entry), MergeCallback()
    assert (callback.every_n_train_steps, callback.num_snapshots) == (
        default.every_n_train_steps,
        default.num_snapshots,
    )


def test_every_part_of_the_demo_is_instantiated(tmp_path):
    config = composed(f"hydra.runtime.output_dir={tmp_path}")
    HydraConfig.instance().set_config(config)
    assert isinstance(instantiate(config.model), LightningModule)
    assert isinstance(instantiate(config.callbacks.progress_bar), LiveAndMergedBar)
    assert isinstance(instantiate(config.logger.csv), CSVLogger)
    assert isinstance(instantiate(config.logger.tensorboard), TensorBoardLogger)
    assert isinstance(instantiate(config.trainer), Trainer)
    assert len(instantiate(config.data).corpus.train)


def test_all_yaml_files_are_known_to_these_tests():
    known = {CONF / "demo.yaml"} | {CONF / "callbacks" / "merge" / f"{choice}.yaml" for choice in CHOICES}
    assert set(CONF.rglob("*.yaml")) == known
