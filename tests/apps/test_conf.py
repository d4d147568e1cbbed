"""Every YAML file composes and instantiates, with keys that are constructor arguments."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

import merge_callback
from merge_callback import MergeCallback
from merge_callback.apps.comparison import ComparisonTable
from merge_callback.callbacks.progress_bar import LiveAndMergedBar
from tests.helpers.toys import Toy, fit, make

CONF = Path(merge_callback.__file__).parent / "apps" / "conf"
COMMANDS = CONF.parent / "commands"
CHOICES = sorted(file.stem for file in (CONF / "callbacks" / "merge").glob("*.yaml"))


def composed(*overrides):
    with initialize_config_module("merge_callback.apps.commands", version_base="1.3"):
        return compose("demo", overrides=[*overrides], return_hydra_config=True)


def test_the_folder_at_the_top_is_the_one_that_is_shipped():
    top = CONF.parents[3] / "conf"
    assert top.is_symlink()
    assert top.resolve() == CONF


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.sample(5)
def test_every_choice_of_callbacks_merge_is_a_callback_or_none(choice, tmp_path):
    config = composed(f"callbacks/merge={choice}", f"hydra.runtime.output_dir={tmp_path}")
    HydraConfig.instance().set_config(config)
    entry = config.callbacks.get("merge")
    if choice == "none":
        assert "_target_" not in entry
    else:
        assert isinstance(instantiate(entry), MergeCallback)


def test_every_argument_stands_in_the_config_with_its_default():
    """So that each can be overridden on the command line, and none says something else than the constructor."""
    entry = OmegaConf.to_container(OmegaConf.load(CONF / "callbacks" / "merge" / "_defaults.yaml"))
    assert entry.pop("_target_") == "merge_callback.MergeCallback"
    entry.pop("_convert_")
    arguments = [p for p in inspect.signature(MergeCallback).parameters.values() if p.name != "self"]
    defaults = {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in arguments}
    assert entry == defaults


@pytest.mark.slow
def test_the_choice_of_several_merges_logs_each_of_them(tmp_path):
    config = composed("callbacks/merge=many", f"hydra.runtime.output_dir={tmp_path}")
    HydraConfig.instance().set_config(config)
    callback = instantiate(config.callbacks.merge)
    assert list(callback.merges) == ["sma", "wma", "late", "ema"]
    run = fit(make(Toy), tmp_path, callback)
    merged = {name for name in run.trainer.callback_metrics if name.startswith("merged")}
    metrics = ("val_loss", "val_accuracy")
    assert merged == {f"merged{label}/{metric}" for label in ("", "_wma", "_late", "_ema") for metric in metrics}


def test_every_part_of_the_demo_is_instantiated(tmp_path):
    config = composed(f"hydra.runtime.output_dir={tmp_path}")
    HydraConfig.instance().set_config(config)
    assert isinstance(instantiate(config.model), LightningModule)
    assert isinstance(instantiate(config.callbacks.progress_bar), LiveAndMergedBar)
    assert isinstance(instantiate(config.logger.csv), CSVLogger)
    assert isinstance(instantiate(config.logger.tensorboard), TensorBoardLogger)
    assert isinstance(instantiate(config.trainer), Trainer)
    assert len(instantiate(config.data).corpus.train)


def test_the_comparison_of_a_multirun_is_a_callback_of_hydra():
    entry = OmegaConf.load(CONF / "hydra" / "callbacks" / "merge_comparison.yaml").merge_comparison
    assert isinstance(instantiate(entry), ComparisonTable)


def test_an_app_that_uses_none_of_it_does_not_import_torch(tmp_path):
    app = "import hydra, sys\n@hydra.main(version_base='1.3', config_path=None)\ndef main(config):\n"
    app += "    print('torch' in sys.modules, 'merge_callback' in sys.modules)\nmain()\n"
    (tmp_path / "app.py").write_text(app)
    command = [sys.executable, "app.py", "+callbacks/merge=pma"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_a_foreign_app_sees_the_group_of_the_callback_and_nothing_else_of_ours(tmp_path):
    (tmp_path / "app.yaml").write_text("name: foreign\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert loader.list_groups("") == ["callbacks", "hydra"]
        assert loader.list_groups("callbacks") == ["merge"]
        assert set(loader.get_group_options("", ObjectType.CONFIG)) <= {"app", "_dummy_empty_config_"}
        assert loader.get_group_options("callbacks/merge") == CHOICES


def test_all_yaml_files_are_known_to_these_tests():
    groups = COMMANDS / "groups"
    known = {COMMANDS / f"{name}.yaml" for name in ("demo", "merge", "train")}
    known |= {groups / "sweep" / "grid.yaml", *(groups / "landscape" / f"{kind}.yaml" for kind in ("line", "plane"))}
    known |= {CONF / "callbacks" / "merge" / f"{choice}.yaml" for choice in CHOICES}
    known |= {CONF / "hydra" / "callbacks" / "merge_comparison.yaml"}
    assert set(CONF.parent.rglob("*.yaml")) == known
