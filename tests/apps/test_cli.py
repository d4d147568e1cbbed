"""The console command: what it lists and explains, and its exit codes."""

import subprocess

import pytest
from omegaconf import OmegaConf

from merge_callback.apps import cli
from tests.helpers.commands import MERGE_CALLBACK, merge_callback

NAMES = ["demo", "train", "merge", "sweep", "landscape", "plan", "report"]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_with_a_line_each(capsys, arguments):
    cli.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == NAMES
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_each_command_says_what_it_does_with_an_example(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  merge-callback {name} " in text
    assert "hydra" not in text.replace("${hydra:runtime.output_dir}", "").lower() or name == "train"
    assert "== Config ==" not in text


@pytest.mark.parametrize("name", ["demo", "merge", "sweep", "landscape"])
def test_every_entry_of_the_config_is_listed_with_its_default(name):
    command = cli.COMMANDS[name]
    config = OmegaConf.load(cli.files("merge_callback.apps") / "commands" / command.entries)
    listed = [line.split()[:2] for line in cli.entries(command.entries, command.group) if line[2] != " "]
    assert len(listed) > 5
    for path, default in listed:
        # What is listed is there, and a plain value is the one of the file.
        parent, _, key = path.removeprefix(command.group).rpartition(".")
        owner = OmegaConf.select(config, parent) if parent else config
        assert key in OmegaConf.to_container(owner, resolve=False)
        if not OmegaConf.is_missing(owner, key) and not OmegaConf.is_interpolation(owner, key):
            value = owner[key]
            assert default == str(value) or not isinstance(value, int) or isinstance(value, bool)
    tops = {path.removeprefix(command.group).partition(".")[0] for path, _ in listed}
    assert tops == set(config) - {"defaults", "hydra"}


def test_a_command_that_is_not_there_is_a_wrong_call(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["swep"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "there is no command 'swep'" in told
    assert "  sweep " in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "merge-callback merge: checkpoints and output must be given"),
        (["merge", "checkpoint=a.ckpt"], "Could not override 'checkpoint'"),
        (["report"], "the following arguments are required: RUN_OR_RECORDS"),
        (["report", "nothing.jsonl"], "merge-callback report: nothing.jsonl does not exist; give the folder of a run"),
        (["train"], "merge-callback train: the config has no entry 'model'"),
    ],
)
def test_a_wrong_call_ends_with_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = merge_callback(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_exit_codes_are_those_of_the_program_too(tmp_path):
    command = [MERGE_CALLBACK, "merge", "checkpoint=a.ckpt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Could not override 'checkpoint'" in done.stderr


def test_a_run_that_fails_ends_with_exit_code_1(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text(
        "model: {_target_: lightning.pytorch.demos.boring_classes.BoringModel}\n"
        "data: {_target_: lightning.pytorch.demos.boring_classes.BoringDataModule}\n"
        "trainer: {_target_: lightning.pytorch.Trainer, max_steps: 1, enable_checkpointing: false}\n"
        "resume_from: missing.ckpt\n"
    )
    monkeypatch.chdir(tmp_path)
    done = merge_callback("train", "--config-dir", "conf", "--config-name", "train")
    assert done.returncode == 1
    assert "missing.ckpt" in done.stderr
