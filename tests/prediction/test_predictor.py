"""Predictions inside a run: from which records, when, under which names, and how wrong they turn out to be."""

import json
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from merge_callback import AnnealBranch, Ema, MergeCallback, Window
from merge_callback.prediction.bias import BranchOutcome, calibrate
from merge_callback.prediction.predictor import AnnealPredictor
from merge_callback.prediction.records import AnnealRecord, append_record, read_records
from merge_callback.prediction.validations import StableValidation, run_identity
from tests.helpers.toys import ResumableBatches, Toy, fit, make

METRIC = "val_loss"


def values(step, live=1.5, merged=1.4, rule="sma", span_steps=None):
    return StableValidation(step, span_steps or step // 10, {METRIC: live}, {METRIC: merged}, rule)


def record(step, annealed, run="other", span=0.1, shape="linear", **matched):
    span_steps = round(step * span)
    return AnnealRecord(
        run, step - span_steps, step, span_steps, shape, {METRIC: annealed}, matched=values(step, **matched)
    )


def calibration(tmp_path, *records):
    for each in records:
        append_record(tmp_path / "anneals.jsonl", each)
    found = AnnealPredictor(tmp_path / "anneals.jsonl")
    found.read()
    return found


def fitted(predictor, history, metric=METRIC):
    """What a prediction after these validations stands on; None if there is nothing."""
    predictor.history = list(history)
    return predictor.fit(metric, [METRIC])


def predicted(predictor, history):
    return fitted(predictor, history).predict(history[-1], METRIC)


def still():
    module = make(Toy)
    module.dropout.p = 0.0
    return module


def test_other_runs_teach_alone_and_beside_two_branches_of_the_run_itself(tmp_path):
    history = [values(step) for step in (100, 200, 300, 400)]
    run = run_identity(history)
    others = [record(1000, 1.30), record(2000, 1.30)]
    own = [record(100, 1.35, run), record(200, 1.35, run), record(300, 1.25, run)]
    anneals = calibration(tmp_path, *others)
    assert predicted(anneals, history).value == pytest.approx(1.5 - 2 * 0.1)
    anneals = calibration(tmp_path, own[0])
    assert "2 real anneals of other runs" in str(fitted(anneals, history))
    # One more of its own is not yet known at step 200; then later ones count by the square of their step, and the two
    # of other runs one each: ratios of 1.5, 1.5, 2.5, and 2 and 2.
    anneals = calibration(tmp_path, *own[1:])
    assert predicted(anneals, history[:2]).value == pytest.approx(1.5 - (1.5 * (0.25 + 1) + 2 * 2) / 3.25 * 0.1)
    ratio = (1.5 * (1 + 4) / 16 + 2.5 * 9 / 16 + 2 * 2) / (14 / 16 + 2)
    assert predicted(anneals, history).value == pytest.approx(1.5 - ratio * 0.1)
    # A branch that ends later than now is not known yet.
    assert fitted(anneals, history[:2]).calibration.num_branches == 4
    assert fitted(anneals, history).calibration.num_branches == 5
    assert re.search(
        r"a linear decay over the last 10% .* 3 real anneals of this run and 2 real anneals of other runs",
        str(fitted(anneals, history)),
    )


def test_one_branch_is_not_enough(tmp_path):
    history = [values(100), values(200)]
    assert fitted(calibration(tmp_path), history) is None
    assert fitted(calibration(tmp_path, record(100, 1.3)), history) is None
    assert fitted(calibration(tmp_path, record(200, 1.3)), history, "accuracy") is None


def test_runs_that_merge_by_another_rule_say_nothing(tmp_path):
    history = [values(100, rule="wma")]
    assert fitted(calibration(tmp_path, record(100, 1.3), record(200, 1.3)), history) is None


def test_branches_without_a_match_say_nothing(tmp_path):
    unmatched = [AnnealRecord("other", 90, step, 10, "linear", {METRIC: 1.3}) for step in (100, 200)]
    assert fitted(calibration(tmp_path, *unmatched), [values(100)]) is None


def test_decays_of_the_span_of_the_merge_count(tmp_path):
    short = [record(step, 1.38, span=0.1) for step in (1000, 2000)]
    long = [record(step, 1.30, span=0.22) for step in (1000, 2000)]
    longer = [record(step, 1.32, span=0.2, shape="1-sqrt") for step in (1000, 2000)]
    anneals = calibration(tmp_path, *longer, *long, *short)
    assert predicted(anneals, [values(100, span_steps=9)]).value == pytest.approx(1.38)
    assert predicted(anneals, [values(100, span_steps=21)]).value == pytest.approx(1.30)
    assert fitted(anneals, [values(100, span_steps=21)]).shape == "linear"


def test_the_prior_predicts_from_the_first_validation_with_its_spread_as_interval():
    anneals = AnnealPredictor("prior")
    near, far = (predicted(anneals, [values(1000, merged=merged)]) for merged in (1.49, 1.4))
    assert far.low < far.value < far.high < 1.41
    assert (far.high - far.low) == pytest.approx(10 * (near.high - near.low))
    wide = predicted(anneals, [values(1000, span_steps=200)])
    assert wide.value < far.value
    assert "by the prior" in str(fitted(anneals, [values(1000)]))


def prefilled(path, rule="sma"):
    append_record(path, record(1000, 1.375, rule=rule, span=0.3))
    append_record(path, record(2000, 1.370, rule=rule, span=0.3))
    return path


def test_predictions_are_logged_beside_the_live_values_with_their_interval(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=path))
    bias = calibrate([BranchOutcome(1.5, 1.4, 1.375), BranchOutcome(1.5, 1.4, 1.370)])
    assert [step for step, _ in run.logged(f"annealed/{METRIC}")] == [step for step, _ in run.logged(METRIC)]
    for metrics in run.epoch_metrics:
        prediction = bias.predict(float(metrics[METRIC]), float(metrics[f"merged/{METRIC}"]))
        for name, expected in (("", prediction.value), ("/low", prediction.low), ("/high", prediction.high)):
            assert float(metrics[f"annealed/{METRIC}{name}"]) == pytest.approx(expected, rel=1e-5)
        # The records know nothing of the accuracy.
        assert "annealed/val_accuracy" not in metrics


