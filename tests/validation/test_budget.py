"""Merged validations that are left out so that the callback stays under its share of the wall time."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merge_callback import MergeCallback
from merge_callback.validation.budget import Budget
from tests.helpers.toys import ResumableBatches, Toy, assert_same_training, batches, fit, make


@given(st.floats(0.01, 0.5), st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.01, 5)), min_size=2, max_size=50))
def test_what_is_spent_never_exceeds_the_share_by_more_than_what_nobody_could_know(share, rounds):
    budget, elapsed, surprises = Budget(share), 0.0, 0.0
    for waited, cost in rounds:
        elapsed += waited
        if budget.allows(elapsed):
            surprises += max(0.0, cost - budget.latest)
            elapsed += cost
            budget.spend(cost, is_costly=True)
        assert budget.spent <= share * elapsed + surprises + 1e-9


class SlowValidation(Toy):
    def validation_step(self, batch, batch_idx):
        time.sleep(0.05)
        super().validation_step(batch, batch_idx)


@pytest.mark.slow
def test_merged_validations_that_cost_too_much_are_left_out_and_counted(tmp_path):
    without = fit(make(SlowValidation), tmp_path / "without")
    callback = MergeCallback(1, 4, max_overhead=0.01)
    run = fit(make(SlowValidation), tmp_path / "with", callback)
    assert_same_training(without, run)
    # A merged validation takes as long as a live one: a hundredth of the time is enough for the first only.
    assert [step for step, _ in run.logged("merged/val_loss")] == [3]
    assert [number for _, number in run.logged("merge/num_skipped")] == [0, 1, 2, 3, 4, 5]
    assert callback.snapshot_steps == [21, 22, 23, 24]


@pytest.mark.slow
def test_with_a_large_share_none_is_left_out(tmp_path):
    run = fit(make(SlowValidation), tmp_path, MergeCallback(1, 4, max_overhead=0.99))
    assert len(run.logged("merged/val_loss")) == 6


@pytest.mark.slow
def test_what_was_spent_is_remembered_over_a_restart(tmp_path):
    callback = MergeCallback(1, 4, max_overhead=0.01)
    first = fit(make(SlowValidation), tmp_path / "first", callback, train=ResumableBatches(), max_steps=6)
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    spent = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]["budget"]
    assert spent["spent"] >= spent["latest"] > 0.1
    assert spent["elapsed"] > spent["spent"]
    again = MergeCallback(1, 4, max_overhead=0.01)
    run = fit(
        make(SlowValidation), tmp_path / "again", again, train=ResumableBatches(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert not run.logged("merged/val_loss")


@pytest.mark.parametrize("share", [None, 0.5])
def test_the_count_is_logged_only_where_there_is_a_limit(tmp_path, share):
    run = fit(make(Toy), tmp_path, MergeCallback(1, 4, max_overhead=share))
    assert bool(run.logged("merge/num_skipped")) == (share is not None)


@pytest.mark.slow
def test_the_time_of_a_fit_counts_where_another_goes_on_from_it_and_that_between_them_does_not(tmp_path):
    callback = MergeCallback(1, 4, max_overhead=0.5)
    run = fit(make(SlowValidation), tmp_path, callback, max_steps=6)
    elapsed = callback.state_dict()["budget"]["elapsed"]
    assert elapsed > callback.state_dict()["budget"]["spent"] > 0
    time.sleep(0.1)
    assert callback.state_dict()["budget"]["elapsed"] == elapsed
    run.trainer.fit_loop.epoch_loop.max_steps = 12
    run.trainer.fit(run.module, batches(), batches(24, shuffle=False))
    assert callback.snapshot_steps == [9, 10, 11, 12]
    assert callback.state_dict()["budget"]["elapsed"] > elapsed
