"""Some parameters merged, the others live: by patterns, said at the start, in validation, files and after a resume."""

import logging

import pytest
import torch

from merge_callback import Ema, MergeCallback, Parts, SpikeRecovery
from merge_callback.live.names import Selection
from tests.helpers.toys import ResumableBatches, Toy, Tracker, assert_same_training, fit, make, same

MERGES = {"sma": "sma", "ema": Ema(half_life_steps=3)}


def test_what_is_excluded_is_live_and_the_rest_is_the_float64_twins_merge(tmp_path):
    callback, tracker = MergeCallback(3, 4, parts=Parts(exclude=["out.*", "inner.bias"])), Tracker()
    run = fit(make(Toy), tmp_path, callback, tracker)
    expected, state, live = (
        tracker.merged(callback.coefficients()),
        callback.merged_state_dict(),
        run.module.state_dict(),
    )
    for name in ("out.weight", "out.bias", "inner.bias"):
        assert torch.equal(state[name], live[name])
    for name in ("inner.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(state[name], live[name])


@pytest.mark.parametrize("storage", ["device", "cpu"])
@pytest.mark.slow
def test_only_what_is_included_is_merged_and_averaged(tmp_path, storage):
    callback = MergeCallback(3, 4, merges=MERGES, parts=Parts(include="out.*", exclude="*.bias"), storage=storage)
    run = fit(make(Toy), tmp_path, callback)
    whole = MergeCallback(3, 4, merges=MERGES, storage=storage)
    fit(make(Toy), tmp_path, whole)
    live = run.module.state_dict()
    for merge in MERGES:
        state = callback.merged_state_dict(merge)
        assert torch.equal(state["out.weight"], whole.merged_state_dict(merge)["out.weight"])
        assert not torch.equal(state["out.weight"], live["out.weight"])
        rest = [name for name, _ in run.module.named_parameters() if name != "out.weight"]
        assert all(torch.equal(state[name], live[name]) for name in rest)


def test_training_is_bit_identical_and_the_merge_is_validated(tmp_path):
    without = fit(make(Toy), tmp_path / "without")
    callback = MergeCallback(2, 4, merges=MERGES, parts=Parts(exclude="out.*"))
    watched = fit(make(Toy), tmp_path / "with", callback)
    assert_same_training(without, watched)
    whole = fit(make(Toy), tmp_path / "whole", MergeCallback(2, 4, merges=MERGES))
    assert [step for step, _ in watched.logged("merged/val_loss")] == [
        step for step, _ in whole.logged("merged/val_loss")
    ]
    assert watched.logged("merged/val_loss")[-1] != whole.logged("merged/val_loss")[-1]


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly_and_another_selection_starts_anew(tmp_path):
    whole = MergeCallback(2, 4, merges=MERGES, parts=Parts(exclude="out.*"))
    module = make(Toy)
    module.dropout.p = 0.0
    uninterrupted = fit(module, tmp_path / "whole", whole, train=ResumableBatches())
    first = make(Toy)
    first.dropout.p = 0.0
    run = fit(
        first,
        tmp_path / "first",
        MergeCallback(2, 4, merges=MERGES, parts=Parts(exclude="out.*")),
        train=ResumableBatches(),
        max_steps=13,
    )
    path = tmp_path / "at-13.ckpt"
    run.trainer.save_checkpoint(path)

    def resumed(**arguments):
        again, callback = make(Toy), MergeCallback(2, 4, merges=MERGES, **arguments)
        again.dropout.p = 0.0
        return fit(again, tmp_path / "again", callback, train=ResumableBatches(), ckpt_path=str(path)), callback

    second, callback = resumed(parts=Parts(exclude="out.*"))
    assert same(dict(second.module.state_dict()), dict(uninterrupted.module.state_dict()))
    for merge in MERGES:
        assert same(callback.merged_state_dict(merge), whole.merged_state_dict(merge))
    with pytest.warns(UserWarning, match="its window of 4 snapshots was dropped"):
        _, other = resumed(parts=Parts(exclude="norm.*"))
    assert other.snapshot_steps == [18, 20, 22, 24]


def test_what_is_left_out_is_said_at_the_start_of_fit(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(make(Toy), tmp_path, MergeCallback(parts=Parts(exclude=["out.*", "*.bias"])))
    (line,) = [line for line in caplog.messages if line.startswith("MergeCallback('merge'): sma: up to")]
    # Two biases of six, a matrix of eighteen and a bias of three.
    assert "without 4 parameters of 33 elements, which stay live (inner.bias, norm.bias, out.weight, ...)" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"exclude": "*.router.*"},
            r"exclude='\*\.router\.\*' fits no parameter; there are inner\.weight, inner\.bias",
        ),
        ({"include": ["out.*", "lora"]}, r"include='lora' fits no parameter"),
        ({"exclude": "*"}, r"Parts\(include=\('\*',\), exclude=\('\*',\)\) leave no trainable parameter to merge"),
        ({"include": "frozen.*"}, r"leave no trainable parameter to merge"),
    ],
)
def test_patterns_that_fit_nothing_or_leave_nothing_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(make(Toy), tmp_path, MergeCallback(parts=Parts(**arguments)))


def test_patterns_are_checked_when_the_callback_is_made():
    with pytest.raises(TypeError, match=r"exclude must be a pattern of names or a list of them, got 3"):
        Parts(exclude=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"include must name at least one pattern, got \[\]"):
        Parts(include=[])
    assert MergeCallback(parts=Parts(exclude=["*.router.*"])).parts.selection == Selection(exclude=("*.router.*",))


def test_recovery_refuses_a_callback_that_leaves_parameters_out():
    with pytest.raises(ValueError, match="must merge all parameters, or those it leaves out would stay in the spike"):
        SpikeRecovery(MergeCallback(parts=Parts(exclude="out.*")))