def test_another_callback_predicts_under_its_own_name(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=path, name="short"))
    assert run.logged(f"annealed_short/{METRIC}")
    assert not run.logged(f"annealed/{METRIC}")


@pytest.mark.slow
def test_with_a_limit_the_merge_of_the_history_is_the_live_value_minus_the_gain(tmp_path):
    callback = MergeCallback(1, 4, limit_batches=1)
    run = fit(make(Toy), tmp_path, callback)
    for metrics, known in zip(run.epoch_metrics, callback.state_dict()["history"], strict=True):
        live, gain = float(metrics[METRIC]), float(metrics[f"merge_gain/{METRIC}"])
        assert known["live"][METRIC] == live
        assert known["merged"][METRIC] == pytest.approx(live - gain, abs=1e-6)
        assert known["merged"][METRIC] == float(metrics[f"merged/{METRIC}"])


class Growing(Callback):
    """Adds branches of the trunk to its records while it runs: they end where the trunk was validated or will be."""

    def __init__(self, path, callback):
        self.path, self.callback = path, callback

    def on_train_batch_end(self, trainer, pl_module, *_):
        history = [StableValidation(**known) for known in self.callback.state_dict()["history"]]
        if trainer.global_step in (9, 13):
            end = trainer.global_step + 3
            append_record(self.path, AnnealRecord(run_identity(history), end - 2, end, 2, "linear", {METRIC: 1.0}))


def test_the_trunk_completes_the_records_of_its_branches_and_predicts_from_then_on(tmp_path):
    path = tmp_path / "anneals.jsonl"
    callback = MergeCallback(1, 4, calibration=path)
    run = fit(make(Toy), tmp_path, callback, Growing(path, callback))
    assert [step + 1 for step, _ in run.logged(f"annealed/{METRIC}")] == [16, 20, 24]
    for found in read_records(path):
        at_end = run.epoch_metrics[found.step // 4 - 1]
        assert found.matched.live == {k: float(at_end[k]) for k in (METRIC, "val_accuracy")}
        assert found.matched.merged == {k: float(at_end[f"merged/{k}"]) for k in (METRIC, "val_accuracy")}
    # Each line was written once more, and no more than once.
    assert len(path.read_text().splitlines()) == 4


def test_a_prediction_is_checked_by_the_decay_of_the_run_itself(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    callback = MergeCallback(1, 4, calibration=path, evaluate_every_n_validations=2)
    run = fit(make(Decaying), tmp_path, callback)
    predictions = dict(run.logged(f"annealed/{METRIC}"))
    # The rate decays from step 17 on; the latest prediction before stays.
    assert predictions[19] == predictions[23] == predictions[15]
    ((step, error),) = run.logged(f"annealed_error/{METRIC}")
    assert step == 23
    assert error == pytest.approx(predictions[15] - dict(run.logged(METRIC))[23], abs=1e-6)
    assert [known["step"] for known in callback.state_dict()["history"]] == [8, 16]


def test_without_a_decay_there_is_no_error_to_log(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=path))
    assert not run.logged(f"annealed_error/{METRIC}")


def test_the_prior_is_labelled_and_leaves_out_what_is_no_loss(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration="prior"))
    # Where the merge is no better than the live model, what was found of good merges says nothing.
    better = [step for step, gain in run.logged(f"merge_gain/{METRIC}") if gain > 0]
    assert [step for step, _ in run.logged(f"annealed/{METRIC}")] == better
    assert 0 < len(better) < 6
    assert not run.logged("annealed/val_accuracy")
    assert run.logged("merge/is_prior") == [(step, 1.0) for step in better]
    assert "annealed/val_loss predicts a linear decay" in caplog.text
    assert "by the prior" in caplog.text


