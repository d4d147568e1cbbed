"""Averages over every step: their mean age against theory, other widths by synthesis, dtypes, resume."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from merge_callback import Ema, MergeCallback, PowerEma
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.moving import HostUpdates
from merge_callback.capture.running_averages import RunningAverages, Shadow
from merge_callback.checkpoints.write import read_provenance
from merge_callback.merging.averages import is_average, synthesis_coefficients
from merge_callback.merging.combine import CHUNK_NUMEL
from tests.helpers.toys import ResumableBatches, Toy, Tracker, fit, make, same


def ramp(average, gap, last, first=0):
    """The average of x_t = t, updated every so many steps."""
    shadow = Shadow(average)
    for step in range(first + gap, last + 1, gap):
        shadow.update(step, {"x": torch.tensor([float(step)], dtype=torch.float64)})
    return shadow.tensors["x"].item()


@pytest.mark.parametrize("gap", [1, 3, 10, 40])
@pytest.mark.parametrize("half_life_steps", [5, 20, 100.5])
def test_the_mean_age_of_a_half_life_average_is_that_of_theory(half_life_steps, gap):
    last = 4800
    beta = 0.5 ** (gap / half_life_steps)
    assert last - ramp(Ema(half_life_steps=half_life_steps), gap, last) == pytest.approx(gap * beta / (1 - beta))


@pytest.mark.parametrize("gap", [1, 2, 5])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
@pytest.mark.sample(3)
def test_the_mean_age_of_a_power_function_average_is_that_of_theory(sigma_rel, gap):
    # The mean of s under s^gamma on [0, t] is t (gamma + 1) / (gamma + 2), up to half an update interval.
    last, average = 20_000, PowerEma(sigma_rel)
    mean = last * (average.gamma + 1) / (average.gamma + 2)
    assert ramp(average, gap, last) == pytest.approx(mean + gap / 2, abs=gap / 2 + 1)
    assert average.span_steps(last) == pytest.approx(2 * (last - mean))


def test_the_mean_age_of_a_share_of_training_grows_with_training():
    average = Ema(half_life=0.05)
    for last in (2000, 20_000):
        assert last - ramp(average, 1, last) == pytest.approx(average.span_steps(last) / 2, rel=0.01)


def test_late_in_a_long_run_an_average_in_float32_still_follows_the_weights():
    average, first, num_steps = Ema(half_life=0.05), 1_000_000, 15_000
    begun = 1 + torch.rand(32, generator=torch.Generator().manual_seed(0)) / 2
    shadow, twin = Shadow(average), begun.double()
    shadow.update(first, {"x": begun})
    for step in range(first + 1, first + num_steps + 1):
        # Weights move by two parts in ten thousand in a thousand steps.
        live = begun * (1 + 2e-7 * (step - first))
        shadow.update(step, {"x": live})
        twin.lerp_(live.double(), 1 - average.beta(step, 1))
    assert (shadow.tensors["x"] - twin).norm() < 0.05 * (twin - begun).norm()
    assert shadow.step > first + num_steps - 20


def test_a_half_life_of_a_fixed_length_stands_for_a_span_of_twice_the_mean_age():
    average = Ema(half_life_steps=200)
    assert 2 * (9000 - ramp(average, 1, 9000)) == pytest.approx(average.span_steps(9000), rel=0.01)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2])
def test_a_power_function_average_has_the_width_it_says(sigma_rel):
    gamma = PowerEma(sigma_rel).gamma
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel)


@pytest.mark.parametrize("wanted", [0.04, 0.07, 0.12, 0.15])
def test_another_width_is_synthesised_from_stored_averages(wanted):
    """On x_t = sqrt(t): the combination of averages stored along the run against the average kept directly."""
    last = 4000
    shadows = {width: Shadow(PowerEma(width)) for width in (0.05, 0.1)}
    direct = Shadow(PowerEma(wanted))
    stored = []
    for step in range(1, last + 1):
        live = {"x": torch.tensor([math.sqrt(step)], dtype=torch.float64)}
        direct.update(step, live)
        for width, shadow in shadows.items():
            shadow.update(step, live)
            if step % 250 == 0:
                stored.append((step, PowerEma(width), shadow.tensors["x"].item()))
    coefficients = synthesis_coefficients([(step, average) for step, average, _ in stored], last, PowerEma(wanted))
    assert sum(coefficients) == pytest.approx(1)
    synthesised = sum(c * value for c, (_, _, value) in zip(coefficients, stored, strict=True))
    assert synthesised == pytest.approx(direct.tensors["x"].item(), abs=2e-3 * math.sqrt(last))
    nearest = min(abs(value - direct.tensors["x"].item()) for step, _, value in stored if step == last)
    assert abs(synthesised - direct.tensors["x"].item()) < nearest / 10


def test_nothing_is_synthesised_from_nothing():
    with pytest.raises(ValueError, match="no stored averages"):
        synthesis_coefficients([], 100, PowerEma(0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_of_narrow_weights_are_not_lost(dtype):
    # The increment is far below half a unit in the last place of bfloat16 near one.
    shadow = Shadow(Ema(half_life_steps=1000))
    shadow.update(0, {"x": torch.ones(3, dtype=dtype)})
    for step in range(1, 1001):
        shadow.update(step, {"x": torch.full((3,), 1.5, dtype=dtype)})
    assert shadow.tensors["x"].dtype == torch.float32
    assert torch.allclose(shadow.tensors["x"], torch.tensor(1.25), atol=1e-4)


def test_a_shadow_follows_float64_and_mixed_dtypes():
    live = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(3), "c": torch.zeros(1, dtype=torch.bfloat16)}
    shadow = Shadow(Ema(half_life_steps=1))
    shadow.update(1, live)
    shadow.update(2, {name: tensor + 1 for name, tensor in live.items()})
    assert [tensor.dtype for tensor in shadow.tensors.values()] == [torch.float64, torch.float32, torch.float32]
    assert all(torch.all(tensor == 0.5) for tensor in shadow.tensors.values())
    views = RowLayout(live).views(shadow.write_row_(RowLayout(live).new_row(), RowLayout(live)))
    assert {name: view.dtype for name, view in views.items()} == {name: t.dtype for name, t in live.items()}


def test_large_narrow_weights_are_averaged_as_small_ones():
    flat, transposed = torch.zeros(2 * CHUNK_NUMEL + 5), torch.zeros(3, 2).t()
    live = {name: tensor.bfloat16() for name, tensor in {"flat": flat, "transposed": transposed}.items()}
    shadow = Shadow(Ema(half_life_steps=1))
    shadow.update(1, live)
    shadow.update(2, {name: torch.ones_like(tensor) for name, tensor in live.items()})
    assert all(torch.all(tensor == 0.5) for tensor in shadow.tensors.values())


def test_averages_in_host_memory_are_made_of_the_weights_as_they_were_at_each_step():
    """The weights change at once after each update is begun, as those of a training do."""
    live = {"a": torch.zeros(200_000), "b": torch.zeros(300, dtype=torch.bfloat16)}
    shadows = [Shadow(Ema(half_life_steps=1)), Shadow(Ema(half_life_steps=50))]
    twins = [Shadow(shadow.average) for shadow in shadows]

    def update(copied, step):
        for shadow in shadows:
            shadow.update(step, copied)

    beside = HostUpdates(update, RowLayout(live))
    for step in range(1, 60):
        for twin_ in twins:
            twin_.update(step, live)
        beside.begin(live, step)
        beside.finish()
        for tensor in live.values():
            tensor.add_(step)
    beside.wait()
    for shadow, twin_ in zip(shadows, twins, strict=True):
        assert same((shadow.step, shadow.tensors), (twin_.step, twin_.tensors))


def test_what_goes_wrong_beside_the_training_arrives_there():
    def fail(copied):
        raise ZeroDivisionError

    live = {"a": torch.zeros(3)}
    beside = HostUpdates(fail, RowLayout(live))
    beside.begin(live)
    with pytest.raises(ZeroDivisionError):
        beside.begin(live)


class FailsAt:
    """An average that cannot be updated at one step."""

    def __init__(self, step):
        self.step = step

    def beta(self, step, gap):
        if step == self.step:
            raise ZeroDivisionError(f"at step {step}")
        return 0.5

    def span_steps(self, step):
        return 1.0


@pytest.mark.parametrize("step", [5, 24])
def test_an_average_that_fails_beside_the_training_ends_the_fit_also_in_its_last_step(tmp_path, step):
    callback = MergeCallback(merges={"fails": FailsAt(step)}, storage="cpu")
    with pytest.raises(ZeroDivisionError, match=f"at step {step}"):
        fit(make(Toy), tmp_path, callback, limit_val_batches=0)


def test_averages_in_host_memory_are_told_with_their_copy(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(make(Toy), tmp_path, MergeCallback(merges=Ema(half_life_steps=3), storage="cpu"))
    assert "1 average over every step while the learning rate is constant, in 0.0 MiB of host memory" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_average_of_another_dtype_than_the_weights_have_now_goes_on(dtype):
    """As after a resume in another precision."""
    saved, averages = (RunningAverages({"ema": Ema(half_life_steps=1)}, None) for _ in range(2))
    saved.update(1, {"x": torch.zeros(3)}, {})
    tensors = {name: tensor for _, name, tensor in saved.tensors()}
    assert averages.load_state_dict(saved.state_dict(), lambda name: tensors, {}) == []
    averages.update(2, {"x": torch.ones(3, dtype=dtype)}, {})
    assert torch.equal(averages["ema"].tensors["x"], torch.full((3,), 0.5))


def test_a_step_seen_twice_counts_once():
    shadow = Shadow(Ema(half_life_steps=1))
    for step in (1, 2, 2):
        shadow.update(step, {"x": torch.tensor([float(step)])})
    assert shadow.tensors["x"].item() == 1.5


def test_a_shadow_owns_its_weights():
    weight = nn.Parameter(torch.ones(2))
    shadow = Shadow(Ema(half_life_steps=1))
    shadow.update(1, {"x": weight})
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(shadow.tensors["x"], torch.ones(2))
    assert not shadow.tensors["x"].requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Ema, "exactly one of half_life_steps and half_life, got half_life_steps=None"),
        (lambda: Ema(half_life_steps=1, half_life=0.1), "exactly one"),
        (
            lambda: Ema(half_life_steps=0),
            "half_life_steps must be at least 1 step and finite, got 0; half_life= is a share",
        ),
        (lambda: Ema(half_life_steps=0.05), "half_life_steps must be at least 1 step and finite, got 0.05"),
        (lambda: Ema(half_life=1.5), r"half_life must be a share of training in \(0, 1\], got 1.5"),
        (lambda: PowerEma(0.3), r"sigma_rel must lie in \(0, 0.2887\), got 0.3"),
        (lambda: PowerEma(0.0), "got 0.0"),
    ],
)
def test_a_wrong_width_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_averages_are_averages():
    assert is_average(Ema(half_life=0.1))
    assert is_average(PowerEma(0.1))
    assert not is_average("sma")
    assert not is_average(len)


def twin(tracker, betas):
    """The recursion in float64, over the steps of a run."""
    average = None
    for step, parameters in sorted(tracker.parameters.items()):
        if step in betas:
            wide = {name: tensor.double() for name, tensor in parameters.items()}
            share = 1 - betas[step]
            average = wide if average is None else {k: v + share * (wide[k] - v) for k, v in average.items()}
    return average


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_averages_over_every_step_are_those_of_the_float64_twin(tmp_path, precision):
    callback = MergeCallback(merges={"ema": Ema(half_life_steps=4), "share": Ema(half_life=0.2), "edm": PowerEma(0.1)})
    tracker = Tracker()
    fit(make(Toy, warmup_steps=3), tmp_path, callback, tracker, precision=precision)
    gamma = PowerEma(0.1).gamma
    first = next(step for step in range(1, 25) if step >= 4)
    betas = {
        "ema": dict.fromkeys(range(first, 25), 0.5 ** (1 / 4)),
        "share": {step: 0.5 ** (1 / (0.2 * step)) for step in range(first, 25)},
        "edm": {step: (1 - 1 / step) ** (gamma + 1) for step in range(first, 25)},
    }
    tolerance = 2**-8 if precision == "bf16-true" else 1e-6
    for name, by_step in betas.items():
        expected = twin(tracker, by_step)
        merged = callback.merged_state_dict(name)
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key].double(), tensor, rtol=tolerance, atol=tolerance)
    # An average alone takes no snapshots.
    assert callback.snapshot_steps == []


def test_an_average_is_evaluated_like_any_merge_and_stands_for_a_span(tmp_path):
    callback = MergeCallback(merges=Ema(half_life_steps=4))
    run = fit(make(Toy), tmp_path, callback)
    assert len(run.logged("merged/val_loss")) == 6
    assert run.logged("merge/span_steps")[-1][1] == pytest.approx(2 * 4 / math.log(2))
    assert not run.logged("merge/num_snapshots")
    with callback.merged_weights(run.module):
        assert same(dict(run.module.state_dict()), callback.merged_state_dict())


def test_an_average_has_no_coefficients_and_says_so(tmp_path):
    callback = MergeCallback(merges={"late": Ema(half_life_steps=4)})
    with pytest.raises(RuntimeError, match="nothing was captured yet"):
        callback.merged_state_dict()
    fit(make(Toy), tmp_path, callback)
    for method in (callback.coefficients, callback.implied_decay):
        with pytest.raises(ValueError, match="the merge 'late' is an average over every step, not over snapshots"):
            method()


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_an_average_is_saved_with_what_it_is(tmp_path, suffix):
    callback = MergeCallback(merges=Ema(half_life_steps=4))
    fit(make(Toy), tmp_path, callback)
    callback.save_merged(tmp_path / f"average.{suffix}")
    origin = read_provenance(tmp_path / f"average.{suffix}")
    assert origin["rule"] == "Ema(half_life_steps=4, half_life=None)"
    assert origin["steps"] == [24]


class Stepped(Toy):
    """Constant rates in two phases with a move between them, and a decay at the end."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rates = [*[1.0] * 8, 0.75, *[0.5] * 9, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.005]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_an_average_begins_anew_with_a_new_rate_and_stays_while_the_rate_decays(tmp_path):
    callback, tracker = MergeCallback(merges=Ema(half_life_steps=4)), Tracker()
    fit(make(Stepped), tmp_path, callback, tracker)
    expected = twin(tracker, dict.fromkeys(range(10, 19), 0.5 ** (1 / 4)))
    merged = callback.merged_state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key].double(), tensor, rtol=1e-6, atol=1e-7)
    # Batch-norm statistics are those of the latest step that counted.
    assert torch.equal(merged["norm.running_mean"], tracker.buffers[18]["norm.running_mean"])


