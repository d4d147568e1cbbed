"""Forecasts of decays that have not begun: from which validations, when they are refused, and inside a run."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from merge_callback import Ema, MergeCallback
from merge_callback.apps.runs import read_validations
from merge_callback.prediction.fitted import fitted
from merge_callback.prediction.forecasts import NoForecastError, forecast, steps_of
from merge_callback.prediction.records import AnnealRecord
from merge_callback.prediction.river import Composition, Decay, River
from merge_callback.prediction.validations import FurtherMerge, StableValidation, read_validation
from tests.helpers.toys import Base, ResumableBatches, assert_same_training, fit, make

METRIC = "val_loss"
TRUTH = River(1000, level=1.5, slope=-0.4, noise=0.1)
SMA, WMA = Composition(45.0, 0.1), Composition(30.0, 7 / 55)


def validation(step, **changes):
    """A validation of a run whose losses are those of the river, with two merges of ten snapshots ten steps apart."""
    live, merged, further = (
        {METRIC: TRUTH.loss(step - made.age) + TRUTH.noise * made.squares} for made in (Composition(0, 1), SMA, WMA)
    )
    return replace(StableValidation(step, 90, live, merged, "sma", SMA, (FurtherMerge(WMA, further),)), **changes)


def validations(*steps, **changes):
    return [validation(step, **changes) for step in steps or range(700, 1001, 50)]


def test_a_run_on_a_river_is_forecast():
    for further in (None, ()):
        history = validations(**({} if further is None else {"further": further}))
        found = forecast(history, METRIC, Decay(1000, 111, "1-sqrt"))
        assert found.prediction.value == pytest.approx(TRUTH.annealed(Decay(1000, 111, "1-sqrt")), abs=2e-4)
        half = (fitted().ring if further is None else fitted().history).half(0.4 * 111 / 1111, 0.1)
        assert found.prediction.high - found.prediction.value == pytest.approx(half, rel=1e-2)
    assert "ring" not in found.source
    assert str(found).startswith("forecast 1.4")


def refusal(history, metric=METRIC, decay=None, **named):
    with pytest.raises(NoForecastError) as error:
        forecast(history, metric, decay or Decay(1000, 111), **named)
    return str(error.value)


def test_it_is_refused_with_the_reason():
    assert "no validation of the merge" in refusal([])
    assert "needs 4 validations with finite values at this rate, and there are 3" in refusal(
        validations(900, 950, 1000)
    )
    assert "no 'accuracy'; it has: val_loss" in refusal(validations(), "accuracy")
    assert "an average over every step" in refusal(validations(composition=None))
    worse = [*validations(850, 900, 950), validation(1000, merged={METRIC: 2.0})]
    assert "no better than the live model" in refusal(worse)
    assert "takes 3% of the steps at its end, and forecasts were measured for 4% to 26%" in refusal(
        validations(), decay=Decay(1000, 31)
    )
    assert "takes 40%" in refusal(validations(), decay=Decay(1000, 667))
    assert "lies in the first tenth of the 20000 steps" in refusal(validations(), num_steps=20_000)
    assert forecast(validations(), METRIC, Decay(1000, 111), num_steps=10_000)
    for optimizer in ("SGD", "SGD, SGD", "AdamW, SGD"):
        assert f"with {optimizer}, decays gained much more" in refusal(validations(optimizer=optimizer))
    assert "hardly less noise than a single snapshot" in refusal(validations(composition=Composition(45.0, 1.0)))
    assert forecast(validations(optimizer="AdamW"), METRIC, Decay(1000, 111))
    close = validations(span_steps=18)
    assert "snapshots are 2.0 steps apart on average" in refusal(close)
    for made in (Composition(2000.0, 0.1), Composition(float("nan"), 0.1), Composition(45.0, -1.0)):
        assert "finite" in refusal(validations(composition=made))
    broken = [*validations(800, 850, 900), validation(1000, live={METRIC: float("nan")})]
    assert "finite" in refusal(broken)


def test_with_optimizers_unlike_adam_the_interval_is_wider_and_says_why():
    of_adam, of_muon = (
        forecast(validations(optimizer=name), METRIC, Decay(1000, 111)) for name in ("AdamW, FusedAdam", "Muon, AdamW")
    )
    ours, theirs = of_adam.prediction, of_muon.prediction
    assert ours == forecast(validations(), METRIC, Decay(1000, 111)).prediction
    assert theirs.value == ours.value
    assert theirs.high - theirs.value == pytest.approx(fitted().unlike_adam * (ours.high - ours.value))
    assert theirs.value - theirs.low == pytest.approx(fitted().unlike_adam * (ours.value - ours.low))
    assert fitted().unlike_adam > 1
    assert "with Muon, AdamW in a wide interval" in of_muon.source
    assert "wide" not in of_adam.source


def test_only_validations_at_the_same_rate_and_of_the_same_merge_count():
    earlier = [replace(each, phase=1, merged={METRIC: 0.3}) for each in validations(500, 550, 600)]
    assert "there are 3" in refusal([*earlier, *validations(900, 950, 1000, phase=2)])
    now = validations(phase=2)
    expected = forecast(now, METRIC, Decay(1000, 111))
    assert forecast([*earlier, *now], METRIC, Decay(1000, 111)) == expected
    others = [replace(each, rule="wma", merged={METRIC: 0.3}) for each in validations(500, 550, 600, phase=2)]
    assert forecast([*others, *now], METRIC, Decay(1000, 111)) == expected
    # A value that is no number costs its validation alone.
    hole = validation(925, merged={METRIC: float("inf")}, phase=2)
    assert forecast([*now[:5], hole, *now[5:]], METRIC, Decay(1000, 111)) == expected


def anneal(start, annealed, shape="linear", run="own"):
    return AnnealRecord(run, start, start + 100, 100, shape, {METRIC: annealed})


def test_real_anneals_of_the_run_shift_it():
    history = validations(*range(500, 1001, 50))
    plain = forecast(history, METRIC, Decay(1000, 111)).prediction
    half = plain.high - plain.value
    above = {start: TRUTH.annealed(Decay(start, 100)) + 0.004 for start in (800, 900)}

    def shifted(*anneals):
        found = forecast(history, METRIC, Decay(1000, 111), anneals=anneals)
        assert found.prediction.high - found.prediction.low == pytest.approx(plain.high - plain.low)
        return found

    def error_then(start):
        """What the forecast at that step was off by, in half its interval."""
        then = forecast([each for each in history if each.step <= start], METRIC, Decay(start, 100)).prediction
        return (above[start] - then.value) / (then.high - then.value)

    one = shifted(anneal(900, above[900]))
    assert one.prediction.value - plain.value == pytest.approx(0.5 * error_then(900) * half)
    assert "1 real anneals of this run" in one.source
    two = shifted(anneal(800, above[800]), anneal(900, above[900]))
    mean = (error_then(800) + error_then(900)) / 2
    assert two.prediction.value - plain.value == pytest.approx(2 / 3 * mean * half)
    # One that is far off shifts by no more than three halves of the interval, less what one is believed.
    assert shifted(anneal(900, 99.0)).prediction.value - plain.value == pytest.approx(1.5 * half)
    # Nor does one of a length that is not forecast.
    short = AnnealRecord("own", 900, 910, 10, "linear", {METRIC: 1.6})
    assert shifted(short).prediction == plain
    # Where the run was not validated at the beginning, too early, or without the metric, there is nothing to compare.
    for useless in (
        anneal(910, 9.0),
        anneal(550, 9.0),
        replace(anneal(900, 0.0), annealed={}),
        anneal(900, 1.0, "step"),
    ):
        assert shifted(useless).prediction == plain


def test_lengths_are_shares_or_steps():
    assert (steps_of(0.25, 300), steps_of(7, 300), steps_of(0.001, 10)) == (100, 7, 1)


def test_validations_pass_through_files():
    found = validation(1000, phase=3)
    assert read_validation(asdict(found)) == found
    for wrong in (
        {"composition": {"age": "x", "squares": 1}},
        {"composition": 3},
        {"further": [{"merged": {}}]},
        {"phase": 1.5},
    ):
        with pytest.raises(ValueError, match=r"age|composition|phase"):
            read_validation(asdict(found) | wrong)


class Valley(Base):
    """A river with noise: one weight drifts and the loss falls with it as a power law, the others jump about.

    The noise of the gradients is drawn in training; a decay of the rate takes it away.
    """

    def __init__(self, decay_at=None, decay_steps=0):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.walls = nn.Parameter(torch.zeros(2000))
        self.decay_at, self.decay_steps = decay_at, decay_steps

    def training_step(self, batch, batch_idx):
        noise = torch.randn(2000, generator=torch.Generator().manual_seed(self.global_step)).to(self.device)
        # The noise of two steps that are seven apart is correlated by 1 / e.
        return 0.0666 * self.walls.square().sum() + (noise * self.walls).sum() - self.place.sum()

    def validation_step(self, batch, batch_idx):
        river = 4 * (1 + self.place.sum() / 50) ** -0.5
        self.log("val_loss", river + 0.03 * self.walls.square().mean(), prog_bar=True)
        self.log("accuracy", -self.walls.mean())

    def multiplier(self, step):
        begins = self.decay_at
        return 1.0 if begins is None or step < begins else max(0.0, 1 - (step - begins) / self.decay_steps)

    def configure_optimizers(self):
        # A gradient that is mostly noise of size one: steps are the gradients themselves.
        optimizer = torch.optim.AdamW(self.parameters(), lr=1.0, betas=(0.0, 0.99), weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.multiplier)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


RING = {"sma": "sma", "wma": "wma"}
SHORT = {"val_check_interval": 20, "log_every_n_steps": 20, "limit_val_batches": 1}


def in_valley_of(kind, folder, *callbacks, max_steps=400, ckpt_path=None, **module):
    arguments = {"max_steps": max_steps, "ckpt_path": ckpt_path, "train": ResumableBatches(20), **SHORT}
    return fit(make(kind, **module), folder, *callbacks, **arguments)


def in_valley(folder, *callbacks, **arguments):
    return in_valley_of(Valley, folder, *callbacks, **arguments)


@pytest.mark.parametrize("merges", ["sma", RING], ids=["history", "ring"])
@pytest.mark.sample(1)
def test_a_run_logs_what_a_decay_would_give_and_checks_it_when_it_decays(tmp_path, merges, caplog):
    callback = MergeCallback(10, 10, merges=merges, forecast=0.1, higher_is_better=["accuracy"])
    run = in_valley(tmp_path, callback, max_steps=460, decay_at=400, decay_steps=60)
    forecasts = [{end: dict(run.logged(f"forecast/{METRIC}{end}")) for end in ("", "/low", "/high")}][0]
    # Once the merge is better than the live model at each validation, and as it was while the rate decays.
    assert len(forecasts[""]) > 5
    said = caplog.text
    # The first three validations are too few, which goes without saying.
    assert said.count("no forecast/val_loss at step 80: the merge is no better than the live model") == 1
    assert said.count("no forecast/") == 1
    ends = dict(run.logged("merge/forecast_end"))
    assert ends[399] == ends[439] == 444
    # Reports read it back.
    read = {each.step: each for each in read_validations(Path(run.trainer.logger.log_dir) / "metrics.csv", METRIC)}
    assert (read[400].forecast.value, read[400].forecast_end) == (forecasts[""][399], 444)
    assert read[20].forecast is read[20].forecast_end is None
    source = "the validations so far" if merges == "sma" else "merges of one ring and the validations so far"
    assert f"forecast/val_loss stands on {source}" in said
    assert forecasts[""].keys() == forecasts["/low"].keys() == forecasts["/high"].keys()
    assert all(forecasts["/low"][step] < value < forecasts["/high"][step] for step, value in forecasts[""].items())
    assert forecasts[""][399] == forecasts[""][419] == forecasts[""][439]
    assert not run.logged("forecast/accuracy")
    last = callback.session.validation.predictions.forecaster.forecasts[METRIC]
    assert last.decay == Decay(400, 44)
    # The run is validated at the end of its decay, and the forecast made before it was right.
    live = float(run.epoch_metrics[-1][METRIC])
    (told,) = [line.split() for line in said.splitlines() if line.startswith("val_loss  forecast")]
    value, low, high = (f"{forecasts[end][399]:.4f}" for end in ("", "/low", "/high"))
    assert told == ["val_loss", "forecast", value, low, "to", high, f"{live:.4f}", "yes"]
    assert forecasts["/low"][399] < live < forecasts["/high"][399]
    assert float(run.epoch_metrics[-1][f"forecast_error/{METRIC}"]) == pytest.approx(
        forecasts[""][399] - live, abs=1e-6
    )


@pytest.mark.slow
def test_forecasts_leave_the_training_as_it_is_and_go_on_where_they_were(tmp_path):
    class Saving(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 320:
                trainer.save_checkpoint(tmp_path / "320.ckpt")

    def callback():
        return MergeCallback(10, 10, merges=RING, forecast=0.1)

    plain, whole = in_valley(tmp_path / "plain"), in_valley(tmp_path / "whole", callback(), Saving())
    assert_same_training(plain, whole)
    resumed = callback()
    rest = in_valley(tmp_path / "rest", resumed, ckpt_path=tmp_path / "320.ckpt")
    names = [f"forecast/{METRIC}{end}" for end in ("", "/low", "/high")]
    for name in names:
        assert rest.logged(name) == [value for value in whole.logged(name) if value[0] >= 320]
    assert len(rest.logged(names[0])) == 4
    # What the checkpoint knows is enough for a forecast before the next validation.
    loaded = callback()
    stopped = in_valley(tmp_path / "stopped", loaded, ckpt_path=tmp_path / "320.ckpt", max_steps=321)
    assert not stopped.logged(names[0])
    expected = dict(whole.logged(names[0]))[319]
    assert loaded.forecast(METRIC, span=0.1).value == pytest.approx(expected)


@pytest.mark.slow
def test_the_last_forecast_outlives_an_interruption_in_the_decay(tmp_path):
    class Saving(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.global_step == 420:
                trainer.save_checkpoint(tmp_path / "420.ckpt")

    options = {"max_steps": 460, "decay_at": 400, "decay_steps": 60}
    whole = in_valley(tmp_path / "whole", MergeCallback(10, 10, forecast=0.1), Saving(), **options)
    rest = in_valley(tmp_path / "rest", MergeCallback(10, 10, forecast=0.1), ckpt_path=tmp_path / "420.ckpt", **options)
    for name in (f"forecast/{METRIC}", f"forecast_error/{METRIC}"):
        assert float(rest.epoch_metrics[-1][name]) == float(whole.epoch_metrics[-1][name])


@pytest.mark.slow
def test_users_ask_for_other_decays(tmp_path):
    callback = MergeCallback(10, 10, merges=RING, forecast=0.1, higher_is_better=["accuracy"])
    in_valley(tmp_path, callback)
    default, linear = callback.forecast(METRIC), callback.forecast(METRIC, 44)
    assert default == linear == callback.forecast(METRIC, span=0.1)
    longer, floor = callback.forecast(METRIC, span=0.2), callback.forecast(METRIC, span=0.1, final_rate=0.5)
    assert longer.value < linear.value < floor.value
    assert callback.forecast(METRIC, span=0.1, shape="1-sqrt") != linear
    with pytest.raises(RuntimeError, match="'accuracy' is no loss"):
        callback.forecast("accuracy")
    with pytest.raises(RuntimeError, match="takes 50% of the steps at its end"):
        callback.forecast(METRIC, 400)


def test_a_rate_that_is_not_constant_is_refused(tmp_path):
    class Rooted(Valley):
        def multiplier(self, step):
            return max(1, step / 50) ** -0.5

    callback = MergeCallback(10, 10, merges=RING, start=20, forecast=0.1)
    run = in_valley_of(Rooted, tmp_path, callback)
    assert run.logged(f"merged/{METRIC}")
    assert not [row for row in run.logged(f"forecast/{METRIC}") if row[0] > 60]
    with pytest.raises(RuntimeError, match=r"rate has moved|needs 4 validations|no validation of the merge"):
        callback.forecast(METRIC)


def test_an_average_over_every_step_has_no_forecast(tmp_path, caplog):
    callback = MergeCallback(10, 10, merges={"ema": Ema(half_life_steps=20)}, forecast=0.1)
    run = in_valley(tmp_path, callback, max_steps=100)
    assert not run.logged(f"forecast/{METRIC}")
    assert "it is an average over every step" in caplog.text


@pytest.mark.slow
def test_means_forecast_as_points_do(tmp_path):
    found = {}
    for snapshot, num in (("point", 10), ("mean", 5)):
        callback = MergeCallback(100 // num, num, merges=RING, snapshot=snapshot)
        in_valley(tmp_path / snapshot, callback)
        found[snapshot] = callback.forecast(METRIC, span=0.1)
    assert found["mean"].value == pytest.approx(found["point"].value, abs=0.01)


def test_a_wrong_argument_is_named():
    callback = MergeCallback()
    for arguments, message in (
        ({"span_steps": 10, "span": 0.1}, "span_steps or span, not both, got 10 and 0.1"),
        ({}, "needs span_steps or span"),
        ({"span": 1.5}, r"span must be a share of the steps in \(0, 1\), got 1.5"),
        ({"span_steps": 0}, "span_steps must be >= 1, got 0"),
        ({"span": 0.1, "shape": "step"}, "shape must be one of linear, 1-sqrt, cosine, got 'step'"),
        ({"span": 0.1, "final_rate": -0.1}, r"final_rate must be a share of the rate in \[0, 1\], got -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            callback.forecast(METRIC, **arguments)
    for wrong, error in ((0.0, ValueError), (1.0, ValueError), (0, ValueError), ("10%", TypeError), (True, TypeError)):
        with pytest.raises(error, match="forecast must be"):
            MergeCallback(forecast=wrong)
    with pytest.raises(RuntimeError, match="no validation of the merge at a constant rate"):
        callback.forecast(METRIC, span=0.1)