def test_uncalibrated_is_said_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=tmp_path / "none.jsonl"))
    assert not run.logged(f"annealed/{METRIC}")
    assert caplog.text.count("uncalibrated until ") == 1


def test_records_that_cannot_be_read_end_a_run_at_its_start_only(tmp_path):
    path = tmp_path / "anneals.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1, is not a record"):
        fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=path))

    class Spoiling(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 10:
                path.write_text(path.read_text() + "nonsense\n")

    path.unlink()
    prefilled(path)
    with pytest.warns(UserWarning, match=r"left out of the records: .*line 3, is not a record"):
        run = fit(make(Toy), tmp_path, MergeCallback(1, 4, calibration=path), Spoiling())
    assert len(run.logged(f"annealed/{METRIC}")) == 6


@pytest.mark.parametrize("when", [0, 10])
@pytest.mark.parametrize(
    "odd",
    [
        {"start_step": 0, "step": 0},
        {"annealed": {METRIC: "low"}},
        {"annealed": {METRIC: None}},
        {"annealed": {METRIC: 1e300}},
        {"annealed": {}},
        {"matched": None},
        {"step": 10**400, "span_steps": 10**399},
        {"start_step": 0, "step": 10**400, "span_steps": 1},
        {"run": "\ud800"},
    ],
    ids=str,
)
@pytest.mark.sample(1)
def test_no_odd_line_of_another_writer_ends_a_run_or_changes_a_prediction(tmp_path, odd, when):
    path, plain = tmp_path / "odd.jsonl", tmp_path / "plain.jsonl"
    prefilled(path)
    prefilled(plain)
    line = json.dumps(json.loads(path.read_text().splitlines()[0]) | {"shape": "cosine"} | odd)

    class Writing(Callback):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step == when:
                with path.open("a") as file:
                    file.write(line + "\n")

    if not when:
        path.write_text(path.read_text() + line + "\n")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*left out of the records: .*, line [34], is not a record of an anneal: ")
        runs = [
            fit(make(Toy), tmp_path / each.stem, MergeCallback(1, 4, calibration=each), *([Writing()] if when else []))
            for each in (path, plain)
        ]
    annealed = [run.logged(f"annealed/{METRIC}") for run in runs]
    assert annealed[0] == annealed[1] != []


@pytest.mark.parametrize("wrong", [3, True, ["a"]])
def test_a_calibration_of_another_type_is_named(wrong):
    with pytest.raises(TypeError, match=r"calibration must be a file of records, 'prior' or None, got"):
        MergeCallback(calibration=wrong)


def test_branches_of_a_real_trunk_calibrate_the_rest_of_it(tmp_path):
    """The whole way: trunk, two branches, the trunk goes on and predicts, as its records say by hand."""

    class Saving(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step in (8, 12, 16):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    path, merges = tmp_path / "anneals.jsonl", {"late": Window(span=0.3)}
    merging = MergeCallback(1, 6, merges=merges, calibration=path)
    fit(still(), tmp_path / "trunk", merging, Saving(), max_steps=16, train=ResumableBatches())
    for start in (8, 12):
        callbacks = MergeCallback(1, 6, merges=merges), AnnealBranch(4, record=path)
        checkpoint = tmp_path / f"{start}.ckpt"
        fit(still(), tmp_path / "branch", *callbacks, train=ResumableBatches(), ckpt_path=checkpoint)
    resumed = MergeCallback(1, 6, merges=merges, calibration=path)
    run = fit(still(), tmp_path / "on", resumed, train=ResumableBatches(), ckpt_path=tmp_path / "16.ckpt")
    found = read_records(path)
    assert [each.matched.step for each in found] == [12, 16]
    assert [each.forecast.step for each in found] == [8, 12]
    bias = calibrate(
        [
            BranchOutcome(r.matched.live[METRIC], r.matched.merged[METRIC], r.annealed[METRIC], (r.step / 24) ** 2)
            for r in found
        ]
    )
    last = run.epoch_metrics[-1]
    predicted = bias.predict(float(last[METRIC]), float(last[f"merged/{METRIC}"]))
    assert float(last[f"annealed/{METRIC}"]) == pytest.approx(predicted.value, rel=1e-5)


def test_branches_matched_under_another_rule_say_nothing_of_this_run_either(tmp_path):
    history = [values(step, rule="wma") for step in (100, 200)]
    own = [record(step, 1.35, run_identity(history)) for step in (100, 200)]
    assert fitted(calibration(tmp_path, *own), history) is None


def test_callbacks_with_other_rules_know_one_run(tmp_path):
    callbacks = MergeCallback(1, 4), MergeCallback(merges=Ema(half_life_steps=3), name="ema")
    fit(make(Toy), tmp_path, *callbacks)
    histories = [[StableValidation(**known) for known in each.state_dict()["history"]] for each in callbacks]
    assert run_identity(histories[0]) == run_identity(histories[1])
    assert histories[0][0].rule != histories[1][0].rule


class Decaying(Toy):
    """Constant up to step 16, then down to zero over the next eight steps."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (24 - step) / 8))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_values_of_a_decay_are_no_trunk_s_whenever_capturing_began(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    callback = MergeCallback(1, 4, start=0, calibration=path)
    run = fit(make(Decaying), tmp_path, callback)
    assert [known["step"] for known in callback.state_dict()["history"]] == [4, 8, 12, 16]
    assert len(run.logged(f"annealed_error/{METRIC}")) == 1


def test_a_decay_that_ends_without_a_validation_leaves_its_prediction_unchecked_and_says_so(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    with pytest.warns(UserWarning, match="ended at step 24, in a decay, without a validation there"):
        run = fit(make(Decaying), tmp_path, MergeCallback(1, 4, calibration=path), val_check_interval=5)
    assert not run.logged(f"annealed_error/{METRIC}")


def test_merges_of_an_earlier_phase_are_no_history_of_the_new_one(tmp_path):
    class Stepped(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 13 else 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    path = prefilled(tmp_path / "anneals.jsonl")
    callback = MergeCallback(10, 4, calibration=path)
    run = fit(make(Stepped), tmp_path, callback)
    # The second phase has its first snapshot at step 20; until then the merge is of the first.
    assert [known["step"] for known in callback.state_dict()["history"]] == [12, 20, 24]
    assert [step + 1 for step, _ in run.logged(f"annealed/{METRIC}")] == [12, 20, 24]


def test_a_run_resumed_without_calibration_predicts_nothing(tmp_path):
    path = prefilled(tmp_path / "anneals.jsonl")
    first = fit(still(), tmp_path / "a", MergeCallback(1, 4, calibration=path), train=ResumableBatches(), max_steps=12)
    first.trainer.save_checkpoint(tmp_path / "12.ckpt")
    run = fit(still(), tmp_path / "b", MergeCallback(1, 4), train=ResumableBatches(), ckpt_path=tmp_path / "12.ckpt")
    assert not run.logged(f"annealed/{METRIC}")


@pytest.mark.parametrize("wrong", ["", "."])
def test_a_calibration_that_is_no_file_is_refused(wrong):
    with pytest.raises(ValueError, match=r"calibration must be a file of records, not a folder"):
        MergeCallback(calibration=wrong)


def test_an_average_over_every_step_is_a_proxy_too(tmp_path):
    rule = repr(Ema(half_life_steps=3))
    path = prefilled(tmp_path / "anneals.jsonl", rule)
    run = fit(make(Toy), tmp_path, MergeCallback(merges=Ema(half_life_steps=3), calibration=path))
    assert len(run.logged(f"annealed/{METRIC}")) == 6


def test_a_prior_of_other_optimizers_or_spans_says_so():
    def source(optimizer, span_steps):
        predictor = AnnealPredictor("prior")
        now = StableValidation(1000, span_steps, {METRIC: 2.0}, {METRIC: 1.5}, optimizer=optimizer)
        predictor.learn(now, [METRIC], may_write=False)
        return predictor.fits[METRIC].source

    assert source("AdamW", 100) == "the prior"
    assert source("Muon, AdamW", 100) == "the prior, which comes from runs with AdamW and not Muon, AdamW"
    assert source("AdamW", 20) == "the prior, whose windows are longer than this one"
    assert source("AdamW", 500) == "the prior, whose windows are shorter than this one"