@pytest.mark.slow
def test_averages_and_snapshots_are_kept_side_by_side(tmp_path):
    alone, both = MergeCallback(2, 3), MergeCallback(2, 3, merges={"sma": "sma", "ema": Ema(half_life_steps=4)})
    ema = MergeCallback(merges=Ema(half_life_steps=4), name="other")
    fit(make(Toy), tmp_path, alone, MergeCallback(2, 3, name="more"))
    fit(make(Toy), tmp_path, both, ema)
    assert same(both.merged_state_dict("sma"), alone.merged_state_dict())
    assert same(both.merged_state_dict("ema"), ema.merged_state_dict())


def test_an_average_that_met_nan_is_named_and_begins_anew_once_the_weights_are_sound(tmp_path):
    class Breaking(Callback):
        """Around the callback between two of these the weights are no numbers at one step."""

        kept = None

        def on_train_batch_end(self, trainer, pl_module, *_):
            weight = pl_module.out.weight.data
            if trainer.global_step == 9 and Breaking.kept is None:
                Breaking.kept = weight.clone()
                weight.fill_(math.nan)
            elif trainer.global_step == 9:
                weight.copy_(Breaking.kept)

    callback = MergeCallback(merges=Ema(half_life_steps=4))
    with pytest.warns(UserWarning, match=r"no merge 'ema' at step 12: its average holds NaN or inf and restarts"):
        run = fit(make(Toy), tmp_path, Breaking(), callback, Breaking())
    assert [step + 1 for step, _ in run.logged("merged/val_loss")] == [4, 8, 16, 20, 24]
    assert all(torch.isfinite(tensor).all() for tensor in callback.merged_state_dict().values())


def test_an_average_of_another_profile_starts_anew_after_a_resume_and_says_so(tmp_path):
    before, after = (MergeCallback(merges=Ema(half_life_steps=half_life)) for half_life in (4, 2))
    first = fit(make(Toy), tmp_path / "a", before, train=ResumableBatches(), max_steps=12)
    first.trainer.save_checkpoint(tmp_path / "12.ckpt")
    with pytest.warns(UserWarning, match="the checkpoint holds no average 'ema' with this profile: it restarts"):
        fit(make(Toy), tmp_path / "b", after, train=ResumableBatches(), ckpt_path=tmp_path / "12.ckpt")


def test_parameters_that_become_trainable_begin_a_new_average_and_a_new_window(tmp_path):
    class Unfreezing(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 10:
                pl_module.frozen.requires_grad_(True)

    callback = MergeCallback(1, 4, merges={"sma": "sma", "ema": Ema(half_life_steps=4)})
    message = r"changed before step 11: the window of 4 snapshots and the average 'ema' does not fit them any more"
    with pytest.warns(UserWarning, match=message):
        fit(make(Toy), tmp_path, callback, Unfreezing(), max_steps=11)
    assert callback.snapshot_steps == [11]
    assert same(callback.merged_state_dict("sma"), callback.merged_state_dict("ema"))
